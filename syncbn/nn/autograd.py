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
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the result, in place the input, and the statistics. See core.forward."""

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of input, weight, bias and residual, and None. See core.backward."""


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
    ) -> Tensor:
        output, statistics = call.forward(input, weight, bias, residual)
        if call.epilogue is PLAIN:
            ctx.save_for_backward(input, weight, None, None, statistics)
        else:
            activation, in_place = call.epilogue.activation, call.epilogue.in_place
            if in_place:
                ctx.mark_dirty(input)
            # What backward needs beside x to tell the activation's derivative. y is of use to others too, and often
            # kept.
            gate = None
            if residual is not None and activation != "none":
                gate = residual if activation == "silu" else output
            ctx.save_for_backward(input, weight, bias if activation != "none" or in_place else None, gate, statistics)
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
    input, weight, bias, gate, statistics = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(input)
    if bias is None and ctx.bias_dtype is not None:
        bias = statistics.new_zeros(input.shape[1], dtype=ctx.bias_dtype)
    found: tuple[Tensor, ...] = differentiable.backward(grad_output, input, weight, bias, gate, statistics, call)
    dx, dw, db, dz = found
    return dx, None if weight is None else dw, None if bias is None else db, dz if ctx.has_residual else None, None


def is_transformed(grad_output: Tensor | None) -> bool:
    """Whether functorch computes with several gradients at once, or differentiates."""
    if _functorch.peek_interpreter_stack() is not None:
        return True
    return grad_output is not None and _functorch.is_legacy_batchedtensor(grad_output)
