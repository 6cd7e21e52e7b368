"""One call of a layer in eager mode: straight to the kernels, past torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import core
from ..comm import Communicator, Group
from ..core import Running
from ..kernels import Epilogue, empty, select
from ..layout import layout_of
from .checks import backward_message, check_memory
from .operators import TracedCall
from .recomputation import is_recomputing, reduce


class EagerCall:
    """See autograd.Call.

    Args:
        running: what is updated.
        eps: added to the variance.
        group: the group.
        epilogue: the activation, and whether the result overwrites the input.
    """

    def __init__(self, running: Running, eps: float, group: Group, epilogue: Epilogue) -> None:
        self.running, self.eps, self.group, self.epilogue = running, eps, group, epilogue
        self.comm = group.communicator()  # that of forward serves backward, too

    def communicator(self) -> Communicator:
        return self.comm

    def sum_over_ranks(self, v: Tensor) -> Tensor:
        total = v.clone()
        self.comm.all_reduce(total)
        return total

    def traced(self) -> TracedCall:
        return TracedCall(self.running, self.eps, self.group.name, self.epilogue)

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        layout, epilogue = layout_of(input), self.epilogue
        self.layout, self.kernels = layout, select(input)
        # In place in memory with gaps, or in that of the negative, the result is copied there.
        in_place = epilogue.in_place and input.stride() == layout.strides and not input.is_neg()
        output = input if in_place else empty(layout, input)
        kernels, comm = self.kernels, self.comm
        moments, center = reduce(input, kernels, comm)
        running = core.NOTHING if is_recomputing() else self.running
        statistics = core.normalise(
            input, output, weight, bias, running, self.eps, kernels, comm, moments, center, epilogue, residual
        )
        if epilogue.in_place and not in_place:
            output = input.copy_(output)
        return output, statistics

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, kernels, comm, epilogue = self.layout, self.kernels, self.comm, self.epilogue
        # The sums are sent whatever this rank needs, for another may need what this one does not.
        try:
            input, weight, bias, gate, statistics = ctx.saved_tensors  # raises where one was modified in place
            if grad_output is None or grad_output._is_zerotensor():
                grad_output = torch.zeros_like(input)
            check_memory("a gradient", grad_output)
        except Exception as error:
            core.refuse(error, backward_message(layout.shape[1], grad_output), comm)
        dx = empty(layout, input)
        c, one = (layout.shape[1],), (1,)
        grad_weight = None if weight is None else weight.new_empty_strided(c, one)
        grad_bias = None if ctx.bias_dtype is None else statistics.new_empty_strided(c, one, dtype=ctx.bias_dtype)
        g = None if gate is None else empty(layout, input)
        core.backward(
            grad_output, input, dx, weight, bias, grad_weight, grad_bias, statistics, kernels, comm, epilogue, gate, g
        )
        grad_residual = grad_output if ctx.has_residual and g is None else g
        return dx, grad_weight, grad_bias, grad_residual
