"""Running statistics of a whole population: `recalibrate`."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .. import core
from ..arguments import full_mask
from ..comm import Communicator
from ..core import Running
from ..kernels import select
from .layer import SyncBatchNorm
from .lockstep import communicator_of, device_of, in_lockstep, message, message_length, run, uncompiled
from .noisy import NoisySyncBatchNorm


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    process_group: Any = None,
) -> None:
    """Sets running_mean and running_var to mean and unbiased variance of what the layers get of all ranks' batches.

    Running averages follow weights that change, and weight the last batches most. This runs the model, as it is, over
    the batches once. Each layer normalises as in training, by its batch's statistics, over the ranks of its group; what
    reaches it is summed over all batches and ranks, element by element, so that any split gives the same. For the first
    layer that is exactly the data's mean and variance. Inputs of later ones depend, as in training, on which samples
    are in a batch together.

    The layers are all SyncBatchNorm and nn.BatchNorm layers (torch's SyncBatchNorm, too) with running statistics that
    are in training mode. Those in evaluation mode are frozen: they normalise by their running statistics, and keep
    them. Modes are left as they are, dropout's too: put it in evaluation mode for statistics without it. Parameters,
    momentum, num_batches_tracked and gradients are untouched. Layers behind a NoisySyncBatchNorm get its noise, which
    is that of the training steps to come: noise_count is as before afterwards.

    Args:
        model: the model, wrapped by DistributedDataParallel or not.
        batches: of this rank, all of which are used. Ranks may have different numbers of batches, or none: they then go
            on with empty ones (N = 0), which the model must take. Batches are then tensors or arrays, or containers of
            them, with samples along axis 0.
        forward: called as forward(model, batch). By default the model gets the batch, or the first entry of a tuple or
            list, on the device of the model's first parameter.
        progress: whether rank 0 shows a bar on a terminal, if tqdm is installed.
        process_group: over whose batches; see SyncBatchNorm. Layers may have groups that are parts of it.

    Collective:
        every rank must call. A small all_reduce before each batch and one at the end; one a layer in its first forward;
        one of all layers' sums after the last; and those of the layers.

    Numerics:
        The kernels' moments about the mean of the first step's batches, in float64, rounded once.

    Raises:
        ValueError: no such layer in the model or none in training mode; no data, or one element a channel, on all ranks
            together; statistics that are not finite; or layers with a group of several ranks, and here only this one.
        TypeError: model is no module; batches cannot be iterated over, or emptied where a rank must.
        RuntimeError: another rank raised an error before a forward, or its layers differ. An error in `forward` on one
            rank alone leaves the others waiting, as in training.
        On an error all running statistics are as before.

    References:
        Y. Wu, J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576.
        fvcore's update_bn_stats takes the plain mean of the batches' means and (in its first versions) variances, of
        this rank alone: small batches count as much as large ones, and the variance of the batches' means is missing.
        torch.optim.swa_utils.update_bn does the same for all layers, also frozen ones, whose statistics it resets first
        and loses on an error, and puts all of the model in training mode.

    Example:
        >>> layer = SyncBatchNorm(1)
        >>> recalibrate(layer, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [7.0], [9.0]])])
        >>> layer.running_mean, layer.running_var
        (tensor([5.]), tensor([11.5000]))
    """
    comm = communicator_of(process_group, message_length)
    device = torch.device("cpu")
    try:
        device = device_of(model)
        layers = _layers_of(model, comm)
    except Exception as error:
        core.refuse(error, message(comm, device), comm)
    forward = run if forward is None else forward
    noise = [layer.noise_count for layer in model.modules() if isinstance(layer, NoisySyncBatchNorm)]
    saved = [(v, v.clone()) for v in itertools.chain(noise, *map(_statistics, layers.values()))]
    sums = {name: _Sums(name, layer, comm) for name, layer in layers.items()}
    signature = sum(i * layer.num_features for i, layer in enumerate(layers.values(), 1))
    hooks = [
        layer.register_forward_pre_hook(of_layer, with_kwargs=True)
        for layer, of_layer in zip(layers.values(), sums.values(), strict=True)
    ]
    try:
        with torch.no_grad(), uncompiled(model):
            for batch, is_data in in_lockstep(_shown(batches, progress, comm), signature, comm, device):
                for of_layer in sums.values():
                    of_layer.expects_data = is_data
                forward(model, batch)
            found = _population(layers, sums, comm, device)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for v, value in saved:
                v.copy_(value)
    with torch.no_grad():
        for name, (mean, var) in found.items():
            running_mean, running_var = _statistics(layers[name])[:2]
            running_mean.copy_(mean)
            running_var.copy_(var)


class _Sums:
    """Sums the moments of a layer's inputs on this rank: a hook before the layer's forward.

    Attributes:
        moments: (2c + 1,) float64, as of kernels.stats, about center.
        center: (c,) float64, the mean of the first step with any data over all ranks; None before.
        expects_data: whether this rank has a batch, in this step.
    """

    def __init__(self, name: str, layer: _BatchNorm, comm: Communicator) -> None:
        self.name, self.comm = name, comm
        self.moments = torch.zeros(2 * layer.num_features + 1, dtype=torch.float64, device=_statistics(layer)[0].device)
        self.center: Tensor | None = None
        self.expects_data = True

    def __call__(self, layer: _BatchNorm, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = next(itertools.chain(arguments, keywords.values()), None)
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != layer.num_features:
            return  # the layer refuses it
        if x.numel() and not self.expects_data:
            raise RuntimeError(
                f"{core.rank_prefix(self.comm)}expected no data in {self.name}, for this rank has no more batches; got "
                f"shape {tuple(x.shape)}: pass batches with samples along axis 0 of their tensors, or the same number "
                "of batches on all ranks"
            )
        masks = (v for v in (*keywords.values(), *arguments[1:]) if isinstance(v, Tensor) and v.dtype == torch.bool)
        given = next(masks, None)
        if given is None and isinstance(layer, SyncBatchNorm) and layer._syncbn_mask is not None:
            given = layer._syncbn_mask.of(x)
        try:
            mask = full_mask(given, x)
        except (TypeError, ValueError):
            return  # the layer refuses it
        x, kernels = x.detach(), select(x)
        if self.center is None:
            first = kernels.stats(x, None, mask)
            self.comm.all_reduce(first)
            count = first[-1].item()
            if math.isnan(count):  # what a layer that refuses its input on another rank sends
                core.check_count(count, self.comm)
            if not count:
                return
            self.center = first[: layer.num_features] / count
        self.moments += kernels.stats(x, self.center, mask)


def _population(
    layers: dict[str, _BatchNorm], sums: dict[str, _Sums], comm: Communicator, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns each layer's mean and unbiased variance, on the CPU; nothing for layers that no data has reached."""
    total = torch.cat([of_layer.moments.to(device) for of_layer in sums.values()])
    comm.all_reduce(total)
    parts = torch.split(total.cpu(), [len(of_layer.moments) for of_layer in sums.values()])
    found, unreached = {}, []
    for (name, layer), moments in zip(layers.items(), parts, strict=True):
        center = sums[name].center
        if center is None:
            unreached.append(name)
            continue
        # Normalising nothing turns moments into running statistics.
        nothing = torch.empty((0, layer.num_features))
        mean, var = (torch.zeros(layer.num_features, dtype=v.dtype) for v in _statistics(layer)[:2])
        running = Running(mean, var, None, 1.0)
        moments, center, kernels = moments.clone(), center.cpu(), select(nothing)
        core.normalise(nothing, nothing, None, None, running, layer.eps, kernels, comm, moments, center)
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise ValueError(
                f"{core.rank_prefix(comm)}expected finite inputs of {name}; got statistics that are not finite: look "
                "for NaN, infinity or overflow in the batches and the parameters"
            )
        found[name] = mean, var
    if not found:
        raise ValueError(
            f"{core.rank_prefix(comm)}expected data for the layers, on at least one rank; got none: pass batches (an "
            "iterator that was used up has none), and with forward= the model itself, not a compiled copy"
        )
    if unreached:
        warnings.warn(
            f"no data reached these layers, which keep their running statistics: {', '.join(unreached)}", stacklevel=3
        )
    return found


def _layers_of(model: nn.Module, comm: Communicator) -> dict[str, _BatchNorm]:
    """Returns the layers to recalibrate, by name."""
    every = {
        name or type(layer).__name__: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }
    lazy = [n for n, layer in every.items() if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()]
    if lazy:
        raise ValueError(f"expected layers that have seen a batch; got lazy ones, {', '.join(lazy)}: send one through")
    layers = {name: layer for name, layer in every.items() if layer.training and isinstance(layer.running_mean, Tensor)}
    if not layers:
        state = f"{len(every)}, all in evaluation mode: call model.train()" if every else "none: there is nothing to do"
        raise ValueError(f"expected BatchNorm layers with running statistics in training mode; got {state}")
    for name, layer in layers.items():
        size = layer._syncbn_group.communicator().world_size if isinstance(layer, SyncBatchNorm) else 1
        if size > comm.world_size:
            raise ValueError(
                f"expected a process_group with all ranks of the layers' groups; got {comm.world_size} ranks, and for "
                f"{name} {size}: pass process_group=, as for the layers"
            )
    return layers


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    values: tuple[Tensor | None, ...] = layer.running_mean, layer.running_var, layer.num_batches_tracked
    return [v for v in values if v is not None]


def _shown(batches: Iterable[Any], progress: bool, comm: Communicator) -> Iterator[Any]:
    """Yields the batches, with a bar on rank 0's terminal. Errors of iter() come at the first step, too."""
    if progress and comm.rank == 0 and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(batches, desc="recalibrate", unit="batch", disable=None) as bar:
            yield from bar
    else:
        yield from batches
