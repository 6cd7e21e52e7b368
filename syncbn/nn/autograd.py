"""Normalisation by the statistics of the batch, bound to autograd."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import PLAIN
from . import differentiable

_functorch: Any = torch._C._functorch


class Call(differentiable.Call, Protocol):
    """One call of a layer: how it is computed, with all that is no differentiable tensor.

    eager.EagerCall goes straight to the kernels; operators.TracedCall through operators that torch can see.
    """

    def traced(self) -> Call:
        """Returns this call by way of operators."""

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the result, in place the input, and the statistics. See core.forward."""

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of input, weight, bias and residual, and None twice. See core.backward."""


class BatchStatsNorm(torch.autograd.Function):
    """Normalisation by the statistics of the batch of all ranks: activation(normalised + residual)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        mask: Tensor | None = None,
    ) -> Tensor:
        output, statistics = call.forward(input, weight, bias, residual, mask)
        if call.epilogue is PLAIN:
            ctx.save_for_backward(input, weight, None, None, statistics, mask)
        else:
            activation, in_place = call.epilogue.activation, call.epilogue.in_place
            if in_place:
                ctx.mark_dirty(input)
            # What backward needs beside x to tell the activation's derivative. y is of use to others too, and often
            # kept.
            gate = None
            if residual is not None and activation != "none":
                gate = residual if activation == "silu" else output
            kept = bias if activation != "none" or in_place else None
            ctx.save_for_backward(input, weight, kept, gate, statistics, mask)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.has_residual = call, residual is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if torch.compiler.is_compiling():  # compiled autograd traces this
            return call.traced().backward(ctx, grad_output)
        if torch.is_grad_enabled() or is_transformed(grad_output):
            return _differentiable_backward(ctx, grad_output)
        return call.backward(ctx, grad_output)


# Without the look for torch.func of Function.apply, for callers that have looked already.
apply_plain: Any = super(torch.autograd.Function, BatchStatsNorm).apply


def _differentiable_backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    if call.epilogue.in_place:
        raise RuntimeError(
            "expected to differentiate a layer with inplace=True once; got a second derivative asked for (say, by "
            "create_graph=True), which needs the input that was overwritten: set inplace=False"
        )
    input, weight, bias, gate, statistics, mask = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(input)
    if bias is None and ctx.bias_dtype is not None:
        bias = statistics.new_zeros(input.shape[1], dtype=ctx.bias_dtype)
    arguments = grad_output, input, weight, bias, gate, statistics, call, mask
    dx, dw, db, dz = differentiable.backward(*arguments)
    dz_or_none = dz if ctx.has_residual else None
    return dx, None if weight is None else dw, None if bias is None else db, dz_or_none, None, None


def is_transformed(grad_output: Tensor | None) -> bool:
    """Whether functorch computes with several gradients at once, or differentiates."""
    if _functorch.peek_interpreter_stack() is not None:
        return True
    return grad_output is not None and _functorch.is_legacy_batchedtensor(grad_output)
