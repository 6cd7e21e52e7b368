"""The package's contract on GPUs: each kernel is one launch. See syncbn/kernels/__init__.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layout import Layout, layout_of
from ..contract import Running, is_refused
from ..epilogue import ACTIVATIONS, PLAIN, Epilogue, weight_floor
from . import elementwise, sums
from .blocks import Blocks, Device, blocks_of
from .launch import Kernel, scratch_of

_STATS = Kernel(sums.stats_kernel)
_NORMALISE = Kernel(elementwise.normalise_kernel)
_BACKWARD_REDUCE = Kernel(sums.backward_reduce_kernel)
_BACKWARD_ELEMT = Kernel(elementwise.backward_elemt_kernel)

_PROGRAMS_A_PROCESSOR = 2
_FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # P100, V100, A100, H100, B200: half of float32's rate
_INTERPRETED = Device(programs=3, warp_threads=32)


def stats(x: Tensor, center: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    layout = layout_of(x)
    x, c, blocks = _dense(x, layout), x.shape[1], _blocks(x, layout, "sum", mask)
    moments = torch.empty(2 * c + 1, dtype=torch.float64, device=x.device)
    arrays = x, _positions(mask), center, moments, *_scratch(x, blocks)
    constants = *blocks.shape, blocks.added, _is_error_free(x)
    _STATS.launch(x.device, blocks, arrays, blocks.geometry, constants)
    return moments


def normalise(
    x: Tensor,
    moments: Tensor,
    center: Tensor | None,
    running: Running,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = PLAIN,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> float | None:
    """Statistics from the moments of all ranks; y = activation((x - mean) * (invstd * weight) + bias + residual)."""
    count = float(moments[-1]) if moments.is_cpu else None
    if count is not None and is_refused(count):
        return count
    layout = layout_of(y)
    x, residual, blocks = _dense(x, layout), _dense(residual, layout), _blocks(x, layout, "map", mask)
    buffers = [None if v is None else v.contiguous() for v in (running.mean, running.var)]
    momentum, on_device = (0.0, running.momentum) if isinstance(running.momentum, Tensor) else (running.momentum, None)
    weight, bias = _vector(weight), _vector(bias)
    arrays = x, y, residual, _positions(mask), moments, center, weight, bias, *buffers
    arrays = *arrays, running.num_batches_tracked, on_device, _scratch(x, blocks)[1]
    activation, slope, _ = _epilogue(epilogue)
    numbers = *blocks.geometry, eps, momentum, slope, weight_floor(x.dtype)
    constants = activation, epilogue.in_place, *blocks.shape
    _NORMALISE.launch(x.device, blocks, arrays, numbers, constants)
    for buffer, written in zip((running.mean, running.var), buffers, strict=True):
        if buffer is not written and buffer is not None:
            buffer.copy_(written)  # of a buffer with gaps
    return count


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    gate: Tensor | None = None,
    g: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sums of g and of g * (x - mean) of one rank. See the package's contract."""
    layout = layout_of(x if g is None else g)
    x, dy, gate, c, blocks = *(_dense(v, layout) for v in (x, dy, gate)), x.shape[1], _blocks(x, layout, "sum", mask)
    found = torch.empty(2 * c, dtype=torch.float64, device=x.device)
    vectors = _vector(weight), _vector(bias), grad_weight, grad_bias
    arrays = dy, x, gate, g, _positions(mask), statistics, *vectors, found, *_scratch(x, blocks)
    activation, slope, steep = _epilogue(epilogue)
    numbers = *blocks.geometry, slope, steep, weight_floor(x.dtype)
    constants = activation, epilogue.in_place, *blocks.shape, blocks.added, _is_error_free(x)
    _BACKWARD_REDUCE.launch(x.device, blocks, arrays, numbers, constants)
    return found


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    dx: Tensor,
    epilogue: Epilogue = PLAIN,
    mask: Tensor | None = None,
) -> None:
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    layout = layout_of(dx)
    x, dy, blocks = _dense(x, layout), _dense(dy, layout), _blocks(x, layout, "map", mask)
    arrays = dy, x, dx, _positions(mask), statistics, _vector(weight), _vector(bias), sums
    activation, slope, steep = _epilogue(epilogue)
    numbers = *blocks.geometry, slope, steep, weight_floor(x.dtype)
    constants = activation, epilogue.in_place, *blocks.shape
    _BACKWARD_ELEMT.launch(x.device, blocks, arrays, numbers, constants)


def _dense(v: Any, layout: Layout) -> Any:
    """Returns a batch whose memory is in the order of the layout: itself, or a copy."""
    if v is None or (v.stride() == layout.strides and not v.is_neg()):
        return v
    strides = zip(layout.shape, v.stride(), layout.strides, strict=True)
    if not v.is_neg() and all(found == expected for size, found, expected in strides if size > 1):
        return v
    return v.new_empty_strided(layout.shape, layout.strides).copy_(v)


def _positions(mask: Tensor | None) -> Tensor | None:
    """Returns a mask as the kernels read it in every layout: dense, (n, s), a byte each."""
    return None if mask is None else mask.contiguous()


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None or (v.is_contiguous() and not v.is_neg()) else v.resolve_neg().contiguous()


def _blocks(x: Tensor, layout: Layout, kind: str, mask: Tensor | None = None) -> Blocks:
    return blocks_of(*layout.flat_shape, x.itemsize, _device(x.device), kind, mask is not None)


def _scratch(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    programs, parts = blocks.grid
    scratch = scratch_of(x.device, parts * (2 * x.shape[1] + 1), programs)
    return scratch.partial, scratch.counter


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        slow_float64 = not properties.gcnArchName.startswith("gfx9")
    else:
        slow_float64 = (properties.major, properties.minor) not in _FAST_FLOAT64
    return Device(_PROGRAMS_A_PROCESSOR * properties.multi_processor_count, properties.warp_size, slow_float64)


def _is_error_free(x: Tensor) -> bool:
    return x.dtype != torch.float64 and _device(x.device).slow_float64


def _epilogue(epilogue: Epilogue) -> tuple[int, float, float]:
    """Returns the activation's number, the slope, and its inverse."""
    activation, slope, _ = epilogue
    if activation == "leaky_relu" and slope == 0:
        activation = "relu"  # so that of an infinite z it makes 0, not NaN
    return ACTIVATIONS.index(activation), slope, 1 / slope if slope else 0.0
