"""The operators as compiled code calls them: with plain CPU tensors straight to C++, in place of Python once more.

Code that torch.compile made calls `torch.ops.syncbn.forward.default(...)`. That object calls the builtin in its
attribute _op, which finds the operator's implementation, in Python; for a small layer this takes longer than the
arithmetic. `install` makes _op a function that first tries the operators of kernels/fused.py, which are C++. All else
is for the builtin, and so for operators.py: what C++ declines, what is wrong with the arguments, and tensors that
something in torch looks at (modes, fakes, transforms, subclasses). Calls that do not come from Python all go there.

Both ways give the same bits and send the same messages. See nn/fused.py for eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..arguments import full_mask
from ..comm import (
    Communicator,
    Labels,
    LocalCommunicator,
    communicator_named,
    counted,
    direct_sums_of,
    know,
    observed_kernels,
)
from ..core import Running
from ..kernels import Epilogue
from ..kernels.fused import ALONE, BY_CALLER, DECLINED, NONE, UNSENT, activation_of, fused
from .checks import channels_of
from .recomputation import is_recomputing
from .recomputation import local as _recordings

_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms, _is_grad_enabled = torch._C._functorch.peek_interpreter_stack, torch.is_grad_enabled

# What backward returns for the gradients of weight, bias and residual where there are none: three, for results of one
# call must not be the same tensor. Without elements nobody can tell them from new ones.
_NO_GRADIENT = {
    dtype: [torch.empty(0, dtype=dtype, device="cpu") for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@lru_cache(maxsize=256)
def _number_of(activation: str, slope: float) -> int | None:
    """Returns the number that C++ has for an activation, or None."""
    return activation_of(Epilogue(activation, slope))


def _types_fit(first: Any, *others: Any) -> bool:
    """Whether these are the types of tensors that have no code of their own; but for the first, or of None."""
    plain = Tensor, torch.nn.Parameter
    return first in plain and all(other in (*plain, type(None)) for other in others)


_are_tensors: Any = lru_cache(maxsize=4096)(_types_fit)


def _is_observed() -> bool:
    """Whether something in torch looks at calls of operators, autograd included: compiled code runs without it."""
    return _is_grad_enabled() or _modes() > 0 or _transforms() is not None or _tracing() is not None


def _forward(general: Any, of: Any) -> Any:
    def forward(
        x: Any, weight: Any, bias: Any, residual: Any, mask: Any, running_mean: Any, running_var: Any,
        num_batches_tracked: Any, after: Any, num_features: Any, momentum: Any, eps: Any, activation: Any, slope: Any,
        group: Any, label: Any,
    ) -> Any:  # fmt: skip
        code = _number_of(activation, slope)
        mean, var, batches = running_mean, running_var, num_batches_tracked
        if (
            code is not None
            and eps > 0
            and _are_tensors(
                type(x), type(weight), type(bias), type(residual), type(mean), type(var), type(batches), type(mask)
            )
            and not _is_observed()
            and not _recordings.contexts
            and (weight is not None or bias is not None or mean is not None or channels_of(x) == num_features)
        ):
            if is_recomputing():
                mean = var = batches = None
            factor = momentum if momentum is not None else Running.of(mean, var, batches, None).momentum
            if isfinite(factor) and (valid := dense_mask(mask, x)) is not None:
                comm = communicator_named(group)
                found = forward_in_one_call(
                    of, comm, x, weight, bias, residual, valid, mean, var, batches, factor, eps, code, slope
                )
                if found is not None:
                    return found
        return general(
            x, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, after, num_features,
            momentum, eps, activation, slope, group, label,
        )  # fmt: skip

    return forward


def _backward(general: Any, of: Any) -> Any:
    def backward(
        dy: Any, x: Any, statistics: Any, weight: Any, bias: Any, gate: Any, mask: Any, bias_dtype: Any, after: Any,
        activation: Any, slope: Any, group: Any, label: Any,
    ) -> Any:  # fmt: skip
        code = _number_of(activation, slope)
        if (
            code is not None
            and (bias_dtype is None or bias_dtype is torch.float32)
            and _are_tensors(type(x), type(dy), type(weight), type(bias), type(gate), type(statistics), type(mask))
            and not _is_observed()
            and (valid := dense_mask(mask, x)) is not None
        ):
            comm = communicator_named(group)
            found = backward_in_one_call(
                of, comm, dy, x, weight, bias, gate, valid, statistics, bias_dtype is not None, code, slope
            )
            if found is not None:
                dx, grad_weight, grad_bias, g = found
                no_weight, no_bias, no_g = _NO_GRADIENT[x.dtype]
                return (
                    dx,
                    no_weight if weight is None else grad_weight,
                    no_bias if bias_dtype is None else grad_bias,
                    no_g if gate is None else g,
                )
        return general(
            dy, x, statistics, weight, bias, gate, mask, bias_dtype, after, activation, slope, group, label
        )  # fmt: skip

    return backward


def dense_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns a mask of x as the operators in C++ take it, NONE for None; None for one that does not fit."""
    if mask is None:
        return NONE
    try:
        full: Tensor = full_mask(mask, x)
    except (TypeError, ValueError):  # the general way meets it again, and tells the other ranks
        return None
    return full.contiguous()


def forward_in_one_call(
    of: Any,
    comm: Communicator,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    slope: float,
    labels: Labels | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Returns y and the statistics, or None if C++ declined, before anything was sent.

    Args:
        of: kernels.fused.Fused.
        comm: over which the moments go, in the same call where it shares memory.
        x, ..., slope: as that operator takes them, or None; the mask as dense_mask returns it.
        labels: of the layer, or None.

    Collective, Raises: as core.forward, unless declined.
    """
    tensors = (
        x,
        NONE if weight is None else weight,
        NONE if bias is None else bias,
        NONE if residual is None else residual,
        mask,
        NONE if mean is None else mean,
        NONE if var is None else var,
        NONE if batches is None else batches,
    )
    label = labels and labels.forward
    try:
        if type(comm) is LocalCommunicator:
            y, statistics, count = of.forward(*tensors, NONE, momentum, eps, activation, slope, ALONE)
        elif direct := direct_sums_of(comm):
            know(label, x, eps, momentum, mean, weight, bias)
            with direct.direct(label, label.call + 1 if label else -1) as address:
                y, statistics, count = of.forward(*tensors, NONE, momentum, eps, activation, slope, address)
                if label is not None and count != DECLINED:
                    label.call += 1  # as counted does
                if count == UNSENT:
                    direct.go_on(statistics, label)
        else:
            of = observed_kernels(of, comm)
            y, statistics, count = of.forward(*tensors, NONE, momentum, eps, activation, slope, BY_CALLER)
            if count == UNSENT:
                know(label, x, eps, momentum, mean, weight, bias)
                core.all_reduce(statistics, counted(label, comm), comm)
    except NotImplementedError:  # torch's, for devices and layouts without such an operator
        return None
    if count == DECLINED:
        return None
    if count == UNSENT:
        y, statistics, count = of.forward(*tensors, statistics, momentum, eps, activation, slope, ALONE)
    if not (count > 1 and count.is_integer()):
        core.check_count(count, comm)
    return y, statistics


def backward_in_one_call(
    of: Any,
    comm: Communicator,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor,
    statistics: Tensor,
    has_bias: bool,
    activation: int,
    slope: float,
    labels: Labels | None = None,
) -> Any:
    """Returns dx and the gradients of weight, bias and residual, any tensor for what there is not; None if declined.

    Args:
        of: kernels.fused.Fused.
        comm: over which the sums go, in the same call where it shares memory.
        dy, x, ..., slope: as that operator takes them, or None; the mask as dense_mask returns it.
        labels: of the layer, or None.

    Collective:
        as core.backward, unless declined.
    """
    w, b = NONE if weight is None else weight, NONE if bias is None else bias
    tensors = dy, x, w, b, NONE if gate is None else gate, mask, statistics, NONE
    options = has_bias, activation, slope
    try:
        if type(comm) is LocalCommunicator:
            found = of.backward(*tensors, *options, ALONE)
        elif direct := direct_sums_of(comm):
            label = labels and labels.backward
            with direct.direct(label, label.call + 1 if label else -1) as address:
                found = of.backward(*tensors, *options, address)
                if label is not None and found[4] != DECLINED:
                    label.call += 1
                if found[4] == UNSENT:
                    direct.go_on(found[0], label)
        else:
            of = observed_kernels(of, comm)
            found = of.backward(*tensors, *options, BY_CALLER)
            if found[4] == UNSENT:
                core.all_reduce(found[0], counted(labels and labels.backward, comm), comm)
    except NotImplementedError:  # torch's, of a layout that the operator does not take
        return None
    dx, grad_weight, grad_bias, g, state = found
    if state == DECLINED:
        return None
    if state == UNSENT:  # dx are the sums. dy went through the activation already if there is a gate.
        if gate is not None:
            dy, activation, slope = g, 0, 0.0
        dx = of.backward(dy, x, w, b, NONE, mask, statistics, dx, has_bias, activation, slope, ALONE)[0]
    return dx, grad_weight, grad_bias, g


_QUICK: dict[str, Callable[[Any, Any], Any]] = {"forward": _forward, "backward": _backward}


def install() -> None:
    """Makes calls of the operators from Python direct, where there are operators in C++."""
    of = fused()
    if of is None:
        return
    for name, quick in _QUICK.items():
        overload: Any = getattr(torch.ops.syncbn, name).default
        overload._op = quick(overload._op, of)
