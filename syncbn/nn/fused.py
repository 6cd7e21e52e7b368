"""The layer in eager mode on CPUs: one call of C++ forward, and one backward. See kernels/fused.py.

What the operators decline, another floating dtype or a gradient with gaps, say, goes the general way of eager.py. Each
line here runs at every call of every layer, where the arithmetic of a small layer takes 5 microseconds.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel as _Ddp

from ..comm import Group
from ..core import NOTHING, Running
from ..kernels import PLAIN, Epilogue
from ..kernels.fused import NONE, activation_of, fused
from .autograd import BatchStatsNorm
from .checks import channels_of, is_within_join
from .differentiable import fill
from .direct import backward_in_one_call, dense_mask, forward_in_one_call
from .eager import EagerCall
from .recomputation import is_recomputing
from .recomputation import local as _recordings

_fused: Any = fused()
_TYPES = (Tensor, torch.nn.Parameter, type(None))
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms, _is_batched = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_legacy_batchedtensor
_graph_task, _saved_hooks = torch._C._current_graph_task_id, torch._C._autograd._top_saved_tensors_default_hooks
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


class _Declined(Exception):  # noqa: N818  # it is no error
    pass


def normalise(
    input: Tensor,
    num_features: int,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Group,
    epilogue: Epilogue,
    residual: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """Normalises as dispatch.batch_stats_norm, or returns None where that is for the general way.

    Arguments are not checked: what does not fit is declined before anything is sent.
    """
    if (
        _fused is None
        or type(input) is not Tensor
        or not input.is_cpu
        or type(weight) not in _TYPES
        or type(bias) not in _TYPES
        or type(residual) not in _TYPES
        or type(mask) not in _TYPES
        or _modes()
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or input.is_inference()
        or ((_graph_task() != -1 or _saved_hooks(True) is not None) and is_recomputing())
        or _recordings.contexts
        or (_Ddp._active_ddp_module is not None and is_within_join())
    ):
        return None
    if momentum is None:
        momentum = Running.of(mean, var, batches, None).momentum
    code = 0 if epilogue is PLAIN else activation_of(epilogue)
    if code is None or type(momentum) is not float or type(eps) is not float or not (eps > 0 and isfinite(momentum)):
        return None
    if residual is not None and residual.is_inference():
        return None
    if weight is None and bias is None and mean is None and channels_of(input) != num_features:
        return None
    valid = dense_mask(mask, input)
    if valid is None:
        return None
    comm, has_residual = group.communicator(), residual is not None
    bias_dtype = None if bias is None else bias.dtype
    rest = mean, var, batches, momentum, eps, code, epilogue, comm, has_residual, bias_dtype, group, num_features
    try:
        return _apply(input, weight, bias, residual, rest, valid)  # type: ignore[no-any-return]
    except _Declined:
        return None


class _FusedNorm(torch.autograd.Function):
    """As autograd.BatchStatsNorm; it saves the same."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Any, ...],
        valid: Tensor,
    ) -> Tensor:
        mean, var, batches, momentum, eps, activation, epilogue, comm, *_ = rest
        found = forward_in_one_call(
            _fused, comm, input, weight, bias, residual, valid, mean, var, batches, momentum, eps, activation,
            epilogue.slope, rest[-2].labels,
        )  # fmt: skip
        if found is None:
            raise _Declined
        y, statistics = found
        mask = None if valid is NONE else valid
        if activation == 0:
            ctx.save_for_backward(input, weight, None, None, statistics, mask)
        else:
            gate = None if residual is None else residual if epilogue.activation == "silu" else y
            ctx.save_for_backward(input, weight, bias, gate, statistics, mask)
        ctx.set_materialize_grads(False)
        ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if (
            type(grad_output) is not Tensor
            or _is_grad_enabled()
            or _transforms() is not None
            or _is_batched(grad_output)
            or _is_compiling()
        ):
            return _general_backward(ctx, grad_output, None)
        *_, activation, epilogue, comm, has_residual, bias_dtype, group, _ = ctx.rest
        try:
            saved = ctx.saved_tensors
        except Exception:  # one was modified in place: the general way tells the other ranks, too
            return _general_backward(ctx, grad_output, None)
        if bias_dtype is not None and bias_dtype is not torch.float32:
            return _general_backward(ctx, grad_output, saved)
        input, weight, bias, gate, statistics, mask = saved
        found = backward_in_one_call(
            _fused, comm, grad_output, input, weight, bias, gate, NONE if mask is None else mask, statistics,
            bias_dtype is not None, activation, epilogue.slope, group.labels,
        )  # fmt: skip
        if found is None:
            return _general_backward(ctx, grad_output, saved)
        dx, grad_weight, grad_bias, g = found
        return (
            dx,
            None if weight is None else grad_weight,
            None if bias_dtype is None else grad_bias,
            (fill(grad_output, mask) if gate is None else g) if has_residual else None,
            None,
            None,
        )


class _Context:
    """What backward needs of autograd's context, whose saved tensors torch.utils.checkpoint lets unpack once only."""

    def __init__(self, saved: tuple[Tensor | None, ...]) -> None:
        self.saved_tensors = saved


def _general_backward(
    ctx: Any, grad_output: Tensor | None, saved: tuple[Tensor | None, ...] | None
) -> tuple[Tensor | None, ...]:
    context: Any = ctx if saved is None else _Context(saved)
    *_, eps, _, epilogue, comm, has_residual, bias_dtype, group, num_features = ctx.rest
    context.call = EagerCall(num_features, NOTHING, eps, group, epilogue)
    context.call.comm = comm  # that of forward
    context.has_residual, context.bias_dtype = has_residual, bias_dtype
    gradients: tuple[Tensor | None, ...] = BatchStatsNorm.backward(context, grad_output)
    return gradients


# Without the look for torch.func of Function.apply, which normalise has had.
_apply: Any = super(torch.autograd.Function, _FusedNorm).apply
