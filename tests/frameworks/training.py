"""Models of other libraries, trained over two ranks of Gloo under DDP, and by one process on the concatenated batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from support.ranks import run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

RANKS, STEPS, PER_RANK = 2, 2, 2

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all ranks' images and classes of a step."""
    generator = torch.Generator().manual_seed(step)
    samples = RANKS * PER_RANK
    images = torch.randn(samples, 3, 64, 64, dtype=torch.float64, generator=generator)
    return images, torch.arange(samples) % 3


def train(model: nn.Module, loss: Loss, rank: int | None = None, turned: int = 0) -> dict[str, torch.Tensor]:
    """Trains a model, on one rank's part of the batches or on all, and returns its state.

    Args:
        turned: by how many the order of a batch's samples is turned, of which the result depends by rounding alone.
    """
    model = model.double().train()
    module: Any = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        images, classes = (v.roll(turned, 0) for v in batch(step))
        if rank is not None:
            images, classes = images.chunk(RANKS)[rank], classes.chunk(RANKS)[rank]
        optimizer.zero_grad()
        loss(module, images, classes).backward()
        optimizer.step()
    return {name: v.double() for name, v in model.state_dict().items()}


def _rank(rank: int, _: Any, build: Build, convert: Any, loss: Loss) -> tuple[dict[str, torch.Tensor], int]:
    warnings.simplefilter("ignore")  # of those libraries
    model = convert(made(build))
    layers = sum(isinstance(module, syncbn.SyncBatchNorm) for module in model.modules())
    return train(model, loss, rank), layers


def made(build: Build) -> nn.Module:
    """Returns build(), the same on every rank."""
    torch.manual_seed(0)
    return build()


def as_it_is(model: nn.Module) -> nn.Module:
    """Leaves a model unsynchronised."""
    return model


def check_parity(build: Build, loss: Loss, convert: Any = syncbn.convert_sync_batchnorm) -> int:
    """Asserts that two ranks equal one process, and that without conversion they do not. Returns how many layers.

    Deep networks on few samples multiply roundoff: one process whose samples are in another order shows by how much.
    Ranks may differ by 8 times that, where it is more than the bound of shallow ones.
    """
    whole = train(made(build), loss)
    rounding = difference(train(made(build), loss, turned=1), whole)
    results = run_ranks(_rank, RANKS, "gloo", build, convert, loss, timeout=300)
    for state, _ in results:
        assert difference(state, whole) < max(TRAINING, 8 * rounding)
    for state, _ in run_ranks(_rank, RANKS, "gloo", build, as_it_is, loss, timeout=300):
        assert difference(state, whole) > UNSYNCHRONISED
    return results[0][1]
