"""P ranks equal one rank on the concatenated batch, for every split, dtype and memory format: the law."""

import pytest
import torch
from support.parity import STEPS, assert_control, assert_parity, batch_norm_step, every_case
from support.ranks import run_ranks
from support.steps import batch, torch_step

SPLITS = {
    "one": [6],
    "two_even": [3, 3],
    "two_uneven": [1, 6],
    "three_one_empty": [2, 0, 4],
    "seven_even": [2] * 7,
    "seven_mixed": [1, 0, 3, 0, 1, 5, 2],
}
SPATIAL = {"2d": (), "3d": (5,), "4d": (3, 5), "5d": (2, 3, 2)}


@every_case(SPLITS)
def test_every_split_equals_the_whole_batch(step, sizes, dtype):
    assert_parity("thread", sizes, step, dtype)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("split", ["one", "two_uneven", "three_one_empty"])
def test_every_number_of_axes_equals_the_whole_batch(split, spatial):
    for step in STEPS:
        assert_parity("thread", SPLITS[split], step, spatial=SPATIAL[spatial])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("split", ["two_uneven", "three_one_empty"])
def test_processes_over_gloo_equal_the_whole_batch(step, split):
    assert_parity("gloo", SPLITS[split], step)


@pytest.mark.parametrize("launcher", ["thread", "gloo"])
@pytest.mark.parametrize("step", [batch_norm_step, *STEPS])
def test_unsynchronised_layers_differ_from_the_whole_batch(step, launcher):
    assert_control(launcher, SPLITS["two_even"], step)


@pytest.mark.parametrize(
    "formats", [(a, b) for a in ("contiguous", "channels_last") for b in ("strided", "channels_last")]
)
def test_batches_larger_than_a_tile_equal_the_whole_batch(formats, monkeypatch):
    from syncbn.kernels import aten, cpu

    monkeypatch.setattr(cpu, "_library", None)  # tiles are those of the aten kernels
    monkeypatch.setattr(aten, "_TILE_CPU", 40)
    assert_parity("thread", [3, 2], torch_step, channels=7, spatial=(9, 5), arguments=(None, formats))


def _messages(rank, group, xs, dys, dtype):
    torch_step(rank, group, xs, dys, dtype)
    return group.messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_one_float64_message_goes_forward_and_one_backward(dtype):
    xs, dys = batch(5, [(n, 4, 3, 5) for n in SPLITS["three_one_empty"]], dtype)
    forward = [(torch.float64, 9)] * (2 if dtype == "float64" else 1)
    assert run_ranks(_messages, 3, "thread", xs, dys, dtype) == [[*forward, (torch.float64, 8)]] * 3
