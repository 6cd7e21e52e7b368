"""The NoisySyncBatchNorm layer: statistics of the batch with learnable noise, as a regulariser."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import core
from ..comm import GroupHandle
from ..core import NOTHING
from ..noise import check_level, check_seed, perturbed, stream
from . import noise
from .checks import forward_message
from .dispatch import is_traced
from .layer import SyncBatchNorm
from .noise import NoiseStream

_STATE = ("noise_mean", "noise_var", "noise_seed", "noise_count")


class NoisySyncBatchNorm(SyncBatchNorm):
    """SyncBatchNorm whose mean and variance get noise in training: a regulariser, as small batches' own noise is.

    For each channel, with unit normal e1 and e2, drawn once a forward and the same on every rank,

        mean' = mean + noise_mean * e1 * sqrt(var + eps),
        var' + eps = (var + eps) * f(noise_var * e2),  f(u) = 1 + u for u >= -1/2, 1 / (-4u) below,

    and y = (x - mean') / sqrt(var' + eps) * weight + bias. f is continuously differentiable, and keeps var' + eps above
    0 whatever e2 is; it falls slowly, for learnt noise could run away where 1 / sqrt(f) grew faster than sqrt(-u) does.

    noise_mean and noise_var are parameters, (C,), in units of the batch's own standard deviation and variance, so that
    a value means the same for every layer. Noise of absolute size, mean' = mean + gamma_mean * e1 and var' = var +
    gamma_var * e2, is the special case of noise_mean = gamma_mean / sqrt(var + eps) and noise_var = gamma_var /
    (var + eps), where f(u) = 1 + u.

    Running statistics are of the batch, without the noise, and evaluation has none. Since e1 and e2 have both signs,
    so may the parameters: the sign of a learnt one means nothing. Training them by the training loss mostly makes
    them smaller. `layer.noise_mean.requires_grad_(False)` keeps one as it is.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, **newer: as
            SyncBatchNorm.
        noise_mean, noise_var: initial values of the parameters: a number for all channels, or one a channel.
        seed: of the noise; a layer draws the same wherever it has the same seed and has run as often. None takes one of
            torch's random numbers when the layer is made, of rank 0 for all ranks of the group: after one
            torch.manual_seed a model has the same noise in every run, and its layers noise of their own. Forwards use
            none of torch's random numbers, and no later manual_seed changes them.

    Attributes:
        noise_mean, noise_var: parameters, (C,). Their gradients are, as those of weight, of this rank's elements.
        noise_seed, noise_count: buffers, () int64: the seed, and how many forwards drew noise. They are saved with the
            rest; a state_dict of BatchNorm, which lacks all four, loads too, and leaves them as they are.

    Shape:
        as SyncBatchNorm.

    Collective:
        as SyncBatchNorm; and over several ranks once, before the first forward in training, an all_reduce of 22
        float64 by which the ranks agree on the seed. On CPUs another one after seed or count were changed, by
        load_state_dict, say: change them on all ranks. On some only it is an error, in shared memory of all ranks,
        which names them; but for a count that is one less, and on accelerators, which are not asked. Values that are
        put back before the next forward in training are no change.

    Numerics:
        The noise becomes a weight and a bias: see syncbn/noise.py. It is a function of seed, count and channel, so the
        same on every device, in PyTorch and in syncbn.numpy.NoisySyncBatchNorm, to the roundoff of float64.

    Raises:
        ValueError: noise_mean or noise_var are negative, not finite or of another shape; seed is out of range. In the
            first forward in training, on all ranks: the ranks have different seeds, or have run differently often.
        TypeError: seed is no whole number.
        RuntimeError: a forward is repeated (activation checkpointing) without the state of torch's random numbers: with
            preserve_rng_state=False, say.
        Others as SyncBatchNorm.

    Example:
        >>> layer = NoisySyncBatchNorm(3, noise_mean=0.2, noise_var=0.0, seed=1)
        >>> x = torch.randn(4, 3, 8, 8)
        >>> layer(x).mean((0, 2, 3)).abs().max() > 0.01  # off by up to some 0.2 standard deviations
        tensor(True)
        >>> layer.noise_count
        tensor(1)

        Seed and count are saved and loaded with the rest, and the noise goes on as it would have:

        >>> other = NoisySyncBatchNorm(3)  # with any seed
        >>> other.load_state_dict(layer.state_dict())
        <All keys matched successfully>
        >>> torch.equal(other(x), layer(x))
        True

        A converted model with fuse=True runs a noisy layer and the activation behind it in one pass, as any other:

        >>> import syncbn
        >>> pair = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        >>> pair = syncbn.convert_sync_batchnorm(pair, noise=(0.2, 0.0), seed=1, fuse=True)
        >>> pair(x).min()
        tensor(0., grad_fn=<MinBackward1>)
    """

    noise_mean: Tensor
    noise_var: Tensor
    noise_seed: Tensor
    noise_count: Tensor
    _syncbn_noise: NoiseStream
    _syncbn_noise_levels: dict[str, Tensor]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        noise_mean: Any = 0.1,
        noise_var: Any = 0.1,
        seed: int | None = None,
        **newer: Any,
    ) -> None:
        levels = check_levels(num_features, noise_mean, noise_var)
        seed = check_seed(seed)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, **newer
        )
        add_noise(self, levels, seed, device, dtype)

    def reset_parameters(self) -> None:
        """Sets parameters and buffers to their initial values."""
        super().reset_parameters()
        if "_syncbn_noise" in self.__dict__:  # not in BatchNorm's constructor
            reset_noise(self)

    def extra_repr(self) -> str:
        """What distinguishes the layer in its representation."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return plain + "".join(
            f", {name}={value.item():g}" for name, value in self._syncbn_noise_levels.items() if value.dim() == 0
        )

    def _normalise_in_one_call(self, *_: Any, **__: Any) -> Tensor | None:
        return None  # its weight and bias are the parameters

    def _normalise_tensors(self, input: Tensor, *others: Any, **options: Any) -> Tensor:
        if self.training and not is_traced(input):
            # Before anything that one rank alone may refuse.
            group = self._syncbn_group
            noise.adopt(self._syncbn_noise, self.noise_seed, self.noise_count, group.name, group.communicator())
        return super()._normalise_tensors(input, *others, **options)

    def _vectors(self) -> tuple[Tensor | None, ...]:
        """Returns those of SyncBatchNorm, and what is here for the noise."""
        return *super()._vectors(), self.noise_mean, self.noise_var, self.noise_seed, self.noise_count

    def _apply_to(
        self, input: Tensor, vectors: tuple[Any, ...], group: GroupHandle, *others: Any, **options: Any
    ) -> Tensor:
        weight, bias, *statistics, noise_mean, noise_var, seed, count = vectors
        if self.training:
            try:
                self._check_noise(input, noise_mean, noise_var)
                weight, bias, after = self._noisy(weight, bias, noise_mean, noise_var, seed, count, group)
            except Exception as error:
                core.refuse(
                    error, forward_message(input, self.num_features, weight, bias, NOTHING), group.communicator()
                )
        y = super()._apply_to(input, (weight, bias, *statistics), group, *others, **options)
        if self.training:
            count.copy_(after)  # now that nothing was refused
        return y

    def _noisy(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        noise_mean: Tensor,
        noise_var: Tensor,
        seed: Tensor,
        count: Tensor,
        group: GroupHandle,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns weight and bias with this forward's noise, and the count after it."""
        arguments = seed, count, self.num_features
        if is_traced(noise_mean):
            drawn, new_seed, after = noise.traced(*arguments, self._syncbn_noise, group.name)
        else:
            drawn, new_seed, after = self._syncbn_noise.draw(*arguments, group.name, group.communicator())
        if new_seed is not seed:
            seed.copy_(new_seed)
        wide = torch.float64 if noise_mean.dtype == torch.float64 else torch.float32
        e1, e2 = drawn.to(wide)
        levels = noise_mean.to(wide), noise_var.to(wide)
        weight, bias, _, _ = perturbed(weight, bias, *levels, e1, e2, torch)
        return weight, bias, after

    def _check_noise(self, input: Tensor, *levels: Tensor) -> None:
        for name, v in zip(("noise_mean", "noise_var"), levels, strict=True):
            if v.shape != (self.num_features,) or not v.is_floating_point() or v.device != input.device:
                raise ValueError(
                    f"expected {name} of shape ({self.num_features},), floating, on {input.device}; got "
                    f"{tuple(v.shape)} {v.dtype} on {v.device}: was it replaced, or loaded from another layer?"
                )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        names = {prefix + name for name in _STATE}
        if names & state_dict.keys():
            self._syncbn_noise.is_given = True  # the seed was chosen
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        if not names & state_dict.keys():  # of a layer without noise
            missing_keys[:] = [name for name in missing_keys if name not in names]


def check_levels(num_features: int, noise_mean: Any, noise_var: Any) -> dict[str, Tensor]:
    """Returns the initial values of the noise parameters, () or (C,) float64, by name.

    Raises:
        ValueError: see syncbn.noise.check_level.
        TypeError: what is no number.
    """
    levels = {}
    for name, value in {"noise_mean": noise_mean, "noise_var": noise_var}.items():
        try:
            level = torch.as_tensor(value, dtype=torch.float64).detach().to("cpu", copy=True)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"expected {name} to be a number or a vector; got {type(value).__name__}: pass 0.1, say"
            ) from None
        is_fine = bool((level.isfinite() & (level >= 0)).all())
        check_level(name, value, tuple(level.shape), num_features, is_fine)
        levels[name] = level
    return levels


def check_seeds(seed: Any, layers: int, noise: Any) -> list[int | None]:
    """Returns a seed for each layer of a model, none for no noise: streams of `seed`, or None for each.

    Raises:
        TypeError: noise is no pair, or seed no whole number.
        ValueError: a seed out of range, or without noise.
    """
    seed = check_seed(seed)
    if noise is None:
        if seed is not None:
            raise ValueError(f"expected noise with a seed; got seed={seed} and noise=None: pass noise=(0.1, 0.1), say")
        return []
    if not isinstance(noise, (tuple, list)) or len(noise) != 2:
        raise TypeError(f"expected noise to be a pair, (noise_mean, noise_var), or None; got {noise!r}: pass two")
    if seed is None:
        return [None] * layers
    return [int(v) for v in stream(np.array([seed]), np.arange(layers))]


def add_noise(
    layer: Any, levels: dict[str, Tensor], seed: int | None, device: Any = None, dtype: torch.dtype | None = None
) -> None:
    """Gives a layer the parameters, buffers and stream of a NoisySyncBatchNorm.

    Args:
        layer: to be one, or one already, which gets new initial values.
        levels: of check_levels.
        seed: of the noise, or None for one of torch's random numbers.
        device, dtype: of the parameters.
    """
    is_given = seed is not None
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
    layer._syncbn_noise, layer._syncbn_noise_levels, layer._syncbn_noise_start = NoiseStream(is_given), levels, seed
    for name in levels:
        if name not in layer._parameters:
            parameter = torch.empty(layer.num_features, device=device, dtype=dtype)
            layer.register_parameter(name, nn.Parameter(parameter))
    for name in _STATE[2:]:
        if name not in layer._buffers:
            layer.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
    reset_noise(layer)


def reset_noise(layer: Any) -> None:
    """Sets a layer's noise to its initial values."""
    with torch.no_grad():
        for name, level in layer._syncbn_noise_levels.items():
            getattr(layer, name).copy_(level)
        layer.noise_seed.fill_(layer._syncbn_noise_start)
        layer.noise_count.zero_()


def remove_noise(layer: Any) -> None:
    """Undoes add_noise."""
    for name in _STATE:
        delattr(layer, name)
    for name in [name for name in layer.__dict__ if name.startswith("_syncbn_noise")]:
        delattr(layer, name)
