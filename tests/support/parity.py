"""The law: P ranks equal one rank on the concatenated batch. Written once, for threads, Gloo and MPI.

assert_parity("gloo", [1, 0, 5], torch_step)
assert_control("gloo", [3, 3], torch_step)  # that the assertion can fail
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from support import oracle
from support.ranks import run_ranks
from support.steps import assert_equals_whole_batch, batch, distances, numpy_step, torch_layer, torch_step
from syncbn.comm import LocalCommunicator

STEPS = [torch_step, numpy_step]
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def splits(world_size: int) -> dict[str, list[int]]:
    """Returns batch sizes for the ranks, by name."""
    return {
        "even": [3] * world_size,
        "uneven": [1 + 2 * rank for rank in range(world_size)],
        "one_empty": [0 if rank == world_size // 2 else 2 + rank for rank in range(world_size)],
    }


def every_case(splits: dict[str, list[int]]) -> Callable[[Any], Any]:
    """Decorates a test of (step, sizes, dtype), to run on each frontend, split and dtype."""

    def decorate(test: Any) -> Any:
        for names, values, ids in (
            ("step", STEPS, None),
            ("sizes", list(splits.values()), list(splits)),
            ("dtype", DTYPES, None),
        ):
            test = pytest.mark.parametrize(names, values, ids=ids)(test)
        return test

    return decorate


def assert_parity(
    launcher: str,
    sizes: list[int],
    step: Callable[..., Any],
    dtype: str = "float32",
    channels: int = 3,
    spatial: tuple[int, ...] = (3, 5),
    mean: float = 2.0,
    arguments: tuple[Any, ...] = (),
) -> None:
    """Asserts that a step on ranks with batches of these sizes is one on the whole batch.

    Args:
        launcher: of run_ranks.
        sizes: the batch size of each rank.
        step: torch_step, numpy_step, or what has their arguments.
        dtype: of the input; NumPy, which has no bfloat16, gets float16 instead.
        channels, spatial, mean: of the input.
        arguments: for step, after dtype.
    """
    if step is numpy_step and dtype == "bfloat16":
        dtype = "float16"
    xs, dys = batch(1, [(n, channels, *spatial) for n in sizes], dtype, mean=mean)
    assert_equals_whole_batch(run_ranks(step, len(sizes), launcher, xs, dys, dtype, *arguments), xs, dys, dtype)


def assert_control(launcher: str, sizes: list[int], step: Callable[..., Any]) -> None:
    """Asserts that ranks which do not synchronise are far from the whole batch: the negative control of assert_parity.

    Args:
        launcher, sizes: as assert_parity.
        step: torch_step or numpy_step, whose layers are then in worlds of one, or batch_norm_step.
    """
    xs, dys = batch(1, [(n, 3, 3, 5) for n in sizes])
    results = run_ranks(_alone, len(sizes), launcher, xs, dys, step)
    worst = distances(results, xs, dys)
    # Gradients of bias are sums over a rank's own elements: right without any message.
    assert {name for name in oracle.FIELDS if worst[name] > 1000} == {*oracle.FIELDS} - {"grad_bias"}, worst
    with pytest.raises(AssertionError, match="times as far from the truth as its arithmetic explains"):
        assert_equals_whole_batch(results, xs, dys)


def batch_norm_step(rank: int, group: Any, xs: list[np.ndarray], dys: list[np.ndarray]) -> dict[str, Any]:
    """As torch_step, of nn.BatchNorm2d."""
    return torch_step(rank, group, xs, dys, layer=torch_layer(xs[0].shape[1], "float32", nn.BatchNorm2d))


def _alone(rank: int, group: Any, xs: list[Any], dys: list[Any], step: Callable[..., Any]) -> dict[str, Any]:
    return step(rank, _world_of_one(group), xs, dys)


def _world_of_one(group: Any) -> Any:
    """Returns a group of this rank alone: of MPI where the ranks are MPI's, for it must count as one, too."""
    if hasattr(group, "Get_rank"):
        from mpi4py import MPI

        return MPI.COMM_SELF
    return LocalCommunicator()
