"""The PyTorch frontend."""

from .checking import check_collectives
from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .layer import SyncBatchNorm
from .loss import scale_loss
from .masking import masked
from .noisy import NoisySyncBatchNorm
from .norm_act import SyncBatchNormAct
from .population import recalibrate
from .recomputation import checkpoint_contexts
from .uneven import even

__all__ = [
    "NoisySyncBatchNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "check_collectives",
    "checkpoint_contexts",
    "convert_sync_batchnorm",
    "even",
    "masked",
    "recalibrate",
    "revert_sync_batchnorm",
    "scale_loss",
]
