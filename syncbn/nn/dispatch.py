"""How a layer is computed: the one place that knows torch's kinds of tracing, modes and wrappers.

| what looks at the tensors                                        | statistics of the batch        |
|------------------------------------------------------------------|--------------------------------|
| nothing: eager mode                                              | the kernels (eager)            |
| torch.compile, torch.export, torch.jit.trace                     | operators                      |
| a TorchDispatchMode (make_fx, FakeTensor, selective checkpoints) | operators                      |
| a subclass with __torch_dispatch__                               | operators                      |
| torch.func, forward-mode differentiation                         | differentiable                 |
| create_graph, is_grads_batched                                   | differentiable, in backward    |
| torch.fx.symbolic_trace                                          | the layer is a leaf (wrappers) |
| a DTensor                                                        | its local part (wrappers)      |
| a subclass with __torch_function__                               | as that says (wrappers)        |

Running statistics are for F.batch_norm, which all of these know; in eager mode its gradients are mended.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..comm import Group
from ..core import NOTHING, Running
from ..kernels import PLAIN, Epilogue
from ..layout import layout_of
from . import differentiable
from .autograd import apply_plain
from .checks import check_batch
from .eager import EagerCall
from .operators import TracedCall
from .recomputation import is_recomputing

_C, _functorch = torch._C, torch._C._functorch
_unpack_dual: Any = forward_ad.unpack_dual
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))


def is_plain(input: Any, weight: Any, bias: Any, residual: Any = None, mask: Any = None) -> bool:
    """Whether nothing but eager mode looks at these tensors, so that kernels may work on their memory."""
    return (
        _C._len_torch_dispatch_stack() == 0
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _C._get_tracing_state() is None
        and (type(input) in _PLAIN_TYPES or not _is_wrapper(input))
        and type(weight) in _PLAIN_TYPES
        and type(bias) in _PLAIN_TYPES
        and type(residual) in _PLAIN_TYPES
        and (type(mask) in _PLAIN_TYPES or not _is_wrapper(mask))
    )


def is_transformed(*tensors: Any) -> bool:
    """Whether torch.func, or forward-mode differentiation, looks at these tensors."""
    if _functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(v, Tensor) and _unpack_dual(v).tangent is not None for v in tensors
    )


def is_traced(*tensors: Any) -> bool:
    """Whether torch compiles, exports or traces, a mode looks on, or one of the tensors is a wrapper of others."""
    return (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack() > 0
        or _C._get_tracing_state() is not None
        or any(type(v) not in _PLAIN_TYPES and _is_wrapper(v) for v in tensors)
    )


def _is_wrapper(v: Any) -> bool:
    return isinstance(v, Tensor) and _C._dispatch_keys(v).has(_C.DispatchKey.Python)


def batch_stats_norm(
    input: Tensor,
    num_features: int,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Group,
    epilogue: Epilogue = PLAIN,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalises by the statistics of the batch, then activates. As functional.sync_batch_norm in training.

    Args:
        num_features: C where none of the vectors says it; 0 where the input does.
        running: what is updated; its momentum may be None, for the cumulative average.
        input, weight, bias, eps, mask: as sync_batch_norm.
        group: the group.
        epilogue: the activation, and whether the result overwrites the input.
        residual: of the input's shape and dtype, added before the activation; not in place.

    Returns:
        activation(normalised + residual); in place, the input.
    """
    if torch.compiler.is_compiling():  # alone, so that torch.compile sees no more than it can trace
        return TracedCall(running, eps, group.name, epilogue).norm(input, num_features, weight, bias, residual, mask)
    if not is_plain(input, weight, bias, residual, mask):
        tensors = input, weight, bias, residual, mask
        traced = TracedCall(running, eps, group.name, epilogue) if is_traced(*tensors) else None
        if is_transformed(*tensors):
            running = NOTHING if is_recomputing() else Running.of(*running)
            call = traced or EagerCall(num_features, running, eps, group, epilogue)
            return differentiable.batch_stats_norm(input, running, weight, bias, residual, call, mask)
        if traced is not None:
            return traced.norm(input, num_features, weight, bias, residual, mask)
    call = EagerCall(num_features, running, eps, group, epilogue)
    mask = call.check(input, weight, bias, residual, mask)
    call.num_features = input.shape[1]
    return apply_plain(input, weight, bias, residual, call, mask)  # type: ignore[no-any-return]


def running_stats_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalises by the running statistics. As sync_batch_norm in evaluation; sends nothing, in backward neither."""
    if mask is not None:  # what stands elsewhere must not reach the gradients of weight and bias: neither x nor dy
        y = running_stats_norm(differentiable.fill(input, mask), running_mean, running_var, weight, bias, eps)
        return differentiable.fill(y, mask)
    if running_mean is None or running_var is None:
        raise ValueError(
            "expected running_mean and running_var when not training; got None: pass them, or training=True"
        )
    is_eager = not torch.compiler.is_compiling() and is_plain(input, weight, bias)
    if is_eager:
        check_batch(input, 0, Running(running_mean, running_var), weight, bias, eps)
    if any(v is not None and v.dtype != input.dtype for v in (running_mean, running_var, weight, bias)):
        # torch takes parameters of the input's dtype or, for narrow input, of float32: other mixtures are cast.
        accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
        running_mean, running_var = running_mean.to(accumulate), running_var.to(accumulate)
        weight, bias = (None if v is None else v.to(accumulate) for v in (weight, bias))
    if not is_eager or not torch.is_grad_enabled():
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    # Backward reads the running statistics: DistributedDataParallel's broadcast of buffers at the next forward must not
    # invalidate it.
    running_mean, running_var = running_mean.clone(), running_var.clone()
    # Of parameters with gaps torch's gradient of the input is wrong, ...
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    y = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    if input.dim() > 3 and 1 in input.shape[::2] + input.shape[3::2] and y.requires_grad and y.is_cpu:
        # ... and so it is, where N or a spatial size is 1, for a gradient of another order of axes than the input's.
        layout = layout_of(input)
        hook: Any = y.register_hook
        hook(lambda dy: None if dy.stride() == layout.strides else _in_layout(layout, dy))
    return y


def _in_layout(layout: Any, v: Tensor) -> Tensor:
    """Returns v as a dense tensor of that layout, differentiably."""
    return v.new_empty_strided(layout.shape, layout.strides).copy_(v)
