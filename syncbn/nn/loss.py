"""Losses over batches of unequal size."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..comm import Communicator, as_communicator, communicator_named, named_group
from .dispatch import is_traced
from .operators import in_order, library


def scale_loss(loss: Tensor, batch_size: float | Tensor, process_group: Any = None) -> Tensor:
    """Scales a rank's mean loss so that DistributedDataParallel's mean over ranks is the mean over all samples.

    loss * world_size * batch_size / sum(batch_size over ranks). DDP averages the ranks' gradients with equal weights;
    when rank r has n_r of N samples that is the gradient of the mean loss only after rank r's loss is scaled by W *
    n_r / N.

    Args:
        loss: the mean loss over this rank's samples, a scalar. With batch_size 0 it may be NaN; 0 is returned,
            still connected to the graph, so that backward runs and sends its messages on this rank as well.
        batch_size: the number of samples, or pixels, or whatever the mean is over, on this rank; at least 0. A
            number or a 0-d tensor, which is read.
        process_group: that of DDP; see syncbn.SyncBatchNorm.

    Returns:
        The scaled loss, for backward. Not the number to log: that is its mean over ranks, the mean over all samples.

    Collective:
        one all_reduce of 1 float64; every rank must call.

    Raises:
        TypeError: loss is no floating-point tensor, or batch_size no number.
        ValueError: loss is no scalar, or batch_size is negative or not finite.
        RuntimeError: another rank raised one of these; no rank is left waiting.
    """
    group = named_group(process_group)
    if is_traced(loss):
        size = _as_tensor(batch_size, loss.device)
        factor = torch.ops.syncbn.loss_factor.default(loss.detach(), size, group)
    else:
        factor = loss_factor(loss, batch_size, as_communicator(process_group))
    # Of no samples the mean may be NaN.
    scaled: Tensor = torch.where(factor == 0, loss.nan_to_num(), loss) * factor.to(loss.dtype)
    return scaled


def _as_tensor(batch_size: float | Tensor, device: torch.device) -> Tensor:
    """Returns batch_size for a graph; NaN, which the operator refuses on all ranks, for what is no number."""
    if isinstance(batch_size, Tensor):
        return batch_size.detach().to(device)
    is_number = isinstance(batch_size, (Real, torch.SymInt, torch.SymFloat))
    return torch.full((), batch_size if is_number else math.nan, dtype=torch.float64, device=device)


def loss_factor(loss: Tensor, batch_size: float | Tensor, comm: Communicator) -> Tensor:
    """Returns world_size * batch_size / sum(batch_size over ranks), () float64. See scale_loss."""
    device = loss.device if isinstance(loss, Tensor) else "cpu"
    try:
        number = _checked(loss, batch_size)
    except Exception as error:
        core.refuse(error, torch.empty(1, dtype=torch.float64, device=device), comm)
    total = torch.full((1,), number, dtype=torch.float64, device=device)
    comm.all_reduce(total)
    if total.is_cpu and total.isnan():
        raise RuntimeError(
            f"{core.rank_prefix(comm)}expected a batch_size from every rank; another rank raised an error instead: see "
            "that rank's message"
        )
    return comm.world_size * number / total[0].clamp(min=1e-300)


def _checked(loss: Tensor, batch_size: float | Tensor) -> float:
    """Refuses what is no mean loss over a batch; returns the size of the batch."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        kind = f"a tensor of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"expected loss to be a floating-point tensor; got {kind}: pass the loss before backward")
    if loss.dim():
        raise ValueError(f"expected loss to be a scalar; got shape {tuple(loss.shape)}: take its mean first")
    if isinstance(batch_size, Tensor) and not batch_size.dim():
        batch_size = batch_size.item()
    if not isinstance(batch_size, Real):
        raise TypeError(f"expected batch_size to be a number; got {type(batch_size).__name__}: pass len(images)")
    if not 0 <= batch_size < float("inf"):
        raise ValueError(f"expected a batch_size of at least 0; got {batch_size}: pass the number of samples here")
    return float(batch_size)


def _loss_factor(loss: Tensor, batch_size: Tensor, group: str) -> Tensor:
    factor: Tensor = in_order(lambda after: torch.ops.syncbn.loss_reduce.default(loss, batch_size, after, group))
    return factor


def _loss_reduce(loss: Tensor, batch_size: Tensor, after: Tensor | None, group: str) -> Tensor:
    return loss_factor(loss, batch_size, communicator_named(group))


library.define("loss_factor(Tensor loss, Tensor batch_size, str group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    "loss_reduce(Tensor loss, Tensor batch_size, Tensor? after, str group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("loss_factor", _loss_factor, "CompositeImplicitAutograd")
library.impl("loss_reduce", _loss_reduce, "CompositeExplicitAutograd")
torch.library.register_fake(
    "syncbn::loss_reduce", lambda loss, *_: loss.new_empty((), dtype=torch.float64), lib=library
)
