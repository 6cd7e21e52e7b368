"""Synchronised batch normalisation of torch tensors: the checks, and the binding of the algorithm to autograd."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mode
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from . import core
from .arguments import check_arguments
from .comm import Communicator, as_communicator
from .kernels import PLAIN, Epilogue, check_epilogue, select
from .kernels import empty as _empty
from .layout import Layout, layout_of

__all__ = ["sync_batch_norm"]

Result = TypeVar("Result")


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
            ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator or a syncbn.comm.Communicator.

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
    if training:
        if torch.compiler.is_compiling():
            arguments = running_mean, running_var, weight, bias, training, momentum, eps, process_group
            return outside_graphs(sync_batch_norm, input, *arguments)
        running = core.Running(running_mean, running_var, None, momentum)
        return batch_stats_norm(input, 0, running, weight, bias, eps, as_communicator(process_group))
    return running_stats_norm(input, running_mean, running_var, weight, bias, eps)


@_disable_dynamo
def outside_graphs(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls function where torch.compile's graph breaks off.

    It would else trace into kernels and groups, of which it knows nothing: arrays would be freed while they are read by
    their addresses, and an attribute of a ProcessGroup that it does not know ends it with an internal error.
    """
    return function(*arguments)


def batch_stats_norm(
    input: Tensor,
    num_features: int,
    running: core.Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    comm: Communicator,
    tail: Epilogue = PLAIN,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalises by the statistics of the batch, then activates. As sync_batch_norm in training.

    Args:
        num_features: C where none of the vectors says it; 0 where the input does.
        running: what is updated; its momentum a number or a 0-d tensor.
        input, weight, bias, eps: as sync_batch_norm.
        comm: the communicator.
        tail: the activation, and whether the result overwrites the input.
        residual: of the input's shape and dtype, added before the activation; not in place.

    Returns:
        activation(normalised + residual); in place, the input.
    """
    try:
        _check(input, num_features, running.mean, running.var, weight, bias, running.momentum, eps)
        if tail is not PLAIN:
            check_epilogue(tail)
        if residual is not None:
            check_residual(residual, input, tail)
        if tail.in_place:
            _check_in_place(input)
        _check_autograd(input, weight, bias, residual)
        kernels = select(input)
    except Exception as error:
        core.refuse(error, forward_message(input, num_features, weight, bias, running), comm)
    y: Tensor = _BatchStatsNorm.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, residual, (running, eps, layout_of(input), kernels, comm, tail)
    )
    return y


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
    # Of parameters with gaps torch's gradient of the input is wrong.
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    if input.dim() <= 3 or 1 not in input.shape[2:] or not torch.is_grad_enabled():
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    # And where a spatial size is 1, whose stride says nothing, torch's gradients may be wrong for a gradient of another
    # memory format than the input's. As one axis the spatial ones have no format; the result gets it back.
    y = F.batch_norm(input.flatten(2), running_mean, running_var, weight, bias, False, 0.0, eps).view(input.shape)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim())
    return y.contiguous(memory_format=channels_last) if channels_last and layout_of(input).channels_last else y


class _BatchStatsNorm(torch.autograd.Function):
    """core.forward and core.backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[core.Running, float, Layout, Any, Communicator, Epilogue],
    ) -> Tensor:
        running, eps, layout, kernels, comm, tail = options
        # In place in memory with gaps, or in that of the negative, the result is copied there.
        in_place = tail.in_place and input.stride() == layout.strides and not input.is_neg()
        output = input if in_place else _empty(layout, input)
        statistics = core.forward(input, output, weight, bias, running, eps, kernels, comm, tail, residual)
        if tail.in_place:
            ctx.mark_dirty(input)
            if not in_place:
                output = input.copy_(output)
        # What backward needs beside x to tell the activation's derivative. y is of use to others too, and often kept.
        gate = None
        if residual is not None and tail.activation != "none":
            gate = residual if tail.activation == "silu" else output
        needed = bias if tail.activation != "none" or tail.in_place else None
        ctx.save_for_backward(input, weight, needed, gate, statistics)
        ctx.options = layout, kernels, comm, tail, None if bias is None else bias.dtype, residual is not None
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():  # compiled autograd
            return outside_graphs(_BatchStatsNorm.backward, ctx, grad_output)
        # once_differentiable makes the gradients' own differentiation an error, which costs as much as a small batch.
        function = once_differentiable(_backward) if torch.is_grad_enabled() else _backward
        gradients: tuple[Tensor | None, ...] = function(ctx, grad_output)
        return gradients


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    # The sums are sent whatever this rank needs, for another may need what this one does not.
    layout, kernels, comm, tail, bias_dtype, has_residual = ctx.options
    try:
        input, weight, bias, gate, statistics = ctx.saved_tensors  # raises where one was modified in place
        if grad_output is None or grad_output._is_zerotensor():
            grad_output = torch.zeros_like(input)
        _check_memory("a gradient", grad_output)
    except Exception as error:
        core.refuse(error, _backward_message(layout, grad_output), comm)
    dx = _empty(layout, input)
    c, one = (layout.shape[1],), (1,)
    grad_weight = None if weight is None else weight.new_empty_strided(c, one)
    grad_bias = None if bias_dtype is None else statistics.new_empty_strided(c, one, dtype=bias_dtype)
    grad_residual = grad_output if has_residual else None
    g = None if gate is None else _empty(layout, input)
    if g is not None:
        grad_residual = g
    arguments = grad_output, input, dx, weight, bias, grad_weight, grad_bias, statistics
    core.backward(*arguments, kernels, comm, tail, gate, g)
    return dx, grad_weight, grad_bias, grad_residual, None


def forward_message(input: Any, num_features: int, weight: Any, bias: Any, running: core.Running) -> Tensor | None:
    """Returns what the other ranks send, as far as the arguments tell: most of them, for one is wrong."""
    tensors = [v for v in (weight, bias, running.mean, running.var, input) if isinstance(v, Tensor)]
    channels = [v.shape[0] for v in tensors if v.dim() == 1 and v is not input]
    if isinstance(num_features, int) and num_features > 0:
        channels.append(num_features)
    if isinstance(input, Tensor) and not input.is_nested and input.dim() > 1:
        channels.append(input.shape[1])
    devices = [v.device for v in tensors if v.device.type != "meta"]
    if not channels:
        return None
    return torch.empty(2 * mode(channels) + 1, dtype=torch.float64, device=devices[0] if devices else "cpu")


def _backward_message(layout: Layout, grad_output: Tensor | None) -> Tensor:
    device = "cpu" if grad_output is None else grad_output.device
    return torch.empty(2 * layout.shape[1], dtype=torch.float64, device=device)


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
    _check_memory("input", input)
    device, strided = input.device, torch.strided
    for v in (weight, bias, running_mean, running_var):
        if v is not None and not (isinstance(v, Tensor) and v.device == device and v.layout is strided):
            vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
            _refuse_vector(next(name for name, vector in vectors.items() if vector is v), v, device)
    check_arguments(input, num_features, weight, bias, running_mean, running_var, momentum, eps)


def _refuse_vector(name: str, v: Any, device: torch.device) -> NoReturn:
    if not isinstance(v, Tensor) or v.layout != torch.strided:
        kind = f"a {v.layout} tensor" if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"expected {name} to be a dense torch.Tensor or None; got {kind}: convert it first")
    raise ValueError(f"expected {name} on the input's device, {device}; got {v.device}: move both to one device")


def _check_memory(name: str, v: Any) -> None:
    """Refuses what is no tensor with dense memory that the kernels could read."""
    if not isinstance(v, Tensor):
        kind = type(v).__name__
    elif v.is_nested or v.layout != torch.strided:
        kind = "a nested tensor" if v.is_nested else f"a {v.layout} tensor"
    elif v.is_cpu and not torch.compiler.is_compiling() and not _has_memory(v):
        kind = f"a {type(v).__name__} without memory of its own"
    else:
        return
    raise TypeError(f"expected {name} to be a dense torch.Tensor; got {kind}: convert it first")


def _has_memory(v: Tensor) -> bool:
    try:
        return v.data_ptr() != 0 or v.numel() == 0
    except RuntimeError:  # what tensors that only describe others say
        return False


def _check_autograd(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    """Refuses, with gradients enabled, what autograd cannot save."""
    if not torch.is_grad_enabled() or not (input.is_inference() or (residual is not None and residual.is_inference())):
        return
    if any(v is not None and v.requires_grad for v in (input, weight, bias, residual)):
        raise ValueError(
            "expected an input and a residual that autograd can save; got an inference tensor: clone it outside "
            "inference mode"
        )


def _check_in_place(input: Tensor) -> None:
    """Refuses an input that must not be overwritten, as autograd would after the messages have been sent."""
    reason = ""
    if _overlaps(input):
        reason = "a tensor of which several elements are one in memory, as an expanded one"
    elif input.is_inference() and not torch.is_inference_mode_enabled():
        reason = "an inference tensor outside inference mode"
    elif torch.is_grad_enabled() and input.requires_grad:
        base = input._base if input._is_view() else input
        if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
            reason = "a leaf tensor that requires its gradient, or a view of one"
        elif input._is_view() and _made_with_others(input):
            reason = "one of several views made at once (say, by chunk, or by a module with backward hooks)"
    if reason:
        raise ValueError(f"expected an input that may be overwritten; got {reason}: use inplace=False")


def _overlaps(v: Tensor) -> bool:
    """Whether elements may share memory: whether a step along an axis stays within what the smaller steps reach."""
    reach = 0
    for stride, size in sorted(zip(v.stride(), v.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _made_with_others(view: Tensor) -> bool:
    autograd = torch._C._autograd
    return bool(autograd._get_creation_meta(view) != autograd.CreationMeta.DEFAULT)


def check_residual(residual: Tensor, input: Tensor, tail: Epilogue) -> None:
    """Refuses a residual that cannot be added to the normalised input."""
    _check_memory("residual", residual)
    if (residual.shape, residual.dtype, residual.device) != (input.shape, input.dtype, input.device):
        raise ValueError(
            f"expected a residual of the input's shape, dtype and device, {tuple(input.shape)} {input.dtype} on "
            f"{input.device}; got {tuple(residual.shape)} {residual.dtype} on {residual.device}: expand or convert it"
        )
    if tail.in_place:
        raise ValueError(
            "expected no residual in place, for the input could not be recovered; got one: use inplace=False"
        )
