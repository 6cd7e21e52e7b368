"""The kernels in C++, for CPU tensors and ndarrays alike: one pass over memory each, vectorised, threaded with OpenMP.

The library has a plain C interface on raw addresses, so that one build serves every version of torch, and the NumPy
frontend as well. Loaded after torch, it shares torch's OpenMP threads. It is compiled for several instruction sets and
picks one at load. Element-wise results are the same bits as the aten kernels'.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import numpy as np

_DTYPES = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}


def _load() -> ctypes.CDLL | None:
    """Returns the compiled library, or None where the package was installed without a compiler."""
    # Where the import system finds it: in an editable install that is not beside this file.
    spec = importlib.util.find_spec(f"{__package__}._cpu")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
    shape = [size] * 3
    library.syncbn_isa.restype = ctypes.c_char_p
    for name, arguments in {
        "isa": [],
        "stats": [integer, pointer, *shape, pointer, pointer],
        "combine": [pointer, pointer, size, integer, pointer, pointer, integer, pointer, pointer, real, real],
        "elemt": [integer, pointer, pointer, *shape, *[pointer] * 4],
        "backward_reduce": [integer, pointer, pointer, *shape, pointer, pointer],
        "backward_elemt": [integer, *[pointer] * 3, *shape, *[pointer] * 5],
    }.items():
        getattr(library, f"syncbn_{name}").argtypes = arguments
    return library


_library: Any = _load()


def instruction_set() -> str | None:
    """Returns the instruction set in use (avx512, avx2 or baseline), or None where there is no compiled library."""
    return None if _library is None else _library.syncbn_isa().decode()


def serves(x: Any) -> bool:
    """Whether these kernels are there and take x, a torch tensor or an ndarray."""
    return _library is not None and (isinstance(x, np.ndarray) or x.device.type == "cpu")


def stats(x: Any, center: Any) -> Any:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    x = _dense(x)
    moments = _empty(x, 2 * x.shape[1] + 1, "float64")
    _library.syncbn_stats(_dtype(x), _address(x), *x.shape, _address(center), _address(moments))
    return moments


def combine(
    moments: Any, center: Any, dtype: Any, running_mean: Any, running_var: Any, momentum: Any, eps: float
) -> tuple[Any, Any, Any]:
    """Mean, invstd and count from the moments of all ranks. See the package's contract."""
    c = len(moments) // 2
    accumulate = "float64" if _name(dtype) == "float64" else "float32"
    mean, invstd = _empty(moments, c, "float64"), _empty(moments, c, accumulate)
    running = [v for v in (running_mean, running_var) if v is not None]
    # What the library updates in place: the buffers themselves where they are as it expects them.
    plain = all(_is_dense(v) and v.dtype == running_mean.dtype for v in running)
    updated = running if plain else [_vector(v, "float64") for v in running]
    buffers = (_dtype(updated[0]), *map(_address, updated)) if updated else (0, None, None)
    center = None if center is None else _vector(center, "float64")
    outputs = _DTYPES[accumulate], _address(mean), _address(invstd)
    _library.syncbn_combine(_address(moments), _address(center), c, *outputs, *buffers, float(momentum), eps)
    if not plain:
        running_mean[...], running_var[...] = updated
    return mean, invstd, moments[-1:].reshape(())


def elemt(x: Any, mean: Any, invstd: Any, weight: Any, bias: Any, y: Any) -> None:
    """The result: y = (x - mean) * (invstd * weight) + bias. See the package's contract."""
    x, out = _dense(x), _dense(y)
    vectors = mean, invstd, _vector(weight, _name(invstd.dtype)), _vector(bias, _name(invstd.dtype))
    _library.syncbn_elemt(_dtype(x), _address(x), _address(out), *x.shape, *map(_address, vectors))
    if out is not y:
        y[...] = out


def backward_reduce(dy: Any, x: Any, mean: Any) -> Any:
    """Sums of dy and of dy * (x - mean) of one rank. See the package's contract."""
    dy, x = _dense(dy), _dense(x)
    sums = _empty(x, 2 * x.shape[1], "float64")
    _library.syncbn_backward_reduce(_dtype(x), _address(dy), _address(x), *x.shape, _address(mean), _address(sums))
    return sums


def backward_elemt(dy: Any, x: Any, mean: Any, invstd: Any, count: Any, weight: Any, sums: Any, dx: Any) -> None:
    """The gradient: dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)."""
    dy, x, out = _dense(dy), _dense(x), _dense(dx)
    vectors = mean, invstd, count, _vector(weight, _name(invstd.dtype)), sums
    _library.syncbn_backward_elemt(_dtype(x), *map(_address, (dy, x, out)), *x.shape, *map(_address, vectors))
    if out is not dx:
        dx[...] = out


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(x: Any) -> int:
    return _DTYPES[_name(x.dtype)]


def _address(x: Any) -> int | None:
    if x is None:
        return None
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


def _is_dense(x: Any) -> bool:
    return x.flags.carray if isinstance(x, np.ndarray) else x.is_contiguous()


def _dense(x: Any) -> Any:
    """Returns x, or a copy in C order where x has other strides or a misaligned address."""
    return np.require(x, requirements=("C", "A")) if isinstance(x, np.ndarray) else x.contiguous()


def _vector(v: Any, dtype: str) -> Any:
    """Returns v in that dtype and C order, or None for None."""
    if v is None or (_name(v.dtype) == dtype and _is_dense(v)):
        return v
    if isinstance(v, np.ndarray):
        return np.ascontiguousarray(v, dtype)
    import torch

    return v.detach().to(getattr(torch, dtype)).contiguous()


def _empty(like: Any, length: int, dtype: str) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(length, dtype)
    import torch

    return torch.empty(length, dtype=getattr(torch, dtype))
