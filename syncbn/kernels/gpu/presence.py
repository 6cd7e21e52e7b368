"""Whether the GPU kernels can be used: on which devices Triton is there, and compiles."""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_MISSING = "Triton is not installed: run `pip install triton`"

# By the device's index: why the kernels cannot be used there, or "".
_tried: dict[int, str] = {}


def is_interpreted() -> bool:
    """Whether Triton interprets its functions, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(x: Tensor) -> bool:
    """Whether the kernels take x."""
    if x.dtype not in _DTYPES:
        return False
    if not x.is_cuda:
        return x.is_cpu and is_interpreted()
    index = x.device.index
    reason = _tried.get(index)
    if reason is None:
        if not torch.cuda.is_available():  # x has no memory: a fake
            return False
        if torch.cuda.is_current_stream_capturing():
            return _is_installed()  # to compile is not to be tried within a capture
        reason = _tried[index] = _try(x.device)
        if reason:
            warnings.warn(
                f"expected the Triton kernels to serve {x.device}; plain torch operations do, many times slower: "
                f"{reason}",
                RuntimeWarning,
                stacklevel=2,
            )
    return not reason


def absence() -> str:
    """Returns why the kernels cannot be used in this process, and what to do, or ""."""
    if not _is_installed():
        return _TRITON_MISSING
    if is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device: see torch.cuda.is_available()"
    index = torch.cuda.current_device()
    if index not in _tried:
        _tried[index] = _try(torch.device("cuda", index))
    return _tried[index]


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _try(device: torch.device) -> str:
    """Runs a kernel on the device; returns why that failed, or ""."""
    if not _is_installed():
        return _TRITON_MISSING
    try:
        from . import calls

        with _disable_current_modes():  # of fakes, say: nothing would be computed
            found = calls.stats(torch.ones(2, 1, 3, device=device), None).tolist()
    except Exception as error:  # whatever a compiler, a driver or a version that does not fit may raise
        return f"Triton does not work here ({type(error).__name__}: {error}): see that it and a C compiler do"
    return "" if found == [6.0, 6.0, 6.0] else f"expected Triton to sum to [6, 6, 6] here; got {found}: update Triton"
