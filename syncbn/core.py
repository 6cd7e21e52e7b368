"""Synchronised batch normalisation: the algorithm, once, for torch tensors and ndarrays alike.

    forward  = stats           -> all_reduce -> normalise
    backward = backward_reduce -> all_reduce -> backward_elemt

What computes (`kernels`) and what sends (`comm`) are arguments; their contracts are in syncbn/kernels/__init__.py
and syncbn/comm/__init__.py. The derivation of the formulas is in syncbn/kernels/reference.py.

No branch here depends on the number of ranks, on a rank being empty, or on the memory format, so that all ranks
always send the same messages.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, NoReturn

from . import deferred, environment
from .comm.labels import REFUSED, Label
from .kernels import PLAIN, Epilogue, is_refused
from .kernels import Running as Running

NOTHING = Running()  # to update

# Each rank with float64 input adds this to its count. The fraction of the sum then tells how many ranks have float64
# input, and will send a second message (counts stay exact for up to 2^33 elements a channel and 2^20 ranks).
_FLOAT64_MARK = 2.0**-20


def reduce(x: Any, kernels: Any, comm: Any, mask: Any = None, label: Label | None = None) -> tuple[Any, Any]:
    """Sums the moments of x over all ranks: the first half of forward.

    Args:
        x, kernels, comm, mask, label: as forward.

    Returns:
        moments, (2c + 1,) float64 = [sum of x - center | sum of (x - center)^2 | count], and center, (c,) float64, or
        None for 0.

    Collective, Raises: as forward, but for a count of 1.
    """
    if deferred.devices:
        deferred.look(x.device)
    moments = kernels.stats(x, None, mask)
    is_float64 = x.dtype.itemsize == 8
    if is_float64:
        moments[-1] += _FLOAT64_MARK
    all_reduce(moments, label, comm)
    if not is_float64:
        return moments, None
    if getattr(moments, "is_cpu", True):
        check_count(float(moments[-1]), comm, is_float64=True)
    else:
        _check_later(moments, comm, is_float64=True)
    # Squares of float64 are not exact in float64, so var = E[x^2] - mean^2 would cancel: take them about the mean.
    count = moments[-1] - _FLOAT64_MARK * comm.world_size
    center = moments[: x.shape[1]] / (count + (count == 0))
    moments = kernels.stats(x, center, mask)
    all_reduce(moments, label, comm)
    return moments, center


def normalise(
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    running: Running,
    eps: float,
    kernels: Any,
    comm: Any,
    moments: Any,
    center: Any,
    epilogue: Epilogue = PLAIN,
    residual: Any = None,
    mask: Any = None,
) -> Any:
    """Normalises x by moments of all ranks, as reduce returned them: the second half of forward; sends nothing."""
    count = kernels.normalise(x, moments, center, running, eps, weight, bias, y, epilogue, residual, mask)
    if count is not None:
        check_count(count, comm)
    elif comm.world_size == 1 and mask is None:  # with a mask the count is known on the device only
        check_count(float(x.shape[0] * math.prod(x.shape[2:])), comm)
    else:
        _check_later(moments, comm)
    return moments


def forward(
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    running: Running,
    eps: float,
    kernels: Any,
    comm: Any,
    epilogue: Epilogue = PLAIN,
    residual: Any = None,
    mask: Any = None,
    label: Label | None = None,
) -> Any:
    """Normalises x by the mean and variance over the x of all ranks.

    y = activation((x - mean) * invstd * weight + bias + residual), and in place
    running = (1 - momentum) * running + momentum * (mean, var * count / (count - 1)).

    Args:
        x: (N, C, ...), this rank's part of the batch; N may be 0, and N and the spatial sizes may differ between ranks.
        y: as x, dense: where the result goes.
        weight, bias: (c,) or None.
        running: the running statistics.
        eps: added to the variance.
        kernels: the arithmetic for x.
        comm: the communicator.
        epilogue: the activation, and whether y overwrites x.
        residual: as x, or None.
        mask: (N, 1, *) bool, the valid positions, or None for all; ranks may differ in that. Elements elsewhere count
            for nothing, and y and dx are 0 there.
        label: which layer's call this is, for the communicator, or None.

    Returns:
        statistics, (2c + 1,) float64 = [mean | invstd | count] over all ranks.

    Collective:
        all_reduce of 2c + 1 float64; float64 input sends a second of the same size. Every rank must call.

    Raises:
        ValueError: one (valid) element a channel over all ranks, on every rank. Nothing is written to y, nor to the
            running statistics.
        RuntimeError: another rank refused its input, or float64 input on some ranks only. As ValueError.

        On accelerators reading the count would stall the device. There the running statistics stay as they are, y is
        NaN where another rank refused its input, and activation(bias + residual) for one element a channel; and the
        same error is raised by a later call of forward or backward on the device, or by deferred.synchronize_errors.
        It is never raised for calls that were captured in a graph. In a world of one it is raised at once, unless there
        is a mask.
    """
    moments, center = reduce(x, kernels, comm, mask, label)
    return normalise(x, y, weight, bias, running, eps, kernels, comm, moments, center, epilogue, residual, mask)


def backward_reduce(
    dy: Any,
    x: Any,
    weight: Any,
    bias: Any,
    grad_weight: Any,
    grad_bias: Any,
    statistics: Any,
    kernels: Any,
    comm: Any,
    epilogue: Epilogue = PLAIN,
    gate: Any = None,
    g: Any = None,
    mask: Any = None,
    label: Label | None = None,
) -> Any:
    """Sums over all ranks what the gradient of x needs: the first half of backward. Returns its (2c,) float64."""
    if deferred.devices:
        deferred.look(x.device)
    sums = kernels.backward_reduce(dy, x, statistics, weight, bias, grad_weight, grad_bias, epilogue, gate, g, mask)
    all_reduce(sums, label, comm)
    return sums


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
    epilogue: Epilogue = PLAIN,
    gate: Any = None,
    g: Any = None,
    mask: Any = None,
    label: Label | None = None,
) -> None:
    """Differentiates forward.

    dx = weight * invstd * (g - sum_g / count - (x - mean) * invstd^2 * sum_g_xmu / count), with g the gradient of what
    forward's activation is applied to: dy where there is none.

    Args:
        dy: as x, the gradient of this rank's y.
        dx: as x, dense: where the gradient of x goes.
        x, weight, bias, kernels, comm, epilogue, mask, label: as given to forward; after in-place work, x is y.
        grad_weight, grad_bias: (c,) or None: where the gradients of weight and bias go, of this rank's elements alone,
            so that data-parallel training averages them like every other gradient.
        statistics: as forward returned them.
        gate, g: after a forward with activation and residual: y (of silu the residual), and as x, where the gradient
            of the residual goes.

    Collective:
        all_reduce of 2c float64. Every rank must call.
    """
    arrays = dy, x, weight, bias, grad_weight, grad_bias, statistics
    sums = backward_reduce(*arrays, kernels, comm, epilogue, gate, g, mask, label)
    if g is not None:  # it is dy after the activation
        dy, epilogue = g, epilogue._replace(activation="none")
    kernels.backward_elemt(dy, x, statistics, weight, bias, sums, dx, epilogue, mask)


def eval_forward(
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    eps: float,
    kernels: Any,
    mask: Any = None,
) -> Any:
    """Normalises x by the running statistics: as forward, with nothing sent and nothing updated."""
    # The moments about running_mean, in float64, of two elements with that mean and variance: normalise makes exactly
    # running_mean and running_var of them.
    c = x.shape[1]
    moments = kernels.stats(x[:0], None)
    moments[:c] = running_mean
    center = 1.0 * moments[:c]
    moments[:c], moments[c:-1], moments[-1] = 0, running_var, 2
    moments[c:-1] *= 2
    kernels.normalise(x, moments, center, Running(), eps, weight, bias, y, mask=mask)
    return moments


def eval_backward(
    dy: Any,
    x: Any,
    dx: Any,
    weight: Any,
    grad_weight: Any,
    grad_bias: Any,
    statistics: Any,
    kernels: Any,
    mask: Any = None,
) -> None:
    """Differentiates eval_forward: as backward, but mean and invstd are constants, and nothing is sent."""
    kernels.backward_reduce(dy, x, statistics, weight, None, grad_weight, grad_bias, mask=mask)
    no_sums = kernels.backward_reduce(dy[:0], x[:0], statistics, weight, None)
    kernels.backward_elemt(dy, x, statistics, weight, None, no_sums, dx, mask=mask)


def refuse(error: Exception, message: Any, comm: Any, label: Label | None = None) -> NoReturn:
    """Raises an error that this rank alone may have, after telling the others that it will not send its statistics.

    Forward's check of the count then raises on them too, on accelerators at a later call; backward, which sends no
    count, gives them gradients of NaN.

    Args:
        error: what is raised; that of a wrong argument says which rank it is.
        message: a float64 array as long as what the other ranks send, or None where that is not known.
        comm: the communicator.
        label: which layer's call this is, for the communicator, or None.

    Collective:
        the first all_reduce of forward, or that of backward.
    """
    if type(error) in (TypeError, ValueError):
        error = type(error)(f"{rank_prefix(comm)}{error}")
    if message is not None:
        message[...] = float("nan")
        if label is not None:
            label.know(REFUSED)
        try:
            all_reduce(message, label, comm)
        except (
            RuntimeError
        ) as other:  # the ranks' layers differ, too, or one has gone: this rank's own error comes first
            raise error from other
        finally:
            if label is not None:
                label.know(None)
    raise error from None


def rank_prefix(comm: Any) -> str:
    """Returns environment.rank_prefix for the ranks of comm."""
    return environment.rank_prefix(comm.rank, comm.world_size)


def all_reduce(buffer: Any, label: Label | None, comm: Any) -> None:
    """Sums buffer over the ranks. Communicators of users' own may take no label."""
    if label is None:
        comm.all_reduce(buffer)
    else:
        comm.all_reduce(buffer, label=label)


class _Ranks(NamedTuple):
    """What is needed of a communicator for a message, without the group."""

    rank: int
    world_size: int


def _check_later(moments: Any, comm: Any, is_float64: bool = False) -> None:
    """Lets deferred check the count of moments of all ranks, (2c + 1,), on an accelerator."""
    ranks = _Ranks(comm.rank, comm.world_size)
    deferred.watch(moments[-1:], partial(check_count, comm=ranks, is_float64=is_float64))


def check_count(count: float, comm: Any, is_float64: bool = False) -> None:
    """Raises, on all ranks alike, the error that a message's count tells of.

    Args:
        count: the sum of the ranks' counts.
        comm: the communicator.
        is_float64: whether it is that of the first message of float64 input, with marks.
    """
    if not (is_float64 or is_refused(count)):
        return
    marks, elements = math.modf(count)
    if elements != elements:
        raise RuntimeError(
            f"{rank_prefix(comm)}expected statistics from every rank; another rank refused its input and raised an "
            "error: see that rank's message. The running statistics are untouched"
        )
    if marks != is_float64 * _FLOAT64_MARK * comm.world_size:
        raise RuntimeError(
            f"{rank_prefix(comm)}expected float64 input on every rank or on none; got it on {marks / _FLOAT64_MARK:g} "
            f"of {comm.world_size}, and here {'also' if is_float64 else 'not'}: give all ranks, empty ones too, "
            "one dtype; or a rank has failed between its two messages, see what it says"
        )
    if elements == 1:
        raise ValueError(
            f"{rank_prefix(comm)}expected more than 1 value per channel when training, over all ranks together; "
            "got 1: use larger batches or inputs, or eval mode"
        )
    if is_refused(elements):
        raise RuntimeError(
            f"{rank_prefix(comm)}expected the ranks' counts to sum to a number of elements; got {elements:g}: see that "
            "the communicator sums correctly"
        )
