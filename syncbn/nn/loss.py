"""Losses over batches of unequal size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import as_communicator


def scale_loss(loss: Tensor, batch_size: int, process_group: Any = None) -> Tensor:
    """Scales a rank's mean loss so that DistributedDataParallel's mean over ranks is the mean over all samples.

    loss * world_size * batch_size / sum(batch_size over ranks). DDP averages the ranks' gradients with equal weights;
    when rank r has n_r of N samples that is the gradient of the mean loss only after rank r's loss is scaled by W *
    n_r / N.

    Args:
        loss: the mean loss over this rank's samples, a scalar. With batch_size 0 it may be NaN; 0 is returned,
            still connected to the graph, so that backward runs and sends its messages on this rank as well.
        batch_size: the number of samples, or pixels, or whatever the mean is over, on this rank; at least 0.
        process_group: that of DDP; see syncbn.SyncBatchNorm.

    Returns:
        The scaled loss, for backward. Its mean over ranks is the global mean loss.

    Collective:
        one all_reduce of 1 float64; every rank must call.

    Raises:
        ValueError: a negative batch_size, after the message, on the rank that gave it.
    """
    comm = as_communicator(process_group)
    total = torch.tensor([float(batch_size)], dtype=torch.float64, device=loss.device)
    comm.all_reduce(total)
    if batch_size < 0:
        raise ValueError(
            f"expected a batch_size of at least 0; got {batch_size}: pass the number of samples of this rank"
        )
    if batch_size == 0:
        return loss.nan_to_num() * 0.0
    return loss * (comm.world_size * batch_size / total[0]).to(loss.dtype)
