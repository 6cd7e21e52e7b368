"""The NumPy frontend: a layer with explicit forward and backward, for data-parallel training without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import core
from .arguments import check_arguments, full_mask
from .comm import AGREEMENT, Communicator, GroupHandle, LocalCommunicator
from .kernels import Running, empty, select
from .layout import layout_of
from .noise import agreed, check_level, check_seed, derivative, goes_on, normal, perturbed, proposal

__all__ = ["NoisySyncBatchNorm", "SyncBatchNorm"]

Array = NDArray[Any]
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_NOISE = ("noise_mean", "noise_var", "noise_seed", "noise_count")


class SyncBatchNorm:
    """Batch normalisation of ndarrays over the batch of all ranks, with the mathematics of syncbn.SyncBatchNorm.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for their cumulative average.
        affine: whether to have weight and bias.
        track_running_stats: whether to keep running_mean, running_var and num_batches_tracked. Without them evaluation
            normalises by the statistics of this rank's batch.
        comm: an mpi4py communicator, a syncbn.comm.Communicator, "own", "node" or a number of ranks as in
            syncbn.SyncBatchNorm, or None for this process alone. A copy of the layer keeps it; so does a pickled layer
            names and numbers, but it loses any other, and says so when it is trained before `layer.comm` is set again.
        dtype: of the parameters and running statistics, float16, float32 or float64.

    Attributes:
        weight, bias: (C,), or None.
        running_mean, running_var: (C,), or None.
        num_batches_tracked: () int64, or None.
        grad_weight, grad_bias: (C,), after backward: this rank's own sums, to be averaged or summed over ranks like
            every other gradient.
        training: the mode; see train and eval.

    Shape:
        forward's x and backward's dy: (N, C, ...), float16, float32 or float64; N may be 0 and may differ between
        ranks. forward's mask: bool, (N, 1, ...), (N, ...), or what broadcasts to (N, 1, ...).

    Collective:
        In training mode one all_reduce of 2C + 1 float64 forward (float64 x: two), one of 2C float64 backward; every
        rank must call both. In evaluation mode none.

    Example:
        >>> layer = SyncBatchNorm(2)
        >>> layer.forward(np.array([[1, 5], [3, 9]], np.float32)).round(3)
        array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        >>> layer.backward(np.ones((2, 2), np.float32)), layer.grad_bias
        (array([[0., 0.],
               [0., 0.]], dtype=float32), array([2., 2.], dtype=float32))
    """

    _state_names: tuple[str, ...] = _STATE

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        comm: Any = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if np.dtype(dtype) not in (np.float16, np.float32, np.float64):
            raise TypeError(f"expected dtype to be float16, float32 or float64; got {np.dtype(dtype)}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.comm = comm
        self.training = True
        self.weight: Array | None = np.ones(num_features, dtype) if affine else None
        self.bias: Array | None = np.zeros(num_features, dtype) if affine else None
        self.running_mean: Array | None = np.zeros(num_features, dtype) if track_running_stats else None
        self.running_var: Array | None = np.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked: Array | None = np.array(0, np.int64) if track_running_stats else None
        self.grad_weight: Array | None = None
        self.grad_bias: Array | None = None
        self._saved: tuple[Array, Array | None, Array | None, Array, Array | None, Communicator | None] | None = None

    @property
    def comm(self) -> Any:
        """The ranks that normalise together, as given; set it to change them."""
        return self._group.group

    @comm.setter
    def comm(self, comm: Any) -> None:
        handle = GroupHandle(comm)
        if comm is not None:
            handle.communicator("comm")  # refuse what is none here, not at the first batch
        self._group = handle

    def train(self, mode: bool = True) -> SyncBatchNorm:
        """Sets training mode (statistics of the batch, synchronised) and returns the layer."""
        self.training = mode
        return self

    def eval(self) -> SyncBatchNorm:
        """Sets evaluation mode (running statistics, nothing sent) and returns the layer."""
        return self.train(False)

    def forward(self, x: Array, mask: Array | None = None) -> Array:
        """Normalises x, (N, C, ...), and keeps what backward needs: x itself, which must stay as it is until then.

        Args:
            x: the batch.
            mask: which positions are valid (True), or None for all; must stay as it is, too. See
                syncbn.functional.sync_batch_norm.

        Raises:
            TypeError: x is no ndarray of a floating dtype, or a matrix or masked array; mask is no ndarray of bool.
            ValueError: shapes that do not fit, or a single element per channel over all ranks.
            RuntimeError: another rank raised one of these; no rank is left waiting.
        """
        self._saved = None
        comm = self._group.communicator("comm") if self.training and self.comm is not None else LocalCommunicator()
        try:
            self._check(x)
            kernels, mask = select(x), full_mask(mask, x)
        except Exception as error:
            core.refuse(error, np.empty(2 * self.num_features + 1), comm)
        y: Array = empty(layout_of(x), x)
        weight, bias = self._scale_and_shift()
        if self.training or self.running_mean is None:
            running = self._running() if self.training and self.track_running_stats else Running()
            statistics = core.forward(x, y, weight, bias, running, self.eps, kernels, comm, mask=mask)
            self._saved = x, weight, bias, statistics, mask, comm
        else:
            statistics = core.eval_forward(
                x, y, weight, bias, self.running_mean, self.running_var, self.eps, kernels, mask
            )
            self._saved = x, weight, bias, statistics, mask, None
        return y

    def _check(self, x: Array) -> None:
        if not isinstance(x, np.ndarray) or isinstance(x, (np.matrix, np.ma.MaskedArray)):
            raise TypeError(f"expected x to be a plain numpy.ndarray; got {type(x).__name__}: convert it first")
        vectors = self.weight, self.bias, self.running_mean, self.running_var
        for v in vectors:
            if v is not None and not isinstance(v, np.ndarray):
                raise TypeError(f"expected parameters to be ndarrays or None; got {type(v).__name__}: convert it first")
        momentum = 0.0 if self.momentum is None else self.momentum
        check_arguments(x, self.num_features, *vectors, momentum, self.eps)

    def _scale_and_shift(self) -> tuple[Array | None, Array | None]:
        """Returns weight and bias of this forward; backward's, too, whatever an optimizer does before it."""
        return None if self.weight is None else self.weight.copy(), None if self.bias is None else self.bias.copy()

    def _running(self) -> Running:
        return Running.of(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)

    def backward(self, dy: Array) -> Array:
        """Returns dx for the latest forward, and sets grad_weight and grad_bias.

        Args:
            dy: the gradient of forward's result, of its shape.

        Raises:
            RuntimeError: forward has not been called.
            ValueError: dy has another shape than forward's result. The other ranks get a dx of NaN instead of waiting.
        """
        if self._saved is None:
            raise RuntimeError("expected backward after forward; got no forward: call forward(x) first")
        x, weight, bias, statistics, mask, comm = self._saved
        try:
            dy = np.asarray(dy)
            if dy.shape != x.shape:
                raise ValueError(f"expected dy of forward's shape, {x.shape}; got {dy.shape}: pass the gradient of y")
            if dy.dtype.kind not in "fiu":
                raise TypeError(f"expected dy of real numbers; got {dy.dtype}: pass the gradient of y")
        except Exception as error:
            core.refuse(error, np.empty(2 * self.num_features), comm or LocalCommunicator())
        dx: Array = empty(layout_of(x), x)
        dy, kernels = dy.astype(x.dtype, copy=False), select(x)
        self.grad_weight = None if weight is None else np.empty_like(weight)
        self.grad_bias = None if bias is None else np.empty_like(bias)
        gradients = self.grad_weight, self.grad_bias
        if comm is None:
            core.eval_backward(dy, x, dx, weight, *gradients, statistics, kernels, mask)
        else:
            core.backward(dy, x, dx, weight, None, *gradients, statistics, kernels, comm, mask=mask)
        return dx

    def state_dict(self) -> dict[str, Array]:
        """Returns copies of the parameters and running statistics, under the names of torch's layer."""
        values = {name: getattr(self, name) for name in self._state_names}
        return {name: value.copy() for name, value in values.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the values of a state_dict, of this layer or (on the CPU) of torch's.

        Raises:
            KeyError: a name is missing, or is none of this layer's. The layer is then as before.
            ValueError: a value has another shape than this layer's. The layer is then as before.
        """
        own = {name: value for name in self._state_names if (value := getattr(self, name)) is not None}
        if set(state) != set(own):
            raise KeyError(f"expected the names {sorted(own)}; got {sorted(state)}: was the layer built differently?")
        new = {name: np.asarray(state[name], value.dtype) for name, value in own.items()}
        for name, value in own.items():
            if new[name].shape != value.shape:
                raise ValueError(
                    f"expected {name} of shape {value.shape}; got {new[name].shape}: was the layer built differently?"
                )
        for name, value in own.items():
            value[...] = new[name]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats})"
        )


class NoisySyncBatchNorm(SyncBatchNorm):
    """SyncBatchNorm whose mean and variance get noise in training: syncbn.NoisySyncBatchNorm, with the same numbers.

    Args:
        num_features, eps, momentum, affine, track_running_stats, comm, dtype: as SyncBatchNorm.
        noise_mean, noise_var: initial values of the parameters, in units of the batch's own standard deviation and
            variance: a number for all channels, or one a channel.
        seed: of the noise. None takes one of NumPy's random numbers when the layer is made, of rank 0 for all ranks.

    Attributes:
        noise_mean, noise_var: (C,). The sign of a learnt one means nothing.
        grad_noise_mean, grad_noise_var: (C,), after a backward in training: as grad_weight.
        noise_seed, noise_count: () int64: the seed, and how many forwards drew noise. They are saved with the rest; a
            state_dict of SyncBatchNorm, which lacks all four, loads too, and leaves them as they are.

    Collective:
        as SyncBatchNorm; and over several ranks once, before the first forward in training, an all_reduce of 22 float64
        by which the ranks agree on the seed; another one after seed or count were changed, which all ranks must do.

    Raises:
        ValueError, TypeError: as syncbn.NoisySyncBatchNorm.

    Example:
        >>> layer = NoisySyncBatchNorm(2, noise_mean=0.5, noise_var=0.0, seed=1)
        >>> y = layer.forward(np.array([[1, 5], [3, 9]], np.float32))
        >>> bool(abs(y.mean(0)).min() > 0), layer.noise_count
        (True, array(1))
    """

    _state_names = _STATE + _NOISE

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        comm: Any = None,
        dtype: DTypeLike = np.float32,
        *,
        noise_mean: Any = 0.1,
        noise_var: Any = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, comm, dtype)
        for name, value in {"noise_mean": noise_mean, "noise_var": noise_var}.items():
            level = np.asarray(value)
            if level.dtype.kind not in "fiu":
                raise TypeError(f"expected {name} to be a number or a vector; got {level.dtype}: pass 0.1, say")
            check_level(name, value, level.shape, num_features, bool((np.isfinite(level) & (level >= 0)).all()))
            setattr(self, name, np.full(num_features, level, dtype))
        seed = check_seed(seed)
        self._is_given = seed is not None
        seed = int(np.random.default_rng().integers(2**63 - 1)) if seed is None else seed
        self.noise_seed: Array = np.array(seed, np.int64)
        self.noise_count: Array = np.array(0, np.int64)
        self.noise_mean: Array
        self.noise_var: Array
        self.grad_noise_mean: Array | None = None
        self.grad_noise_var: Array | None = None
        self._agreed: Any = None
        self._before: tuple[int, int] | None = None  # seed and count at the latest forward
        self._drawn: tuple[Any, ...] | None = None

    def forward(self, x: Array, *others: Any, **options: Any) -> Array:
        """Normalises x, (N, C, ...), with noise in training; see SyncBatchNorm."""
        self._drawn = None
        if self.training:
            self._agree()
        y = super().forward(x, *others, **options)
        if self.training:
            self.noise_count += 1
        return y

    def _agree(self) -> None:
        comm = self._group.communicator("comm") if self.comm is not None else LocalCommunicator()
        own = int(self.noise_seed), int(self.noise_count)
        if comm.world_size > 1 and not (self._agreed is self._group and goes_on(self._before, *own)):
            message = np.array(proposal(*own, self._is_given, comm.rank), np.float64)
            core.all_reduce(message, AGREEMENT, comm)
            if np.isnan(message[0]):
                core.check_count(float("nan"), comm)
            try:
                self.noise_seed[...] = agreed(message.tolist(), *own, comm.world_size)
            except ValueError as error:
                raise ValueError(f"{core.rank_prefix(comm)}{error}") from None
        self._agreed, self._before = self._group, (int(self.noise_seed), own[1])

    def _scale_and_shift(self) -> tuple[Array | None, Array | None]:
        if not self.training:
            return super()._scale_and_shift()
        wide = np.float64 if self.noise_mean.dtype == np.float64 else np.float32
        channels = np.arange(1, self.num_features + 1)
        e1, e2 = normal(self.noise_seed.reshape(1), self.noise_count.reshape(1), channels, np)
        e1, e2 = e1.astype(wide), e2.astype(wide)
        levels = self.noise_mean.astype(wide), self.noise_var.astype(wide)
        weight, bias = (None if v is None else v.astype(wide) for v in (self.weight, self.bias))
        noisy_weight, noisy_bias, shift, scale = perturbed(weight, bias, *levels, e1, e2, np)
        self._drawn = weight, noisy_weight, shift, scale, e1, e2, levels[1] * e2
        return noisy_weight, noisy_bias

    def backward(self, dy: Array) -> Array:
        """Returns dx for the latest forward, and sets the gradients of all parameters; see SyncBatchNorm."""
        dx = super().backward(dy)
        if self._drawn is None:
            return dx
        weight, noisy_weight, shift, scale, e1, e2, u = self._drawn
        assert self.grad_weight is not None
        assert self.grad_bias is not None
        along_weight = self.grad_weight - self.grad_bias * shift  # the bias has the weight in it
        along_scale = along_weight if weight is None else along_weight * weight
        dtype = self.noise_mean.dtype
        self.grad_noise_mean = (-self.grad_bias * noisy_weight * e1).astype(dtype)
        self.grad_noise_var = (along_scale * derivative(u, scale, np) * e2).astype(dtype)
        self.grad_weight = None if self.weight is None else (along_weight * scale).astype(self.weight.dtype)
        self.grad_bias = None if self.bias is None else self.grad_bias.astype(self.bias.dtype)
        return dx

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the values of a state_dict; see SyncBatchNorm. It may be one of a layer without noise."""
        is_noisy = any(name in state for name in _NOISE)
        super().load_state_dict(state if is_noisy else {**{name: getattr(self, name) for name in _NOISE}, **state})
        self._is_given = self._is_given or is_noisy
