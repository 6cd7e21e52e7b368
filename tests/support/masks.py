"""The law under masks: P ranks equal one process on the valid positions of all of them, gathered into one batch.

What is not valid holds NaN and infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import syncbn
import syncbn.numpy
from support import oracle
from support.ranks import run_ranks
from support.steps import DTYPES, assert_equals_whole_batch, batch, distances, in_format, parameters, torch_layer

KINDS = ("random", "padding", "nothing", "all", None)


def mask_of(kind: str | None, n: int, spatial: tuple[int, ...], seed: int = 0) -> Any:
    """Returns a mask, (n, 1, *spatial), or None: of lengths along the last axis, for padding."""
    rng = np.random.default_rng(seed)
    full = (n, 1, *spatial)
    if kind is None:
        return None
    if kind == "padding":
        lengths = rng.integers(0, spatial[-1] + 1, n).reshape(n, *[1] * (len(full) - 1))
        return np.broadcast_to(np.arange(spatial[-1]) < lengths, full).copy()
    return rng.random(full) < {"random": 0.6, "nothing": -1.0, "all": 2.0}[kind]


def spoilt(v: Any, mask: Any) -> Any:
    """Returns v with NaN and infinities where nothing is valid."""
    return v if mask is None else np.where(mask, v, np.resize(np.array([np.nan, np.inf, -np.inf]), v.shape))


def gathered(v: Any, mask: Any) -> Any:
    """Returns the valid positions of v, (N, C, *), as (valid, C)."""
    v = np.moveaxis(np.asarray(v), 1, -1)
    return v.reshape(-1, v.shape[-1]) if mask is None else v[mask[:, 0]]


def torch_masked_step(
    rank: int,
    group: Any,
    xs: list[Any],
    dys: list[Any],
    dtype: str,
    masks: list[Any],
    format: str = "contiguous",
) -> dict[str, Any]:
    """As steps.torch_step, with a mask; the results of valid positions, (valid, C), after a look at the others."""
    mask = masks[rank]
    layer = torch_layer(xs[0].shape[1], dtype)
    layer.process_group = group
    x, dy = (in_format(torch.from_numpy(spoilt(v[rank], mask)).to(DTYPES[dtype]), format) for v in (xs, dys))
    x.requires_grad_()
    y = layer(x, None if mask is None else torch.from_numpy(mask))
    y.register_hook(lambda _: dy)
    y.sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return _valid({name: v.double().numpy() for name, v in found.items()}, mask, layer.num_batches_tracked)


def numpy_masked_step(
    rank: int,
    group: Any,
    xs: list[Any],
    dys: list[Any],
    dtype: str,
    masks: list[Any],
    format: str = "contiguous",
) -> dict[str, Any]:
    """As torch_masked_step, of the NumPy frontend."""
    mask, c = masks[rank], xs[0].shape[1]
    layer = syncbn.numpy.SyncBatchNorm(c, comm=group, dtype=dtype if dtype == "float64" else "float32")
    layer.weight[...], layer.bias[...] = parameters(c)
    y = layer.forward(spoilt(xs[rank], mask).astype(dtype), mask)
    dx = layer.backward(spoilt(dys[rank], mask).astype(dtype))
    found = {name: np.asarray(getattr(layer, name), np.float64) for name in oracle.FIELDS[2:]}
    return _valid(found | {"y": y.astype(np.float64), "dx": dx.astype(np.float64)}, mask, layer.num_batches_tracked)


def _valid(found: dict[str, Any], mask: Any, batches: Any) -> dict[str, Any]:
    for name in ("y", "dx"):
        if mask is not None:
            assert not found[name][~mask.repeat(found[name].shape[1], 1)].any(), f"{name} is not 0 elsewhere"
        found[name] = gathered(found[name], mask)
    return found | {"batches": int(batches)}


MASKED_STEPS = [torch_masked_step, numpy_masked_step]


def masked_batch(sizes: list[int], kinds: list[str | None], dtype: str, spatial: tuple[int, ...] = (4, 5)) -> Any:
    """Returns xs, dys and masks of ranks, and the gathered xs and dys."""
    xs, dys = batch(1, [(n, 3, *spatial) for n in sizes], dtype, mean=2.0)
    masks = [mask_of(kind, n, spatial, i) for i, (kind, n) in enumerate(zip(kinds, sizes, strict=True))]
    valid = [[gathered(v, m) for v, m in zip(vs, masks, strict=True)] for vs in (xs, dys)]
    return xs, dys, masks, *valid


def assert_masked_parity(
    launcher: str,
    sizes: list[int],
    kinds: list[str | None],
    step: Any,
    dtype: str = "float32",
    format: str = "contiguous",
) -> None:
    """Asserts that a masked step on ranks is one on the valid positions of all of them."""
    if step is numpy_masked_step and dtype == "bfloat16":
        dtype = "float16"
    xs, dys, masks, *valid = masked_batch(sizes, kinds, dtype)
    results = run_ranks(step, len(sizes), launcher, xs, dys, dtype, masks, format)
    assert_equals_whole_batch(results, *valid, dtype)


class MeanOfMeans:
    """A communicator, the negative control: each rank's means count alike, however many positions are valid there."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.world_size = group, group.rank, group.world_size
        self.share = 1.0

    def all_reduce(self, buffer: Any, label: Any = None) -> None:
        if len(buffer) % 2:
            own = float(buffer[-1])
            total = buffer[-1:] + 0.0
            self.group.all_reduce(total)
            self.share = float(total[0]) / self.world_size / own
        elements = slice(0, len(buffer) // 2 * 2)
        buffer[elements] *= self.share
        self.group.all_reduce(buffer, label)


def mean_of_means_step(rank: int, group: Any, *arguments: Any) -> dict[str, Any]:
    """As torch_masked_step, over MeanOfMeans."""
    return torch_masked_step(rank, MeanOfMeans(group), *arguments)


def worst_of(step: Any, sizes: list[int], kinds: list[str | None]) -> dict[str, float]:
    """Returns how far a step on threads is from the truth, for each quantity, in units of what is permitted."""
    xs, dys, masks, *valid = masked_batch(sizes, kinds, "float32")
    return distances(run_ranks(step, len(sizes), "thread", xs, dys, "float32", masks), *valid)
