"""Synchronised batch normalisation for data-parallel training, on CPUs and accelerators.

P ranks compute what one rank computes on the concatenated batch. Names are bound when first used, so that
`import syncbn.numpy` loads neither torch nor mpi4py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import comm as comm
    from . import functional as functional
    from . import lightning as lightning
    from . import numpy as numpy
    from .deferred import synchronize_errors as synchronize_errors
    from .nn import NoisySyncBatchNorm as NoisySyncBatchNorm
    from .nn import SyncBatchNorm as SyncBatchNorm
    from .nn import SyncBatchNormAct as SyncBatchNormAct
    from .nn import check_collectives as check_collectives
    from .nn import checkpoint_contexts as checkpoint_contexts
    from .nn import convert_sync_batchnorm as convert_sync_batchnorm
    from .nn import even as even
    from .nn import masked as masked
    from .nn import recalibrate as recalibrate
    from .nn import revert_sync_batchnorm as revert_sync_batchnorm
    from .nn import scale_loss as scale_loss
    from .profiling import profile as profile
    from .world import World as World
    from .world import init_process_group as init_process_group

__version__ = "0.1.0"
__all__ = [
    "NoisySyncBatchNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "World",
    "__version__",
    "check_collectives",
    "checkpoint_contexts",
    "comm",
    "convert_sync_batchnorm",
    "even",
    "functional",
    "init_process_group",
    "lightning",
    "masked",
    "numpy",
    "profile",
    "recalibrate",
    "revert_sync_batchnorm",
    "scale_loss",
    "synchronize_errors",
]
_ROOMS = {  # others: .nn
    "World": ".world",
    "init_process_group": ".world",
    "profile": ".profiling",
    "synchronize_errors": ".deferred",
}


def __getattr__(name: str) -> Any:
    if name in ("comm", "functional", "lightning", "numpy"):
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        room = _ROOMS.get(name, ".nn")
        return getattr(importlib.import_module(room, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
