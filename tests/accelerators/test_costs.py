"""What a layer costs on a GPU by the aten kernels, counted on fake tensors."""

import pytest
import torch
from support.fake_layers import step_costs

from syncbn.kernels import Epilogue, aten, selection

SHAPE = (32, 256, 56, 56)
KINDS = {
    "plain": {},
    "contiguous": {"channels_last": False},
    "float32": {"dtype": torch.float32},
    "relu": {"epilogue": Epilogue("relu")},
    "residual": {"epilogue": Epilogue("relu"), "residual": True},
    "silu": {"epilogue": Epilogue("silu"), "residual": True},
    "leaky_relu": {"epilogue": Epilogue("leaky_relu", 0.1)},
    "average": {"momentum": None},
}


SMALL, LARGE = (32, 2048, 7, 7), (64, 64, 256, 256)  # in one tile; in 64 for sums
# Launches for a layer's vectors, whatever the batch, and for each tile of sums and of element-wise work.
FORWARD, BACKWARD = {"constants": 29, "sums": 2, "elements": 3}, {"constants": 16, "sums": 3, "elements": 5}


@pytest.fixture(autouse=True)
def _aten(monkeypatch):
    """Whatever else could serve a GPU."""
    monkeypatch.setattr(selection, "_FORCED", "aten")


@pytest.fixture(params=["eager", "operators"])
def way(request):
    return request.param


@pytest.mark.parametrize("world_size", [2, 8, 4096])
def test_one_message_each_way_whatever_the_number_of_ranks(world_size, way):
    step = step_costs(SHAPE, world_size=world_size, way=way)
    assert step.forward.messages == [("allreduce_", torch.float64, 8 * (2 * 256 + 1))]
    assert step.backward.messages == [("allreduce_", torch.float64, 8 * 2 * 256)]


def test_float64_sends_two_messages_forward(way):
    step = step_costs(SHAPE, torch.float64, way=way)
    assert [m.bytes for m in step.forward.messages] == [8 * (2 * 256 + 1)] * 2
    assert [m.bytes for m in step.backward.messages] == [8 * 2 * 256]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits_for_the_device(kind, way):
    """Nor does it upload anything, which waits, too, and cannot be captured in a CUDA graph."""
    for found in step_costs(SHAPE, way=way, **KINDS[kind])[:2]:
        assert (found.waits, found.uploads) == ({}, [])


def test_the_count_of_all_ranks_goes_to_the_host_and_nothing_else_does(way):
    step = step_costs(SHAPE, way=way)
    assert (step.forward.downloads, step.backward.downloads) == (1, 0)
    assert step_costs(SHAPE, world_size=1, way=way).forward.downloads == 0  # known


def tiles(shape, itemsize):
    elements = torch.Size(shape).numel()
    return -(-elements * itemsize // aten._TILE_BYTES_ACCELERATOR)


@pytest.mark.parametrize("shape", [SMALL, SHAPE, LARGE])
def test_launches_are_few(shape, way):
    step = step_costs(shape, way=way)
    for found, most in zip(step[:2], (FORWARD, BACKWARD), strict=True):
        wide, narrow = tiles(shape, 8), tiles(shape, 4)
        assert found.launched <= most["constants"] + most["sums"] * wide + most["elements"] * narrow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SMALL, SHAPE])
def test_no_float64_temporary_is_larger_than_a_tile(shape, kind, way):
    """By torch's own conversions neither (see test_fake_devices)."""
    for found in step_costs(shape, way=way, **KINDS[kind])[:2]:
        assert 0 < found.largest_wide * 8 <= aten._TILE_BYTES_ACCELERATOR


def test_bytes_moved_are_bounded(way):
    """By what the operations read and write an element of bfloat16, most of it in caches, for tiles are small."""
    to_float64, product, sums, added, product_added = 2 + 8, 8 + 2 + 8, 8 + 8, 8 + 2 + 8, 8 + 2 + 2 + 8
    first, later = to_float64 + product + sums, added + product_added
    minus_mean, in_place, narrow = 2 + 4, 4 + 4, 4 + 2
    forward = max(first, later) + minus_mean + in_place + narrow  # x - mean, times scale, plus bias
    exact_minus_mean, wide_product = 2 + 8, 6 + 6  # which the products have beside those of forward
    backward = max(first, later) + exact_minus_mean + wide_product
    backward += minus_mean + in_place + (2 + 4 + 4) + in_place + narrow  # times slope, dy less that, less a constant
    step = step_costs(SHAPE, way=way)
    vectors = 2**20
    assert step.forward.moved_bytes <= forward * step.input_bytes // 2 + vectors
    assert step.backward.moved_bytes <= backward * step.input_bytes // 2 + vectors


def test_in_place_work_costs_no_more_memory():
    for found in step_costs(SHAPE, epilogue=Epilogue("leaky_relu", 0.1, in_place=True))[:2]:
        assert (found.waits, found.uploads) == ({}, [])
        assert found.largest_wide * 8 <= aten._TILE_BYTES_ACCELERATOR


def test_an_empty_rank_launches_only_for_the_constants(way):
    step = step_costs((0, 256, 56, 56), channels_last=False, way=way)
    assert step.forward.launched <= FORWARD["constants"]
    assert step.backward.launched <= BACKWARD["constants"]
    assert [m.bytes for m in (*step.forward.messages, *step.backward.messages)] == [8 * 513, 8 * 512]
