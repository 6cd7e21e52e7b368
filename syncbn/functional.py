"""Synchronised batch normalisation of torch tensors: the checks, and the binding of the algorithm to autograd."""

from __future__ import annotations

from statistics import mode
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
        return batch_stats_norm(input, 0, running_mean, running_var, weight, bias, momentum, eps, comm)[0]
    return running_stats_norm(input, running_mean, running_var, weight, bias, eps)


def batch_stats_norm(
    input: Tensor,
    num_features: int,
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
        num_features: C where none of the vectors says it; 0 where the input does.
        momentum: a number or a 0-d tensor.
        input, running_mean, running_var, weight, bias, eps: as sync_batch_norm.
        comm: the communicator.

    Returns:
        The result, and the number of elements per channel over all ranks, () float64 on the input's device.
    """

    def message() -> Tensor | None:
        """Returns what the other ranks send, as far as the arguments tell: most of them, for one is wrong."""
        tensors = [v for v in (weight, bias, running_mean, running_var, input) if isinstance(v, Tensor)]
        channels = [v.shape[0] for v in tensors if v.dim() == 1 and v is not input]
        if num_features:
            channels.append(num_features)
        if isinstance(input, Tensor) and not input.is_nested and input.dim() > 1:
            channels.append(input.shape[1])
        devices = [v.device for v in tensors if v.device.type != "meta"]
        if not channels:
            return None
        return torch.empty(2 * mode(channels) + 1, dtype=torch.float64, device=devices[0] if devices else "cpu")

    with core.refusing(message, comm):
        _check(input, num_features, running_mean, running_var, weight, bias, momentum, eps)
        if input.is_inference() and torch.is_grad_enabled() and any(_needs_grad(v) for v in (weight, bias)):
            raise ValueError(
                "expected an input that autograd can save; got an inference tensor: clone it outside inference mode"
            )
    y, count = _BatchStatsNorm.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, running_mean, running_var, momentum, eps, layout_of(input), comm
    )
    return y, count


def _needs_grad(v: Tensor | None) -> bool:
    return v is not None and v.requires_grad


def running_stats_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalises by the running statistics. As sync_batch_norm in evaluation; sends nothing, in backward neither."""
    _check(input, 0, running_mean, running_var, weight, bias, 0.0, eps)
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
        # Not a view of what the kernels filled: views that a Function returns must not be modified in place.
        y = torch.empty_strided(layout.shape, layout.strides, dtype=input.dtype, device=input.device)
        ctx.layout, ctx.kernels, ctx.comm = layout, select(x), comm
        saved = core.forward(
            x, layout.flatten(y), weight, bias, running_mean, running_var, momentum, eps, ctx.kernels, comm
        )
        ctx.save_for_backward(input, weight, *saved)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(saved.count)
        ctx.set_materialize_grads(False)
        return y, saved.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        # The sums are sent whatever this rank needs, for another may need what this one does not.
        layout = ctx.layout
        with core.refusing(lambda: _backward_message(ctx, grad_output), ctx.comm):
            input, weight, *saved = ctx.saved_tensors  # raises where one was modified in place
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        dx = torch.empty_strided(layout.shape, layout.strides, dtype=input.dtype, device=input.device)
        grad_weight, grad_bias = core.backward(
            layout.flatten(grad_output),
            layout.flatten(input),
            layout.flatten(dx),
            weight,
            core.Saved(*saved),
            ctx.kernels,
            ctx.comm,
        )
        return (
            dx,
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *[None] * 6,
        )


def _backward_message(ctx: Any, grad_output: Tensor | None) -> Tensor:
    device = "cpu" if grad_output is None else grad_output.device
    return torch.empty(2 * ctx.layout.shape[1], dtype=torch.float64, device=device)


def _check(
    input: Tensor,
    num_features: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> None:
    """Refuses arguments that do not fit each other, before anything is sent or changed."""
    if not isinstance(input, Tensor) or input.layout != torch.strided or input.is_nested:
        kind = f"a {input.layout} tensor" if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"expected input to be a dense torch.Tensor; got {kind}: convert it first")
    for name, v in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if v is not None and not isinstance(v, Tensor):
            raise TypeError(f"expected {name} to be a torch.Tensor or None; got {type(v).__name__}: convert it first")
        if v is not None and v.device != input.device:
            raise ValueError(
                f"expected {name} on the input's device, {input.device}; got {v.device}: move both to one device"
            )
    check_arguments(input, num_features, weight, bias, running_mean, running_var, momentum, eps)
