"""What a layer costs on a GPU, counted on fake tensors: messages, and that the host never waits."""

import pytest
import torch
from support.fake_layers import step_costs

from syncbn.kernels import Epilogue

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
    for found in step_costs(SHAPE, way=way, **KINDS[kind])[:2]:
        assert found.waits == {}
