"""Synchronised batch normalisation of torch tensors: the checks, and the binding of the algorithm to autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import core
from .comm import Communicator, LocalCommunicator, as_communicator
from .kernels import select
from .layout import Layout, check_arguments, layout_of


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
) -> Tensor:
    """Normalises each channel of a batch that is spread over the ranks of a group.

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training, mean and var are those of the elements of all ranks
    together, as if torch.nn.functional.batch_norm had been called on the concatenated batch. In evaluation they are
    running_mean and running_var.

    Args:
        input: float16, bfloat16, float32 or float64. It may be empty (N = 0), and N and the spatial sizes may differ
            between ranks; the dtype and C may not.
        running_mean, running_var: updated in place in training; None not to keep them. Needed in evaluation.
        weight, bias: scale and shift, or None.
        training: whether to use, and to synchronise, the statistics of the batch.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        process_group: None (the default group, or this process alone while torch.distributed is not initialised), a
            ProcessGroup, a one-dimensional DeviceMesh or a syncbn.comm.Communicator.

    Shape:
        input: (N, C, ...); running_mean, running_var, weight, bias: (C,); the result: as input, in its memory format.

    Collective:
        In training, one all_reduce of 2C + 1 float64 forward (float64 input: two) and one of 2C float64 backward; every
        rank must call both. In evaluation, nothing.

    Numerics:
        Sums are accumulated in float64 and the result is rounded once, so that it does not depend on how the batch is
        split over ranks. running_var takes the unbiased variance of the global batch. A global batch of no elements
        changes nothing.

    Raises:
        TypeError: an input that is not of a floating dtype, or a process_group of an unknown type.
        ValueError: shapes that do not fit, a group this process is not in, or a single element per channel over all
            ranks.
        RuntimeError: another rank raised one of these; no rank is left waiting.
    """
    comm = as_communicator(process_group) if training else LocalCommunicator()
    if training:
        return batch_stats_norm(input, None, running_mean, running_var, weight, bias, momentum, eps, comm)[0]
    return running_stats_norm(input, running_mean, running_var, weight, bias, eps)


def batch_stats_norm(
    input: Tensor,
    num_features: int | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    comm: Communicator,
) -> tuple[Tensor, Tensor]:
    """Normalises by the statistics of the batch. As sync_batch_norm in training.

    Args:
        num_features: C where it is known; else the vectors say it.
        momentum: a number or a 0-d tensor.
        input, running_mean, running_var, weight, bias, eps: as sync_batch_norm.
        comm: the communicator.

    Returns:
        The result, and the number of elements per channel over all ranks, () float64 on the input's device.
    """
    vectors = [v for v in (weight, bias, running_mean, running_var) if v is not None]
    try:
        _check(input, num_features, running_mean, running_var, weight, bias)
    except (TypeError, ValueError) as error:
        # What the other ranks send, as far as this rank's other arguments tell.
        c = num_features if num_features is not None else next((v.numel() for v in vectors), None)
        device = next((v.device for v in (*vectors, input) if isinstance(v, Tensor)), "cpu")
        if c is not None:
            core.refuse(torch.empty(2 * c + 1, dtype=torch.float64, device=device), comm)
        raise type(error)(f"{core.rank_prefix(comm)}{error}") from None
    y, count = _BatchStatsNorm.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, running_mean, running_var, momentum, eps, layout_of(input), comm
    )
    return y, count


def running_stats_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalises by the running statistics. As sync_batch_norm in evaluation; sends nothing, in backward neither."""
    _check(input, None, running_mean, running_var, weight, bias)
    if running_mean is None or running_var is None:
        raise ValueError(
            "expected running_mean and running_var when not training; got None: pass them, or training=True"
        )
    if torch.is_grad_enabled():
        # Backward reads them: DistributedDataParallel's broadcast of buffers at the next forward must not invalidate
        # it.
        running_mean, running_var = running_mean.clone(), running_var.clone()
    if any(v is not None and v.dtype != input.dtype for v in (running_mean, running_var, weight, bias)):
        # torch takes parameters of the input's dtype or, for narrow input, of float32: other mixtures are cast.
        accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
        running_mean, running_var = running_mean.to(accumulate), running_var.to(accumulate)
        weight, bias = (None if v is None else v.to(accumulate) for v in (weight, bias))
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)


class _BatchStatsNorm(torch.autograd.Function):
    """core.forward and core.backward on the (n, c, s) view of the input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        layout: Layout,
        comm: Communicator,
    ) -> tuple[Tensor, Tensor]:
        x = layout.flatten(input)
        kernels = select(x)
        with torch.autocast(x.device.type, enabled=False):
            y, saved = core.forward(x, weight, bias, running_mean, running_var, momentum, eps, kernels, comm)
        ctx.save_for_backward(input, weight, *saved)
        ctx.layout, ctx.kernels, ctx.comm = layout, kernels, comm
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(saved.count)
        ctx.set_materialize_grads(False)
        return layout.restore(y), saved.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        # The sums are sent whatever this rank needs, for another may need what this one does not.
        input, weight, *saved = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        x, dy = ctx.layout.flatten(input), ctx.layout.flatten(grad_output)
        with torch.autocast(x.device.type, enabled=False):
            dx, grad_weight, grad_bias = core.backward(dy, x, weight, core.Saved(*saved), ctx.kernels, ctx.comm)
        return (
            ctx.layout.restore(dx),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *[None] * 6,
        )


def _check(
    input: Tensor,
    num_features: int | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuses arguments that do not fit each other, before anything is sent or changed."""
    if not isinstance(input, Tensor) or input.layout != torch.strided:
        kind = f"a {input.layout} tensor" if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"expected input to be a dense torch.Tensor; got {kind}: convert it first")
    check_arguments(input, num_features, weight, bias, running_mean, running_var)
    for name, v in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if v is not None and v.device != input.device:
            raise ValueError(
                f"expected {name} on the input's device, {input.device}; got {v.device}: move both to one device"
            )
