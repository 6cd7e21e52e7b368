"""What the torch layers refuse: checks of tensors and of what autograd can do with them, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mode
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..arguments import check_arguments
from ..core import NOTHING, Running
from ..kernels import PLAIN, Epilogue, check_epilogue, has_float64


def check_forward(
    input: Tensor,
    num_features: int,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue = PLAIN,
    residual: Tensor | None = None,
) -> None:
    """Refuses arguments of batch_stats_norm that do not fit each other, before anything is sent or changed."""
    check_batch(input, num_features, running, weight, bias, eps)
    if epilogue is not PLAIN:
        check_epilogue(epilogue)
    if residual is not None:
        check_residual(residual, input, epilogue)
    if epilogue.in_place:
        _check_in_place(input)
    _check_autograd(input, weight, bias, residual)


def check_batch(
    input: Tensor,
    num_features: int,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Refuses a batch and vectors that do not fit each other; num_features is 0 where the batch may tell it."""
    check_memory("input", input)
    running_mean, running_var, _, momentum = running
    device, strided = input.device, torch.strided
    for v in (weight, bias, running_mean, running_var):
        if v is not None and not (isinstance(v, Tensor) and v.device == device and v.layout is strided):
            vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
            _refuse_vector(next(name for name, vector in vectors.items() if vector is v), v, device)
    momentum = 0.0 if momentum is None else momentum
    check_arguments(input, num_features, weight, bias, running_mean, running_var, momentum, eps)


def is_within_join() -> bool:
    """Whether a DistributedDataParallel model runs in a context of torch's Join that lets ranks end by themselves."""
    model = DistributedDataParallel._active_ddp_module
    return model is not None and model._join_config.enable and not model._join_config.throw_on_early_termination


def check_join(world_size: int) -> None:
    """Refuses to run where ranks that have no more batches would miss this layer's messages."""
    if world_size > 1 and is_within_join():
        raise RuntimeError(
            "expected no DistributedDataParallel.join or torch.distributed.algorithms.Join around SyncBatchNorm "
            "layers: ranks that have joined repeat the wrapper's messages, not the layers', which would wait for ever; "
            "iterate over syncbn.even(loader) instead"
        )


def _refuse_vector(name: str, v: Any, device: torch.device) -> NoReturn:
    if not isinstance(v, Tensor) or v.layout != torch.strided:
        kind = f"a {v.layout} tensor" if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"expected {name} to be a dense torch.Tensor or None; got {kind}: convert it first")
    raise ValueError(f"expected {name} on the input's device, {device}; got {v.device}: move both to one device")


def check_memory(name: str, v: Any) -> None:
    """Refuses what is no tensor with dense memory that the kernels could read."""
    if not isinstance(v, Tensor):
        kind = type(v).__name__
    elif v.is_nested or v.layout != torch.strided:
        kind = "a nested tensor" if v.is_nested else f"a {v.layout} tensor"
    elif v.is_cpu and not _has_memory(v):
        kind = f"a {type(v).__name__} without memory of its own"
    else:
        return
    raise TypeError(f"expected {name} to be a dense torch.Tensor; got {kind}: convert it first")


def check_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    running: Running = NOTHING,
    eps: float = 1.0,
    alike: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> None:
    """Refuses arguments of an operator that do not fit each other, with which the kernels would leave their memory.

    Args:
        x, weight, bias, running, eps, epilogue: as check_forward.
        alike: what must have the shape, dtype and device of x, or be None, by name.
    """
    check_batch(x, 0, running, weight, bias, eps)
    check_epilogue(epilogue)
    for name, v in alike.items():
        if v is not None:
            check_memory(name, v)
            if (v.shape, v.dtype, v.device) != (x.shape, x.dtype, x.device):
                raise ValueError(
                    f"expected {name} of x's shape, dtype and device, {tuple(x.shape)} {x.dtype} on {x.device}; got "
                    f"{tuple(v.shape)} {v.dtype} on {v.device}: pass what forward took and returned"
                )


def check_vector(name: str, v: Tensor, length: int, device: torch.device) -> None:
    """Refuses what is no contiguous float64 vector of that length."""
    check_memory(name, v)
    if (v.shape, v.dtype, v.device) != ((length,), torch.float64, device) or not v.is_contiguous():
        raise ValueError(
            f"expected {name} to be a contiguous vector of {length} torch.float64 on {device}; got {tuple(v.shape)} "
            f"{v.dtype} on {v.device}, strides {v.stride()}: pass what the operator before returned"
        )


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
    if not v.numel():
        return False
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


def check_residual(residual: Tensor, input: Tensor, epilogue: Epilogue) -> None:
    """Refuses a residual that cannot be added to the normalised input."""
    check_memory("residual", residual)
    if (residual.shape, residual.dtype, residual.device) != (input.shape, input.dtype, input.device):
        raise ValueError(
            f"expected a residual of the input's shape, dtype and device, {tuple(input.shape)} {input.dtype} on "
            f"{input.device}; got {tuple(residual.shape)} {residual.dtype} on {residual.device}: expand or convert it"
        )
    if epilogue.in_place:
        raise ValueError(
            "expected no residual in place, for the input could not be recovered; got one: use inplace=False"
        )


def channels_of(input: Any) -> int:
    """Returns the number of channels of a batch, or 0 of what is none."""
    return input.shape[1] if isinstance(input, Tensor) and not input.is_nested and input.dim() > 1 else 0


def forward_message(input: Any, num_features: int, weight: Any, bias: Any, running: Running) -> Tensor | None:
    """Returns what the other ranks send, as far as the arguments tell: most of them, for one is wrong."""
    tensors = [v for v in (weight, bias, running.mean, running.var, input) if isinstance(v, Tensor)]
    channels = [v.shape[0] for v in tensors if v.dim() == 1 and v is not input]
    if isinstance(num_features, int) and num_features > 0:
        channels.append(num_features)
    if channels_of(input):
        channels.append(channels_of(input))
    devices = [v.device for v in tensors if v.device.type != "meta" and has_float64(v.device)]
    if not channels:
        return None
    return torch.empty(2 * mode(channels) + 1, dtype=torch.float64, device=devices[0] if devices else "cpu")


def backward_message(channels: int, grad_output: Tensor | None) -> Tensor:
    """Returns what the other ranks send in backward, to be filled with a refusal."""
    device = "cpu" if grad_output is None else grad_output.device
    return torch.empty(2 * channels, dtype=torch.float64, device=device)
