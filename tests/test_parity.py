"""P ranks equal one rank on the concatenated batch, for every split, dtype and memory format: the law."""

import pytest
import torch
from support.ranks import run_ranks
from support.steps import assert_equals_whole_batch, batch, distances, numpy_step, torch_layer, torch_step
from torch import nn

SPLITS = {
    "one": [6],
    "two_even": [3, 3],
    "two_uneven": [1, 6],
    "three_one_empty": [2, 0, 4],
    "seven_even": [2] * 7,
    "seven_mixed": [1, 0, 3, 0, 1, 5, 2],
}
SPATIAL = {"2d": (), "3d": (5,), "4d": (3, 5), "5d": (2, 3, 2)}


def shapes_of(split, spatial="4d", c=3):
    return [(n, c, *SPATIAL[spatial]) for n in SPLITS[split]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("step", [torch_step, numpy_step])
def test_every_split_equals_the_whole_batch(step, split, dtype):
    if step is numpy_step and dtype == "bfloat16":
        dtype = "float16"  # NumPy has no bfloat16
    xs, dys = batch(1, shapes_of(split), dtype, mean=2.0)
    results = run_ranks(step, len(xs), "thread", xs, dys, dtype)
    assert_equals_whole_batch(results, xs, dys, dtype)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("split", ["one", "two_uneven", "three_one_empty"])
def test_every_number_of_axes_equals_the_whole_batch(split, spatial):
    xs, dys = batch(2, shapes_of(split, spatial))
    assert_equals_whole_batch(run_ranks(torch_step, len(xs), "thread", xs, dys), xs, dys)
    assert_equals_whole_batch(run_ranks(numpy_step, len(xs), "thread", xs, dys), xs, dys)


@pytest.mark.parametrize("step", [torch_step, numpy_step])
@pytest.mark.parametrize("split", ["two_uneven", "three_one_empty"])
def test_processes_over_gloo_equal_the_whole_batch(step, split):
    xs, dys = batch(3, shapes_of(split))
    assert_equals_whole_batch(run_ranks(step, len(xs), "gloo", xs, dys), xs, dys)


def _unsynchronised_step(rank, group, xs, dys):
    return torch_step(rank, group, xs, dys, layer=torch_layer(xs[0].shape[1], "float32", nn.BatchNorm2d))


def test_unsynchronised_batch_norm_differs_from_the_whole_batch():
    xs, dys = batch(1, shapes_of("two_even"))
    worst = distances(run_ranks(_unsynchronised_step, 2, "thread", xs, dys), xs, dys)
    assert all(worst[name] > 1000 for name in ("y", "dx", "grad_weight", "running_mean", "running_var")), worst


@pytest.mark.parametrize(
    "formats", [(a, b) for a in ("contiguous", "channels_last") for b in ("strided", "channels_last")]
)
def test_batches_larger_than_a_tile_equal_the_whole_batch(formats, monkeypatch):
    from syncbn.kernels import aten, cpu

    monkeypatch.setattr(cpu, "_library", None)  # tiles are those of the aten kernels
    monkeypatch.setattr(aten, "_TILE_CPU", 40)
    xs, dys = batch(4, [(3, 7, 9, 5), (2, 7, 9, 5)])
    assert_equals_whole_batch(run_ranks(torch_step, 2, "thread", xs, dys, "float32", None, formats), xs, dys)


def _messages(rank, group, xs, dys, dtype):
    torch_step(rank, group, xs, dys, dtype)
    return group.messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_one_float64_message_goes_forward_and_one_backward(dtype):
    xs, dys = batch(5, shapes_of("three_one_empty", c=4), dtype)
    forward = [(torch.float64, 9)] * (2 if dtype == "float64" else 1)
    assert run_ranks(_messages, 3, "thread", xs, dys, dtype) == [[*forward, (torch.float64, 8)]] * 3
