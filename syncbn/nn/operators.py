"""The operators that torch sees where it traces: torch.compile, torch.export, make_fx, modes, tensor subclasses.

    norm   =  reduce -> normalise        and backward  backward_reduce -> backward_elemt

`norm` carries autograd; the other four compute and send. A group enters a graph as a name, see comm.communicator_named.

The order of messages is a data dependency: `reduce` and `backward_reduce` change the tensor `order`, one a device and
direction for all groups, so that no compiler may exchange two of them, nor leave one out, even where the graphs of two
ranks differ (in batch sizes, say).

What a rank's arguments say is checked when an operator runs, not when it is traced, so that a rank that refuses its
input tells the others. Nothing happens in place here: a layer with inplace=True leaves memory to the compiler.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import core
from ..comm import Communicator, communicator_named
from ..core import Running
from ..kernels import Epilogue, fused, select
from .autograd import BatchStatsNorm
from .checks import backward_message, check_forward, check_memory, forward_message
from .recomputation import is_recomputing, reduce
from .recomputation import local as recordings

library: Any = torch.library.Library("syncbn", "DEF")  # type: ignore[no-untyped-call]

_ACTIVATION = "str activation, float slope"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
_VECTORS = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_SCHEMAS = (
    f"norm(Tensor x, {_VECTORS}, {_RUNNING}, Tensor(d!) order, Tensor(e!) backward_order, SymInt num_features, "
    f"float? momentum, float eps, {_ACTIVATION}, str group, str label) -> Tensor",
    f"reduce(Tensor x, {_VECTORS}, Tensor? running_mean, Tensor? running_var, Tensor(a!) order, SymInt num_features, "
    f"float? momentum, float eps, {_ACTIVATION}, str group, str label) -> (Tensor, Tensor)",
    f"normalise(Tensor x, Tensor moments, Tensor center, {_VECTORS}, {_RUNNING}, float? momentum, float eps, "
    f"{_ACTIVATION}, str group) -> (Tensor, Tensor)",
    "backward_reduce(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? mask, "
    f"ScalarType? bias_dtype, Tensor(a!) order, {_ACTIVATION}, str group, str label) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "backward_elemt(Tensor dy, Tensor x, Tensor statistics, Tensor sums, Tensor? weight, Tensor? bias, Tensor? mask, "
    f"{_ACTIVATION}) -> Tensor",
    "sum_over_ranks(Tensor v, Tensor(a!) order, str group) -> Tensor",
)
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_orders: dict[torch.device, tuple[Tensor, Tensor]] = {}


def order_tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the tensors that order the messages of a device, forward and backward."""
    if device not in _orders:
        _orders[device] = tuple(torch.zeros((), dtype=torch.int32, device=device) for _ in range(2))  # type: ignore[assignment]
    return _orders[device]


order_tensors(torch.device("cpu"))  # made before anything is traced, for one made in a graph would be that graph's own


def _order_tensors_for(input: Tensor) -> tuple[Tensor, Tensor]:
    is_exported = torch.compiler.is_exporting()
    if not is_exported and (torch.compiler.is_compiling() or not isinstance(input, FakeTensor)):
        return order_tensors(input.device)
    # torch.export and make_fx take no tensors from outside; their graphs run in the order in which they were recorded.
    return input.new_zeros((), dtype=torch.int32), input.new_zeros((), dtype=torch.int32)


class TracedCall:
    """See autograd.Call. Arguments as eager.EagerCall's; label: of the messages."""

    def __init__(self, running: Running, eps: float, group: str, epilogue: Epilogue, label: str = "") -> None:
        self.running, self.eps, self.group, self.epilogue, self.label = running, eps, group, epilogue, label

    def communicator(self) -> Communicator:
        return communicator_named(self.group)

    def sum_over_ranks(self, v: Tensor) -> Tensor:
        total: Tensor = torch.ops.syncbn.sum_over_ranks.default(v, order_tensors(v.device)[1], self.group)
        return total

    def traced(self) -> TracedCall:
        return self

    def norm(
        self, input: Tensor, num_features: int, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Returns the result, by the operator that carries autograd."""
        running, epilogue = self.running, self.epilogue
        y: Tensor = torch.ops.syncbn.norm.default(
            input, weight, bias, residual, None, *running[:3], *_order_tensors_for(input), num_features,
            running.momentum, self.eps, epilogue.activation, epilogue.slope, self.group, self.label,
        )  # fmt: skip
        return y

    def _backward_order(self, device: torch.device) -> Tensor:
        return order_tensors(device)[1]

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """See autograd.Call; also of a forward in eager mode, where compiled autograd traces its backward."""
        input, weight, bias, gate, statistics = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        activation, slope, _ = self.epilogue
        sums, grad_weight, grad_bias, g = torch.ops.syncbn.backward_reduce.default(
            grad_output, input, statistics, weight, bias, gate, None, ctx.bias_dtype,
            self._backward_order(input.device), activation, slope, self.group, self.label,
        )  # fmt: skip
        if gate is not None:  # grad_output went through the activation already
            grad_output, activation, slope = g, "none", 0.0
        dx = torch.ops.syncbn.backward_elemt.default(
            grad_output, input, statistics, sums, weight, bias, None, activation, slope
        )
        return (
            dx,
            None if weight is None else grad_weight,
            None if ctx.bias_dtype is None else grad_bias,
            grad_output if ctx.has_residual else None,
            None,
        )


class _NormCall(TracedCall):
    """A call inside the operator norm."""

    def __init__(self, order: Tensor, backward_order: Tensor, num_features: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.order, self.backward_order, self.num_features = order, backward_order, num_features

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        vectors = weight, bias, residual, None
        running, (activation, slope, _) = self.running, self.epilogue
        moments, center = torch.ops.syncbn.reduce.default(
            input, *vectors, *running[:2], self.order, self.num_features, running.momentum, self.eps, activation, slope,
            self.group, self.label,
        )  # fmt: skip
        y, statistics = torch.ops.syncbn.normalise.default(
            input, moments, center, *vectors, *running, self.eps, activation, slope, self.group
        )
        return y, statistics

    def _backward_order(self, device: torch.device) -> Tensor:
        return self.backward_order


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    order: Tensor,
    backward_order: Tensor,
    num_features: int,
    momentum: float | None,
    eps: float,
    activation: str,
    slope: float,
    group: str,
    label: str,
) -> Tensor:
    running = Running(running_mean, running_var, num_batches_tracked, momentum)
    epilogue = Epilogue(activation, slope)
    call = _NormCall(order, backward_order, num_features, running, eps, group, epilogue, label)
    y: Tensor = BatchStatsNorm.apply(x, weight, bias, residual, call)  # type: ignore[no-untyped-call]
    return y


def _reduce(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    order: Tensor,
    num_features: int,
    momentum: float | None,
    eps: float,
    activation: str,
    slope: float,
    group: str,
    label: str,
) -> tuple[Tensor, Tensor]:
    comm = communicator_named(group)
    running = Running(running_mean, running_var, None, 0.0 if momentum is None else momentum)
    epilogue = Epilogue(activation, slope)
    if mask is None and eps > 0 and isfinite(running.momentum) and not recordings.contexts:
        moments = fused.stats(x, weight, bias, residual, running_mean, running_var, epilogue)
        if moments is not None and x.shape[1] == (num_features or x.shape[1]):
            comm.all_reduce(moments)
            return moments, _no_tensor(x, torch.float64)
    try:
        check_forward(x, num_features, running, weight, bias, eps, epilogue, residual)
        kernels = select(x)
    except Exception as error:
        core.refuse(error, forward_message(x, num_features, weight, bias, running), comm)
    moments, center = reduce(x, kernels, comm, mask)
    return moments, _no_tensor(x, torch.float64) if center is None else center


def _normalise(
    x: Tensor,
    moments: Tensor,
    center: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    slope: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    running, epilogue, statistics = core.NOTHING, Epilogue(activation, slope), moments.clone()
    if not is_recomputing():
        running = Running.of(running_mean, running_var, num_batches_tracked, momentum)
    if mask is None and not center.numel():
        done = fused.normalise(x, statistics, weight, bias, residual, running, eps, epilogue)
        if done is not None:
            y, _, count = done
            core.check_count(count, communicator_named(group))
            return y, statistics
    y = _empty_like(x)
    core.normalise(
        x, y, weight, bias, running, eps, select(x), communicator_named(group), statistics,
        center if center.numel() else None, epilogue, residual, mask,
    )  # fmt: skip
    return y, statistics


def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias_dtype: torch.dtype | None,
    order: Tensor,
    activation: str,
    slope: float,
    group: str,
    label: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    comm = communicator_named(group)
    try:
        check_memory("a gradient", dy)
    except Exception as error:
        core.refuse(error, backward_message(x.shape[1], x), comm)
    if mask is None and bias_dtype in (None, torch.float32):
        done = fused.backward_reduce(
            dy, x, statistics, weight, bias, gate, bias_dtype is not None, Epilogue(activation, slope)
        )
        if done is not None:
            comm.all_reduce(done[0])
            exist = weight is not None, bias_dtype is not None, gate is not None
            gradients = (v if is_there else _no_tensor(x, x.dtype) for v, is_there in zip(done[1:], exist, strict=True))
            return done[0], *gradients  # type: ignore[return-value]
    grad_weight, grad_bias, g = _gradients(x, weight, bias_dtype, gate)
    sums = core.backward_reduce(
        dy, x, weight, bias, None if weight is None else grad_weight, None if bias_dtype is None else grad_bias,
        statistics, select(x), comm, Epilogue(activation, slope), gate, None if gate is None else g, mask,
    )  # fmt: skip
    return sums, grad_weight, grad_bias, g


def _backward_elemt(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor:
    if mask is None:
        done = fused.backward_elemt(dy, x, statistics, sums, weight, bias, Epilogue(activation, slope))
        if done is not None:
            return done
    dx = _empty_like(x)
    select(x).backward_elemt(dy, x, statistics, weight, bias, sums, dx, Epilogue(activation, slope), mask)
    return dx


def _sum_over_ranks(v: Tensor, order: Tensor, group: str) -> Tensor:
    total = v.clone()
    communicator_named(group).all_reduce(total)
    return total


def _fake_reduce(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    center = x.new_empty(c if x.dtype == torch.float64 else 0, dtype=torch.float64)
    return x.new_empty(2 * c + 1, dtype=torch.float64), center


def _fake_normalise(x: Tensor, moments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(x), torch.empty_like(moments)


def _fake_backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias_dtype: torch.dtype | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(2 * x.shape[1], dtype=torch.float64), *_gradients(x, weight, bias_dtype, gate)


def _fake_backward_elemt(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _empty_like(x)


def _gradients(
    x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors for the gradients of weight, bias and residual; of what is not needed, without elements."""
    c = x.shape[1]
    return (
        _no_tensor(x, x.dtype) if weight is None else weight.new_empty(c),
        _no_tensor(x, x.dtype) if bias_dtype is None else x.new_empty(c, dtype=bias_dtype),
        _no_tensor(x, x.dtype) if gate is None else _empty_like(x),
    )


def _no_tensor(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of no elements, for operators return no None."""
    return like.new_empty(0, dtype=dtype)


def _empty_like(x: Tensor) -> Tensor:
    """Returns a dense tensor in the memory format of x, of any kind (fakes with symbolic sizes, too)."""
    channels_last = x.dim() > 2 and not x.is_contiguous() and x.stride(1) == 1
    if not channels_last:
        return x.new_empty(x.shape)
    n, c, *spatial = x.shape
    return x.new_empty([n, *spatial, c]).movedim(-1, 1)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "reduce": (_reduce, _fake_reduce),
    "normalise": (_normalise, _fake_normalise),
    "backward_reduce": (_backward_reduce, _fake_backward_reduce),
    "backward_elemt": (_backward_elemt, _fake_backward_elemt),
    "sum_over_ranks": (_sum_over_ranks, lambda v, *_: torch.empty_like(v)),
}
library.impl("norm", _norm, "CompositeImplicitAutograd")
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _fake, lib=library)
