"""The kernels in Triton, for CUDA and ROCm: one launch each, sums in float64, no host synchronisation.

With the two messages, a layer is two launches each way. Element-wise arithmetic is the contract's, operation by
operation; partial sums are added in an order that does not depend on timing, so that every run gives the same bits.

The kernels themselves, in calls.py, are imported when one of them is first asked for: only then Triton is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import presence


def serves(x: Any) -> bool:
    """Whether these kernels take x: a floating tensor on a GPU for which Triton compiles."""
    return isinstance(x, Tensor) and presence.serves(x)


def absence() -> str:
    """Returns why these kernels cannot be used in this process, and what to do, or ""."""
    return presence.absence()


def description() -> str:
    """What these kernels take and how they compute."""
    return "torch tensors on CUDA and ROCm devices, in Triton: one launch a kernel"


def __getattr__(name: str) -> Any:
    if name not in ("stats", "normalise", "backward_reduce", "backward_elemt"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import calls

    kernel = globals()[name] = getattr(calls, name)
    return kernel
