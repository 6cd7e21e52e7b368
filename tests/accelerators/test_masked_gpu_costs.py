"""What a mask costs on a GPU by the Triton kernels, counted on fake tensors: nothing but reading it."""

import importlib.util

import pytest
import torch
from support.fake_devices import costs, fake_cuda, ranks_of_fakes
from test_gpu_costs import launches as launches

from syncbn import core
from syncbn.comm import GroupHandle
from syncbn.core import Running
from syncbn.kernels import PLAIN, Epilogue, gpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

N, C, H, W = SHAPE = (32, 64, 56, 56)
KINDS = {
    "plain": ({}, 3, 5),
    "contiguous": ({"memory_format": torch.contiguous_format}, 3, 5),
    "residual": ({"epilogue": Epilogue("relu"), "has_residual": True}, 4, 7),
}


def step(
    mask_shape=(N, 1, H, W),
    world_size=8,
    memory_format=torch.channels_last,
    epilogue=PLAIN,
    has_residual=False,
):
    """Returns the costs of forward and backward, and the bytes of x."""
    with fake_cuda(), ranks_of_fakes(world_size):
        x = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory_format)
        y, dx, dy, g = (torch.empty_like(x) for _ in range(4))
        residual = torch.empty_like(x) if has_residual else None
        mask = torch.empty(mask_shape, dtype=torch.bool, device="cuda").expand(N, 1, H, W)
        weight, bias, mean, var, grad_weight, grad_bias = (torch.empty(C, device="cuda") for _ in range(6))
        running, comm = Running(mean, var, None, 0.1), GroupHandle(None).communicator()
        gates = (y, g) if has_residual else (None, None)
        with torch.no_grad():
            with costs() as forward:
                arguments = x, y, weight, bias, running, 1e-5, gpu, comm, epilogue, residual, mask
                statistics = core.forward(*arguments)
            with costs() as backward:
                vectors = weight, bias, grad_weight, grad_bias, statistics
                core.backward(dy, x, dx, *vectors, gpu, comm, epilogue, *gates, mask)
    return forward, backward, x.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_launches_messages_and_bytes_are_those_without_a_mask(kind, launches):
    options, *passes = KINDS[kind]
    *found, input_bytes = step(**options)
    assert launches.names == ["stats_kernel", "normalise_kernel", "backward_reduce_kernel", "backward_elemt_kernel"]
    for costs_, elements in zip(found, (2 * C + 1, 2 * C), strict=True):
        assert [m.bytes for m in costs_.messages] == [8 * elements]
        assert (costs_.waits, costs_.uploads) == ({}, [])
        assert set(costs_.launches) <= {"zeros"}  # of the counters, which calls after the first do without
    assert [costs_.downloads for costs_ in found] == [1, 0]
    for moved, minimum in zip((sum(launches.bytes[:2]), sum(launches.bytes[2:])), passes, strict=True):
        assert minimum < moved / input_bytes <= 1.1 * minimum


def test_a_mask_that_is_not_dense_is_copied_and_the_batch_is_not(launches):
    *found, input_bytes = step((N, 1, 1, W))
    for costs_ in found:
        assert costs_.launches["clone"] == 2  # for each kernel one
        assert costs_.moved_bytes < 3 * input_bytes / (2 * C) * 2
        assert (costs_.waits, costs_.uploads) == ({}, [])


def test_in_a_world_of_one_the_count_is_looked_at_later(launches):
    """It is not known on the host, as it is without a mask."""
    forward, backward, _ = step(world_size=1)
    assert (forward.waits, forward.uploads, forward.downloads) == ({}, [], 1)
    assert (backward.waits, backward.uploads, backward.downloads) == ({}, [], 0)
