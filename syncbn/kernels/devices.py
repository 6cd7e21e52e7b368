"""Which devices can sum in float64."""

from __future__ import annotations

import functools
from typing import Any

_HAVE_FLOAT64 = ("cpu", "cuda", "meta")


@functools.cache
def has_float64(device: Any) -> bool:
    """Whether a torch.device computes in float64. Apple's GPUs (mps) do not, nor do some of Intel's (xpu)."""
    if device.type in _HAVE_FLOAT64:
        return True
    import torch

    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):  # of the device's own words: it refuses to allocate, or to compute
        return False
    return True
