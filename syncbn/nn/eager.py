"""One call of a layer in eager mode: straight to the kernels, past torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import core
from ..arguments import full_mask
from ..comm import Communicator, Group, Labels, counted, know, observed_kernels
from ..core import NOTHING, Running
from ..kernels import Epilogue, empty, select
from ..layout import layout_of
from .checks import backward_message, check_forward, check_join, check_memory, forward_message
from .differentiable import fill
from .operators import TracedCall
from .recomputation import is_recomputing, reduce

_strided = torch.strided
_NONE: Any = Labels(*[None] * 3)  # type: ignore[arg-type]


class EagerCall:
    """See autograd.Call.

    Args:
        num_features: C where no vector says it; 0 where the input does.
        running: what is updated; its momentum may be None, for the cumulative average.
        eps: added to the variance.
        group: the group.
        epilogue: the activation, and whether the result overwrites the input.
    """

    def __init__(self, num_features: int, running: Running, eps: float, group: Group, epilogue: Epilogue) -> None:
        self.num_features, self.running, self.eps = num_features, running, eps
        self.group, self.epilogue = group, epilogue
        self.comm = group.communicator()  # that of forward serves backward, too
        self.labels = group.labels or _NONE

    def communicator(self) -> Communicator:
        return self.comm

    def sum_over_ranks(self, v: Tensor) -> Tensor:
        total = v.clone()
        core.all_reduce(total, self.labels.derivatives, self.comm)
        return total

    def traced(self) -> TracedCall:
        return TracedCall(self.running, self.eps, self.group.name, self.epilogue)

    def check(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """Refuses what cannot be computed, on all ranks together. To be called in the caller's own mode of autograd.

        Returns:
            The mask in full shape, or None.
        """
        label = counted(self.labels.forward, self.comm)
        try:
            check_join(self.comm.world_size)
            check_forward(input, self.num_features, self.running, weight, bias, self.eps, self.epilogue, residual)
            select(input)
            full: Tensor | None = full_mask(mask, input)
            if self.comm.world_size > 1:
                # Of a cumulative average on accelerators that momentum is a tensor there.
                mean, _, _, momentum = Running.of(*self.running) if input.is_cpu else self.running
                know(label, input, self.eps, momentum, mean, weight, bias)
        except Exception as error:
            core.refuse(error, forward_message(input, self.num_features, weight, bias, self.running), self.comm, label)
        return full

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        running = NOTHING if is_recomputing() else Running.of(*self.running)
        layout, comm, epilogue = layout_of(input), self.comm, self.epilogue
        kernels = observed_kernels(select(input), comm)
        # In place in memory with gaps, or in that of the negative, the result is copied there.
        in_place = epilogue.in_place and input.stride() == layout.strides and not input.is_neg()
        output = input if in_place else empty(layout, input)
        moments, center = reduce(input, kernels, comm, mask, self.labels.forward)
        statistics = core.normalise(
            input, output, weight, bias, running, self.eps, kernels, comm, moments, center, epilogue, residual, mask
        )
        if epilogue.in_place and not in_place:
            output = input.copy_(output)
        return output, statistics

    def backward(self, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        # The sums are sent whatever this rank needs, for another may need what this one does not.
        label = counted(self.labels.backward, self.comm)
        try:
            input, weight, bias, gate, statistics, mask = ctx.saved_tensors  # raises where one was modified in place
            if grad_output is None or grad_output._is_zerotensor():
                grad_output = torch.zeros_like(input)
            elif type(grad_output) is not Tensor or grad_output.layout is not _strided:
                check_memory("a gradient", grad_output)
        except Exception as error:
            core.refuse(error, backward_message(self.num_features, grad_output), self.comm, label)
        layout, kernels = layout_of(input), observed_kernels(select(input), self.comm)
        dx = empty(layout, input)
        c, one = (layout.shape[1],), (1,)
        grad_weight = None if weight is None else weight.new_empty_strided(c, one)
        grad_bias = None if ctx.bias_dtype is None else statistics.new_empty_strided(c, one, dtype=ctx.bias_dtype)
        g = None if gate is None else empty(layout, input)
        core.backward(
            grad_output, input, dx, weight, bias, grad_weight, grad_bias, statistics, kernels, self.comm, self.epilogue,
            gate, g, mask, label,
        )  # fmt: skip
        grad_residual = fill(grad_output, mask) if ctx.has_residual and g is None else g
        return dx, grad_weight, grad_bias, grad_residual, None, None
