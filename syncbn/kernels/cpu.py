"""The kernels in C++, for CPU tensors and ndarrays alike: one pass over memory each, vectorised, threaded with OpenMP.

The library has a plain C interface on raw addresses (csrc/syncbn_cpu.h), so that one build serves every version of
torch, and the NumPy frontend as well. Loaded after torch, it shares torch's OpenMP threads. It is compiled for several
instruction sets and picks one at load. Element-wise results are the same bits as the aten kernels', except for silu.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

import numpy as np

from .. import native
from ..layout import Layout, layout_of
from .contract import Running, is_refused
from .epilogue import PLAIN, Epilogue, weight_floor


class _Codes(dict[Any, int]):
    """The library's number for each dtype of torch and NumPy, found by the dtype's name when it is first used."""

    def __missing__(self, dtype: Any) -> int:
        return self.setdefault(dtype, _NAMES.index(str(dtype).removeprefix("torch.")))


_NAMES = ("float64", "float32", "bfloat16", "float16")
_CODES = _Codes()
_ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 1, "silu": 2}


def _load() -> ctypes.CDLL | None:
    """Returns the compiled library, or None where there is none."""
    library = native.load("kernels._cpu")
    if library is None:
        if native.is_source_folder():  # hardly ever meant, and an order of magnitude slower
            warnings.warn(f"the kernels in C++ are not there: {native.absence()}", RuntimeWarning, stacklevel=2)
        return None
    pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
    array, epilogue = [integer, *[size] * 3], [integer, real, real]
    library.syncbn_isa.restype, library.syncbn_normalise.restype = ctypes.c_char_p, real
    library.syncbn_set_cache_bytes.restype = size
    for name, arguments in {
        "isa": [],
        "set_cache_bytes": [size],
        "prefer_huge_pages": [pointer, ctypes.c_size_t],
        "stats": [*array, *[pointer] * 4],
        "normalise": [*array, *[pointer] * 11, integer, real, real, *epilogue],
        "backward_reduce": [*array, *[pointer] * 11, *epilogue],
        "backward_elemt": [*array, *[pointer] * 8, *epilogue],
    }.items():
        getattr(library, f"syncbn_{name}").argtypes = arguments
    return library


_library: Any = _load()


def instruction_set() -> str | None:
    """Returns the instruction set in use (avx512, avx2 or baseline), or None where there is no compiled library."""
    return None if _library is None else _library.syncbn_isa().decode()


def serves(x: Any) -> bool:
    """Whether these kernels are there and take x, a torch tensor or an ndarray."""
    return _library is not None and (isinstance(x, np.ndarray) or getattr(x, "is_cpu", False))


def absence() -> str:
    """Returns why these kernels cannot be used in this process, and what to do, or ""."""
    return "" if _library is not None else native.absence()


def description() -> str:
    """What these kernels take and how they compute."""
    return f"CPU tensors and NumPy arrays, C++, instruction set {instruction_set()}"


def prefer_huge_pages(x: Any) -> None:
    """Asks the system for huge pages for a CPU tensor that is still to be written."""
    if _library is not None:
        _library.syncbn_prefer_huge_pages(x.data_ptr(), x.nbytes)


def stats(x: Any, center: Any, mask: Any = None) -> Any:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    layout = layout_of(x)
    (x,), valid = _dense(layout, x), _dense_mask(layout, mask)
    moments = _empty(x, 2 * layout.flat_shape[1] + 1)
    _library.syncbn_stats(_CODES[x.dtype], *layout.flat_shape, *_addresses(x, valid, center, moments))
    return moments


def normalise(
    x: Any,
    moments: Any,
    center: Any,
    running: Running,
    eps: float,
    weight: Any,
    bias: Any,
    y: Any,
    epilogue: Epilogue = PLAIN,
    residual: Any = None,
    mask: Any = None,
) -> float:
    """Statistics from the moments of all ranks; y = activation((x - mean) * (invstd * weight) + bias + residual)."""
    layout, code = layout_of(y), _CODES[x.dtype]
    (x, residual, out), valid = _dense(layout, x, residual, y), _dense_mask(layout, mask)
    weight, bias = _vectors(min(code, 1), weight, bias)
    mean, var, batches, momentum = running
    running_code = 0
    if mean is not None:
        # The library updates the buffers themselves if both are dense and of one dtype, else copies of them.
        running_code = _CODES[mean.dtype]
        if _CODES[var.dtype] != running_code:
            running_code = 0
        mean, var = _vectors(running_code, mean, var)
    if batches is not None and str(batches.dtype).removeprefix("torch.") != "int64":
        batches = None  # averages of checkpoints have made it a float, say; it is counted below
    count: float = _library.syncbn_normalise(
        code,
        *layout.flat_shape,
        *_addresses(x, residual, out, valid, moments, center, weight, bias, mean, var, batches),
        running_code,
        float(momentum),
        eps,
        *_epilogue(x, epilogue),
    )
    if is_refused(count):
        return count
    _copy_back(layout, out, y)
    if count:
        _update_rest(running, mean, var, batches)
    return count


def _update_rest(running: Running, mean: Any, var: Any, batches: Any) -> None:
    """Updates what the library could not: it was given mean, var and batches."""
    if mean is not running.mean:
        running.mean[...] = mean
    if var is not running.var:
        running.var[...] = var
    if batches is not running.num_batches_tracked:
        counter = running.num_batches_tracked
        counter += 1


def backward_reduce(
    dy: Any,
    x: Any,
    statistics: Any,
    weight: Any,
    bias: Any,
    grad_weight: Any = None,
    grad_bias: Any = None,
    epilogue: Epilogue = PLAIN,
    gate: Any = None,
    g: Any = None,
    mask: Any = None,
) -> Any:
    """Sums of g and of g * (x - mean) of one rank. See the package's contract."""
    layout, code = layout_of(x if g is None else g), _CODES[x.dtype]
    (dy, x, gate, out), valid = _dense(layout, dy, x, gate, g), _dense_mask(layout, mask)
    accumulate, c = min(code, 1), layout.flat_shape[1]
    weight, bias = _vectors(accumulate, weight, bias)
    sums = _empty(x, 2 * c)
    # The library writes gradients of the accumulate dtype itself, as most are.
    of_weight = None if grad_weight is None or _CODES[grad_weight.dtype] != accumulate else grad_weight
    of_bias = None if grad_bias is None or _CODES[grad_bias.dtype] != accumulate else grad_bias
    addresses = _addresses(dy, x, gate, out, valid, statistics, weight, bias, of_weight, of_bias, sums)
    _library.syncbn_backward_reduce(code, *layout.flat_shape, *addresses, *_epilogue(x, epilogue))
    _copy_back(layout, out, g)
    if of_weight is not grad_weight:
        grad_weight[...] = sums[c:] * statistics[c:-1]
    if of_bias is not grad_bias:
        grad_bias[...] = sums[:c]
    return sums


def backward_elemt(
    dy: Any,
    x: Any,
    statistics: Any,
    weight: Any,
    bias: Any,
    sums: Any,
    dx: Any,
    epilogue: Epilogue = PLAIN,
    mask: Any = None,
) -> None:
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    layout, code = layout_of(dx), _CODES[x.dtype]
    (dy, x, out), valid = _dense(layout, dy, x, dx), _dense_mask(layout, mask)
    weight, bias = _vectors(min(code, 1), weight, bias)
    addresses = _addresses(dy, x, out, valid, statistics, weight, bias, sums)
    _library.syncbn_backward_elemt(code, *layout.flat_shape, *addresses, *_epilogue(x, epilogue))
    _copy_back(layout, out, dx)


# The functions below run several times per layer and step. They avoid torch operations, each of which costs as much as
# the arithmetic of a tiny layer.


def _addresses(*arrays: Any) -> list[int | None]:
    """Returns the arrays' addresses, null for None."""
    if isinstance(arrays[0], np.ndarray):
        return [None if x is None else x.ctypes.data for x in arrays]
    return [None if x is None else x.data_ptr() or _null(x) for x in arrays]


def _null(x: Any) -> int:
    if x.numel():
        raise TypeError(f"expected tensors with memory; got a {type(x).__name__} without: convert it first")
    return 0


def _dense(layout: Layout, *arrays: Any) -> list[Any]:
    """Returns each array, or a copy where it has other strides than the layout or is misaligned; None for None."""
    if isinstance(arrays[0], np.ndarray):
        return [None if x is None else np.require(layout.flatten(x), requirements=("C", "A")) for x in arrays]
    strides = layout.strides
    return [
        x if x is None or (x.stride() == strides and not x.is_neg()) else layout.flatten(x).contiguous().resolve_neg()
        for x in arrays
    ]


def _dense_mask(layout: Layout, mask: Any) -> Any:
    """Returns a mask as dense (n, 1, s), a copy where it is not; None for None."""
    if mask is None:
        return None
    valid = layout.flatten_mask(mask)
    return np.ascontiguousarray(valid) if isinstance(valid, np.ndarray) else valid.contiguous()


def _copy_back(layout: Layout, out: Any, y: Any) -> None:
    """Copies out, which _dense returned for y, into y, unless they are the same memory."""
    if out is not y and _addresses(out) != _addresses(y):
        y[...] = layout.restore(out)


def _vectors(code: int, *vectors: Any) -> list[Any]:
    """Returns each vector, or a copy where it is not dense or not of that dtype; None for None."""
    return [v if v is None or (_CODES[v.dtype] == code and _is_dense(v)) else _cast(v, _NAMES[code]) for v in vectors]


def _is_dense(v: Any) -> bool:
    if isinstance(v, np.ndarray):
        return v.flags.c_contiguous and v.flags.aligned
    return v.is_contiguous() and not v.is_neg()


def _epilogue(x: Any, epilogue: Epilogue) -> tuple[int, float, float]:
    return _ACTIVATIONS[epilogue.activation], epilogue.slope, weight_floor(x.dtype) if epilogue.in_place else 0.0


def _cast(v: Any, name: str) -> Any:
    """Returns a dense copy of v of that dtype."""
    if isinstance(v, np.ndarray):
        return np.require(v, name, ("C", "A"))
    import torch

    return v.detach().to(getattr(torch, name)).contiguous().resolve_neg()


def _empty(like: Any, length: int) -> Any:
    """Returns a float64 vector of like's library."""
    if isinstance(like, np.ndarray):
        return np.empty(length)
    import torch

    return like.new_empty_strided((length,), (1,), dtype=torch.float64)  # on like's device, whatever the default is
