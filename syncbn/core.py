"""Synchronised batch normalisation: the algorithm, once, for torch tensors and ndarrays alike.

    forward  = stats           -> all_reduce -> combine -> elemt
    backward = backward_reduce -> all_reduce -> backward_elemt

What computes (`kernels`) and what sends (`comm`) are arguments; their contracts are in syncbn/kernels/__init__.py
and syncbn/comm/__init__.py. The derivation of the formulas is in syncbn/kernels/reference.py.

No branch here depends on the number of ranks, on a rank being empty, or on the memory format, so that all ranks
always send the same messages.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

from . import environment

# Added to the count by each rank with float64 input, which sends a second message: a fraction that counts stay clear of
# (exact for up to 2^33 elements a channel and 2^20 ranks), by which ranks see that not all of them will.
_WIDE = 2.0**-20


class Running(NamedTuple):
    """What forward updates.

    Attributes:
        mean, var: (c,), the running statistics, or both None.
        num_batches_tracked: () int64, the number of batches in them, or None.
        momentum: weight of a new batch, a float or a 0-d array of x's library and device.
    """

    mean: Any = None
    var: Any = None
    num_batches_tracked: Any = None
    momentum: Any = 0.0


def forward(
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    running: Running,
    eps: float,
    kernels: Any,
    comm: Any,
    *tail: Any,
) -> Any:
    """Normalises x by the mean and variance over the x of all ranks.

    y = (x - mean) * invstd * weight + bias, and in place
    running = (1 - momentum) * running + momentum * (mean, var * count / (count - 1)).

    Args:
        x: (N, C, ...), this rank's part of the batch; N may be 0, and N and the spatial sizes may differ between ranks.
        y: as x, dense: where the result goes.
        weight, bias: (c,) or None.
        running: the running statistics.
        eps: added to the variance.
        kernels: the arithmetic for x.
        comm: the communicator.
        *tail: what follows in the same pass: the kernels' `tail` and `residual`.

    Returns:
        statistics, (2c + 1,) float64 = [mean | invstd | count] over all ranks.

    Collective:
        all_reduce of 2c + 1 float64; float64 input sends a second of the same size. Every rank must call.

    Raises:
        ValueError: one element a channel over all ranks, on every rank (on accelerators, where reading the count
            would stall the device, y is then `bias` and the running statistics stay untouched).
        RuntimeError: another rank refused its input, or float64 input on some ranks only. On every rank.
    """
    moments = kernels.stats(x, None)
    wide = x.dtype.itemsize == 8
    if wide:
        moments[-1] += _WIDE
    comm.all_reduce(moments)
    center = None
    if wide:
        _check_count(float(moments[-1]) if getattr(moments, "is_cpu", True) else None, wide, comm)
        # Squares of float64 are not exact in float64, so var = E[x^2] - mean^2 would cancel: take them about the mean.
        count = moments[-1] - _WIDE * comm.world_size
        center = moments[: x.shape[1]] / (count + (count == 0))
        moments = kernels.stats(x, center)
        comm.all_reduce(moments)
    _check_count(kernels.combine(moments, center, *running, eps), False, comm)
    kernels.elemt(x, moments, weight, bias, y, *tail)
    return moments


def backward(
    dy: Any,
    x: Any,
    dx: Any,
    weight: Any,
    bias: Any,
    grad_weight: Any,
    grad_bias: Any,
    statistics: Any,
    kernels: Any,
    comm: Any,
    tail: Any,
    *gate: Any,
) -> None:
    """Differentiates forward.

    dx = weight * invstd * (g - sum_g / count - (x - mean) * invstd^2 * sum_g_xmu / count), g = dy without a tail.

    Args:
        dy: as x, the gradient of this rank's y.
        dx: as x, dense: where the gradient of x goes.
        x, weight, bias, kernels, comm, tail: as given to forward; after in-place work, x is y.
        grad_weight, grad_bias: (c,) or None: where the gradients of weight and bias go, of this rank's elements alone,
            so that data-parallel training averages them like every other gradient.
        statistics: as forward returned them.
        *gate: after a forward with activation and residual, the kernels' `gate` and `g`.

    Collective:
        all_reduce of 2c float64. Every rank must call.
    """
    sums = kernels.backward_reduce(dy, x, statistics, weight, bias, grad_weight, grad_bias, tail, *gate)
    comm.all_reduce(sums)
    if gate:  # dy went through the activation already
        dy, tail = gate[1], tail._replace(activation="none")
    kernels.backward_elemt(dy, x, statistics, weight, bias, sums, dx, tail)


def eval_forward(
    x: Any, y: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float, kernels: Any
) -> Any:
    """Normalises x by the running statistics: as forward, with nothing sent and nothing updated."""
    # Running statistics as moments: those, about running_mean, of one element with that variance.
    moments = kernels.stats(x[:0], None)
    moments[: x.shape[1]], moments[x.shape[1] : -1], moments[-1] = running_mean, running_var, 1
    center = 1.0 * moments[: x.shape[1]]
    moments[: x.shape[1]] = 0
    kernels.combine(moments, center, *Running(), eps)
    kernels.elemt(x, moments, weight, bias, y)
    return moments


def eval_backward(
    dy: Any, x: Any, dx: Any, weight: Any, grad_weight: Any, grad_bias: Any, statistics: Any, kernels: Any
) -> None:
    """Differentiates eval_forward: as backward, but mean and invstd are constants, and nothing is sent."""
    kernels.backward_reduce(dy, x, statistics, weight, None, grad_weight, grad_bias)
    no_sums = kernels.backward_reduce(dy[:0], x[:0], statistics, weight, None)
    kernels.backward_elemt(dy, x, statistics, weight, None, no_sums, dx)


def refuse(error: Exception, message: Any, comm: Any) -> NoReturn:
    """Raises an error that this rank alone may have, after telling the others that it will not send its statistics.

    Forward's check of the count then raises on them too; backward, which sends no count, gives them gradients of NaN.

    Args:
        error: what is raised; that of a wrong argument says which rank it is.
        message: a float64 array as long as what the other ranks send, or None where that is not known.
        comm: the communicator.

    Collective:
        the first all_reduce of forward, or that of backward.
    """
    if message is not None:
        message[...] = float("nan")
        comm.all_reduce(message)
    if type(error) in (TypeError, ValueError):
        raise type(error)(f"{rank_prefix(comm)}{error}") from None
    raise error


def rank_prefix(comm: Any) -> str:
    """Returns environment.rank_prefix for the ranks of comm."""
    return environment.rank_prefix(comm.rank, comm.world_size)


def _check_count(count: float | None, wide: bool, comm: Any) -> None:
    """Raises, on all ranks alike, what all can see of a message. None: reading the count was not free."""
    if count is None or (count > 1 and count.is_integer() and not wide):
        return
    marks, elements = math.modf(count)
    if elements != elements:
        raise RuntimeError(
            f"{rank_prefix(comm)}expected statistics from every rank; another rank refused its input and raised an "
            "error: see that rank's message. The running statistics are untouched"
        )
    if marks != wide * _WIDE * comm.world_size:
        raise RuntimeError(
            f"{rank_prefix(comm)}expected float64 input on every rank or on none; got it on {marks / _WIDE:g} of "
            f"{comm.world_size}, and here {'also' if wide else 'not'}: give all ranks, empty ones too, one dtype; or a "
            "rank has failed between its two messages, see what it says"
        )
    if elements == 1:
        raise ValueError(
            f"{rank_prefix(comm)}expected more than 1 value per channel when training, over all ranks together; "
            "got 1: use larger batches or inputs, or eval mode"
        )
