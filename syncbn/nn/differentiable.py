"""The layer in differentiable torch operations: for second derivatives, torch.func, and forward-mode differentiation.

The fast kernels compute first derivatives only. Here autograd differentiates the formulas, as often as asked:

    d = x - center        S = sum over ranks of [sum(d) | sum(d^2)]
    offset = S1 / N       var = S2 / N - offset^2       xhat = (d - offset) / sqrt(var + eps)

They hold for any constant center. It is the mean over all ranks, so that nothing cancels, and all is in float64.
The sum over ranks is the only piece that torch does not have: it is linear, and its own adjoint for the sum of the
losses of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import core
from ..arguments import full_mask
from ..comm import Communicator
from ..core import Running
from ..kernels import Epilogue

Sum = Callable[[Tensor], Tensor]


class Call(Protocol):
    """What is needed here of autograd.Call.

    Attributes:
        eps: added to the variance.
        epilogue: activation and in-place work.
    """

    eps: float
    epilogue: Epilogue

    def communicator(self) -> Communicator:
        """Returns the communicator."""

    def sum_over_ranks(self, v: Tensor) -> Tensor:
        """Returns the sum of a contiguous float64 vector over all ranks, which leaves v as it is."""


def activate(z: Tensor, epilogue: Epilogue, residual: Tensor | None = None, inplace: bool = False) -> Tensor:
    """Returns activation(z + residual); inplace: z is not needed any more."""
    if residual is not None:
        z = z.add_(residual) if inplace else z + residual
    if epilogue.activation == "relu":
        return F.relu(z, inplace)
    if epilogue.activation == "leaky_relu":
        return F.leaky_relu(z, epilogue.slope, inplace)
    return F.silu(z, inplace) if epilogue.activation == "silu" else z


def fill(v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns v with 0 where mask, as arguments.full_mask takes it, is False; its gradient is 0 there, too."""
    return v if mask is None else v.masked_fill(full_mask(mask, v).logical_not(), 0.0)


def batch_stats_norm(
    input: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalises as dispatch.batch_stats_norm does, differentiable any number of times and in forward mode.

    Collective:
        two all_reduce forward, of C + 1 and of 2C float64, and one of 2C for each derivative.

    Raises:
        ValueError: in place, or a global count of one element a channel, on every rank.
        RuntimeError: by torch.func's rules, running statistics that are updated but are no argument of the function
            that is transformed; as for nn.BatchNorm.
    """
    if call.epilogue.in_place:
        raise ValueError(
            "expected inplace=False under torch.func and forward-mode differentiation; got inplace=True, which "
            "overwrites its input: set layer.inplace = False"
        )
    axes = _axes(input)
    if mask is None:
        count = torch.full((), input.numel() / input.shape[1], dtype=torch.float64, device=input.device)
    else:
        mask = full_mask(mask, input)
        count = mask.sum().double()
        input, residual = fill(input, mask), None if residual is None else fill(residual, mask)
    first = _sum_over_ranks(torch.cat([input.detach().double().sum(axes), count.view(1)]), call.sum_over_ranks)
    count = first[-1]
    _check_count(count, call.communicator())
    elements = count.clamp(min=1)
    center = first[:-1] / elements
    xhat, offset, var = _standardise(input, center, elements, call, mask=mask)
    if running.mean is not None:
        # A batch of no elements changes nothing, nor one whose count is NaN: filled, not multiplied by 0.
        nothing = (count > 1).logical_not()
        unbiased = var.detach() * count / (count - 1).clamp(min=1)
        with torch.no_grad():
            for old, new in ((running.mean, center + offset.detach()), (running.var, unbiased)):
                old.add_((running.momentum * (new - old.double())).masked_fill(nothing, 0.0).to(old.dtype))
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_((count > 1).to(running.num_batches_tracked.dtype))
    return fill(activate(_affine(xhat, weight, bias).to(input.dtype), call.epilogue, residual), mask)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    statistics: Tensor,
    call: Call,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiates the layer, so that the gradients can be differentiated again.

    Args:
        grad_output, input, weight, gate, statistics, mask: as the kernels' backward_reduce takes them.
        bias: the bias where the activation needs it, else any tensor of its shape and dtype, or None.
        call: as in forward; not in place.

    Returns:
        The gradients of input, weight, bias, and of the sum that the activation takes.

    Collective:
        one all_reduce of 2C float64, as backward's otherwise; and one of as many for each further derivative.
    """
    c, create_graph = input.shape[1], torch.is_grad_enabled()
    mean, invstd, count = statistics[:c], statistics[c:-1], statistics[-1].clamp(min=1)
    with torch.enable_grad():
        # Views, so that autograd stops at them, and all three require gradients, so that every rank sends the same.
        x = _start(input)
        kept, gate = fill(x, mask), None if gate is None else fill(gate, mask)
        w = _start(torch.ones_like(mean) if weight is None else weight)
        b = _start(torch.zeros_like(mean) if bias is None else bias)
        # About the mean the first sums are 0, and what the second were follows from invstd: nothing is sent for them.
        known = torch.cat([torch.zeros_like(mean), (invstd.pow(-2) - call.eps).clamp(min=0) * count])
        xhat, _, _ = _standardise(kept, mean, count, call, known, mask)
        z = _affine(xhat, w, b)
        g = _through_activation(fill(grad_output.double(), mask), z, gate, call.epilogue)
        dx, dw, db = torch.autograd.grad(z, (x, w, b), g, create_graph=create_graph)
    return dx.to(input.dtype), dw, db, g.to(input.dtype)


def _sum_over_ranks(v: Tensor, total: Sum, known: Tensor | None = None) -> Tensor:
    result: Tensor = _SumOverRanks.apply(v, total, known)  # type: ignore[no-untyped-call]
    return result


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks of a float64 vector; `known` is that sum where it was sent before, and is not sent again."""

    @staticmethod
    def forward(v: Tensor, total: Sum, known: Tensor | None) -> Tensor:
        return total(v.contiguous().view(-1)).view(v.shape) if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.total = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return None if grad is None else _sum_over_ranks(grad, ctx.total), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _sum_over_ranks(tangent, ctx.total)

    @staticmethod
    def vmap(
        info: Any,  # noqa: ARG004
        in_dims: tuple[int | None, ...],
        v: Tensor,
        total: Sum,
        known: Tensor | None,
    ) -> tuple[Tensor, int | None]:
        if known is not None:
            return _sum_over_ranks(v, total, known), in_dims[2]
        if in_dims[0] is None:
            return _sum_over_ranks(v, total), None
        return _sum_over_ranks(v.movedim(in_dims[0], 0), total), 0


def _standardise(
    x: Tensor, center: Tensor, count: Tensor, call: Call, known: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns xhat, in float64, and the mean less the center and the variance, (c,) each.

    Where mask is False, x is to be finite, and xhat means nothing.
    """
    c, axes = x.shape[1], _axes(x)
    d = fill(x.double() - _column(center, x), mask)
    sums = _sum_over_ranks(torch.cat([d.sum(axes), (d * d).sum(axes)]), call.sum_over_ranks, known)
    offset = sums[:c] / count
    # clamp: rounding may leave a tiny negative difference where all elements are equal.
    var = (sums[c:] / count - offset * offset).clamp(min=0)
    return (d - _column(offset, x)) * _column((var + call.eps).rsqrt(), x), offset, var


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = xhat if weight is None else xhat * _column(weight.double(), xhat)
    return z if bias is None else z + _column(bias.double(), xhat)


def _through_activation(dy: Tensor, z: Tensor, gate: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Returns the gradient of what the activation takes. gate: as the kernels' backward_reduce has it."""
    if epilogue.activation == "none":
        return dy
    if epilogue.activation == "silu":
        z = z if gate is None else z + gate.double()
        p = z.sigmoid()
        return dy * (p * (1 + z * (1 - p)))
    z = z if gate is None else gate
    return torch.where(z <= 0, dy * epilogue.slope, dy)


def _start(v: Tensor) -> Tensor:
    """Returns a view that requires its gradient, at which differentiation ends, and through which it can go on."""
    return v.view_as(v) if v.requires_grad else v.detach().requires_grad_()


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _column(v: Tensor, x: Tensor) -> Tensor:
    """(c,) -> (c, 1, ...), to meet an (N, C, ...) tensor."""
    return v.view(-1, *[1] * (x.dim() - 2))


def _check_count(count: Tensor, comm: Communicator) -> None:
    """Raises for a global count that core refuses, where it can be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(count):
        count = torch._C._functorch.get_unwrapped(count)
    if count.is_cpu:
        core.check_count(float(count.detach().flatten()[0]), comm)  # vmap has one an example, all alike
