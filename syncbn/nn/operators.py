"""The operators that torch sees where it traces: torch.compile, torch.export, make_fx, modes, tensor subclasses.

    norm           =  forward, which is reduce -> normalise
    norm_backward  =  backward
    sum_over_ranks =  all_reduce

Those on the left are made of those on the right when a compiler looks at them; `norm` carries autograd. It is made of
reduce and normalise for selective checkpointing, which can then keep what was sent alone (16 C + 8 bytes); else one
operator each way costs a small layer half as much. A group enters a graph as a name, see comm.communicator_named.

The order of messages is a data dependency: what sends takes the result of what sent before it in the same graph, as
`after`, which it does not read. So no compiler may exchange two of them, even where the graphs of two ranks differ (in
batch sizes, say).

What a rank's arguments say is checked when an operator runs, not when it is traced, so that a rank that refuses its
input tells the others. Nothing happens in place here: a layer with inplace=True leaves memory to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from .. import core
from ..arguments import full_mask
from ..comm import Communicator, communicator_named, observed_kernels
from ..core import Running
from ..kernels import Epilogue, select
from . import direct
from .autograd import BatchStatsNorm
from .checks import backward_message, check_forward, check_operator, check_vector, forward_message
from .differentiable import fill
from .outputs import (
    empty_like,
    fake_backward,
    fake_forward,
    fake_normalise,
    fake_reduce,
    gradients,
    no_tensor,
)
from .recomputation import is_recomputing, reduce

_C: Any = torch._C

_SELECTIVE: Any = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

library: Any = torch.library.Library("syncbn", "DEF")  # type: ignore[no-untyped-call]

# An argument of what is made of other operators: torch's caches on disk know a compiled graph by the calls that were
# traced, not by what they were made of. To be raised whenever that changes.
CUT = 3

_ACTIVATION = "str activation, float slope"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
_VECTORS = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_SCHEMAS = (
    f"norm(Tensor x, {_VECTORS}, {_RUNNING}, SymInt num_features, "
    f"float? momentum, float eps, {_ACTIVATION}, str group, str label, int cut) -> Tensor",
    f"forward(Tensor x, {_VECTORS}, {_RUNNING}, Tensor? after, SymInt num_features, "
    f"float? momentum, float eps, {_ACTIVATION}, str group, str label) -> (Tensor, Tensor)",
    f"reduce(Tensor x, {_VECTORS}, Tensor? running_mean, Tensor? running_var, Tensor? after, SymInt num_features, "
    f"float? momentum, float eps, {_ACTIVATION}, str group, str label) -> (Tensor, Tensor)",
    f"normalise(Tensor x, Tensor moments, Tensor center, {_VECTORS}, {_RUNNING}, float? momentum, float eps, "
    f"{_ACTIVATION}, str group) -> (Tensor, Tensor)",
    "backward(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? mask, "
    f"ScalarType? bias_dtype, Tensor? after, {_ACTIVATION}, str group, str label) -> (Tensor, Tensor, Tensor, Tensor)",
    "norm_backward(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? mask, "
    f"ScalarType? bias_dtype, {_ACTIVATION}, str group, str label, int cut) -> (Tensor, Tensor, Tensor, Tensor)",
    "sum_over_ranks(Tensor v, str group) -> Tensor",
    "all_reduce(Tensor v, Tensor? after, str group) -> Tensor",
)
# Any strides will do: inductor would otherwise copy what convolutions return into the layout that was traced.
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

_sent: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # what was sent last, by what records a graph


def in_order(send: Callable[[Tensor | None], Any], which: int = 0) -> Any:
    """Returns send(after), which is recorded after what was sent before in the same graph.

    Args:
        send: calls an operator that sends.
        which: of several results, the number of the one that stands for what was sent; it lives until the next message.
    """
    keys = _C._TorchDispatchModeKey
    recorder = _C._get_dispatch_mode(keys.PROXY) or _C._get_dispatch_mode(keys.FUNCTIONAL)
    if recorder is None:
        return send(None)
    results = send(_sent.get(recorder))
    _sent[recorder] = results if isinstance(results, Tensor) else results[which]
    return results


def _is_selective() -> bool:
    """Whether selective checkpointing looks on, and says for each operator whether its results are kept."""
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


class TracedCall:
    """See autograd.Call. Arguments as eager.EagerCall's; label: of the messages."""

    def __init__(self, running: Running, eps: float, group: str, epilogue: Epilogue, label: str = "") -> None:
        self.running, self.eps, self.group, self.epilogue, self.label = running, eps, group, epilogue, label

    def communicator(self) -> Communicator:
        return communicator_named(self.group)

    def sum_over_ranks(self, v: Tensor) -> Tensor:
        total: Tensor = torch.ops.syncbn.sum_over_ranks.default(v, self.group)
        return total

    def traced(self) -> TracedCall:
        return self

    def norm(
        self,
        input: Tensor,
        num_features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Returns the result, by the operator that carries autograd."""
        running, epilogue = self.running, self.epilogue
        y: Tensor = torch.ops.syncbn.norm.default(
            input, weight, bias, residual, mask, *running[:3], num_features,
            running.momentum, self.eps, epilogue.activation, epilogue.slope, self.group, self.label, CUT,
        )  # fmt: skip
        return y

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """See autograd.Call; also of a forward in eager mode, where compiled autograd traces its backward."""
        input, weight, bias, gate, statistics, mask = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        dx, grad_weight, grad_bias, g = torch.ops.syncbn.norm_backward.default(
            grad_output, input, statistics, weight, bias, gate, mask, ctx.bias_dtype, *self.epilogue[:2], self.group,
            self.label, CUT,
        )  # fmt: skip
        if ctx.has_residual and gate is None:  # else grad_output went through the activation
            g = fill(grad_output, mask)
        grad_weight, grad_bias = None if weight is None else grad_weight, None if ctx.bias_dtype is None else grad_bias
        return dx, grad_weight, grad_bias, g if ctx.has_residual else None, None, None


class _NormCall(TracedCall):
    """A call inside the operator norm."""

    def __init__(self, num_features: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.num_features = num_features

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        vectors = weight, bias, residual, mask
        running, (activation, slope, _) = self.running, self.epilogue
        if not _is_selective():
            found: tuple[Tensor, Tensor] = in_order(
                lambda after: torch.ops.syncbn.forward.default(
                    input, *vectors, *running[:3], after, self.num_features, running.momentum, self.eps, activation,
                    slope, self.group, self.label,
                ),
                which=1,
            )  # fmt: skip
            return found
        moments, center = in_order(
            lambda after: torch.ops.syncbn.reduce.default(
                input, *vectors, *running[:2], after, self.num_features, running.momentum, self.eps, activation, slope,
                self.group, self.label,
            )
        )  # fmt: skip
        y, statistics = torch.ops.syncbn.normalise.default(
            input, moments, center, *vectors, *running, self.eps, activation, slope, self.group
        )
        return y, statistics


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_features: int,
    momentum: float | None,
    eps: float,
    activation: str,
    slope: float,
    group: str,
    label: str,
    cut: int,
) -> Tensor:
    running = Running(running_mean, running_var, num_batches_tracked, momentum)
    epilogue = Epilogue(activation, slope)
    call = _NormCall(num_features, running, eps, group, epilogue, label)
    y: Tensor = BatchStatsNorm.apply(x, weight, bias, residual, call, mask)  # type: ignore[no-untyped-call]
    return y


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias_dtype: torch.dtype | None,
    activation: str,
    slope: float,
    group: str,
    label: str,
    cut: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor] = in_order(
        lambda after: torch.ops.syncbn.backward.default(
            dy, x, statistics, weight, bias, gate, mask, bias_dtype, after, activation, slope, group, label
        ),
        which=1,
    )
    return found


def _sum_over_ranks(v: Tensor, group: str) -> Tensor:
    total: Tensor = in_order(lambda after: torch.ops.syncbn.all_reduce.default(v, after, group))
    return total


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    after: Tensor | None,
    num_features: int,
    momentum: float | None,
    eps: float,
    activation: str,
    slope: float,
    group: str,
    label: str,
) -> tuple[Tensor, Tensor]:
    moments, center = _reduce(
        x, weight, bias, residual, mask, running_mean, running_var, after, num_features, momentum, eps, activation,
        slope, group, label,
    )  # fmt: skip
    return _normalise(
        x, moments, center, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked, momentum, eps,
        activation, slope, group,
    )  # fmt: skip


def _reduce(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    after: Tensor | None,
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
    try:
        check_forward(x, num_features, running, weight, bias, eps, Epilogue(activation, slope), residual)
        kernels, mask = observed_kernels(select(x), comm), full_mask(mask, x)
    except Exception as error:
        core.refuse(error, forward_message(x, num_features, weight, bias, running), comm)
    moments, center = reduce(x, kernels, comm, mask)
    return moments, no_tensor(x, torch.float64) if center is None else center


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
    check_operator(x, weight, bias, epilogue, running, eps, {"residual": residual})
    check_vector("moments", moments, 2 * x.shape[1] + 1, x.device)
    check_vector("center", center, x.shape[1] if center.numel() else 0, x.device)
    y, comm, mask = empty_like(x), communicator_named(group), full_mask(mask, x)
    core.normalise(
        x, y, weight, bias, running, eps, observed_kernels(select(x), comm), comm, statistics,
        center if center.numel() else None, epilogue, residual, mask,
    )  # fmt: skip
    return y, statistics


def _backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    bias_dtype: torch.dtype | None,
    after: Tensor | None,
    activation: str,
    slope: float,
    group: str,
    label: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    comm, epilogue = communicator_named(group), Epilogue(activation, slope)
    try:
        check_operator(x, weight, bias, epilogue, alike={"a gradient": dy, "gate": gate})
        check_vector("statistics", statistics, 2 * x.shape[1] + 1, x.device)
        mask = full_mask(mask, x)
        if bias_dtype is not None and not bias_dtype.is_floating_point:
            raise TypeError(f"expected bias_dtype to be a floating dtype; got {bias_dtype}: pass that of the bias")
    except Exception as error:
        core.refuse(error, backward_message(statistics.numel() // 2, statistics), comm)
    dx = empty_like(x)
    grad_weight, grad_bias, g = gradients(x, weight, bias_dtype, gate)
    core.backward(
        dy, x, dx, weight, bias, None if weight is None else grad_weight, None if bias_dtype is None else grad_bias,
        statistics, observed_kernels(select(x), comm), comm, epilogue, gate, None if gate is None else g, mask,
    )  # fmt: skip
    return dx, grad_weight, grad_bias, g


def _all_reduce(v: Tensor, after: Tensor | None, group: str) -> Tensor:
    comm = communicator_named(group)
    try:
        check_vector("v", v, v.numel(), v.device)
    except Exception as error:
        core.refuse(error, torch.empty(v.numel(), dtype=torch.float64, device=v.device), comm)
    total = v.clone()
    comm.all_reduce(total)
    return total


def below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an implementation where autograd does not look at what it calls, and leaves no hooks on its arguments."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        with _C._AutoDispatchBelowAutograd():
            return implementation(*arguments)

    return run


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "forward": (_forward, fake_forward),
    "reduce": (_reduce, fake_reduce),
    "normalise": (_normalise, fake_normalise),
    "backward": (_backward, fake_backward),
    "all_reduce": (_all_reduce, lambda v, *_: torch.empty_like(v)),
}
for _name, _composite in {"norm": _norm, "norm_backward": _norm_backward, "sum_over_ranks": _sum_over_ranks}.items():
    library.impl(_name, _composite, "CompositeImplicitAutograd")
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    library.impl(_name, below_autograd(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _fake, lib=library)
direct.install()
