"""The counting of costs on fake CUDA tensors: it sees each cost, and no other."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from support.fake_devices import costs, fake_cuda, ranks_of_fakes
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException


@pytest.fixture(autouse=True)
def _fakes():
    with fake_cuda():
        yield


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_arithmetic_launches_and_moves_what_it_reads_and_writes():
    x, v = on_gpu(4, 8), on_gpu(8, dtype=torch.bfloat16)
    with costs() as found:
        (x * v).sum(0)
        x.t().view(8, 4)[2:].unsqueeze(0).expand(5, 6, 4)
        torch.empty_like(x)
        torch.empty(0, device="cuda").add_(1)
    assert found.launches == {"mul": 1, "sum": 1}
    assert found.moved_bytes == (128 + 16 + 128) + (128 + 32)
    assert (found.uploads, found.waits, found.messages, found.largest_wide) == ([], {}, [], 0)


def test_a_result_is_written_not_read():
    x, v = on_gpu(8), on_gpu(8, dtype=torch.bfloat16)
    with costs() as found:
        torch.mul(x, x, out=v)
        x.add_(1)
    assert found.moved_bytes == (32 + 32 + 16) + (32 + 32)


def test_expanded_tensors_are_read_once():
    with costs() as found:
        on_gpu(1, 8).expand(100, 8) + on_gpu(100, 8)
    assert found.moved_bytes == 32 + 3200 + 3200


@pytest.mark.parametrize(
    "upload",
    [
        lambda x: x.__setitem__(-1, 7.0),
        lambda x: torch.tensor(1.0, device="cuda"),
        lambda x: x.copy_(torch.empty(4), non_blocking=True),
        lambda x: torch.empty(4).to("cuda:0", non_blocking=True),
        lambda x: x.new_tensor([1.0]),
    ],
    ids=["setitem", "tensor", "copy_", "to", "new_tensor"],
)
def test_copies_from_pageable_memory_are_uploads(upload):
    x = on_gpu(4)
    with costs() as found:
        upload(x)
    assert (len(found.uploads), found.launched) == (1, 0)


def test_numbers_are_no_uploads():
    x = on_gpu(4)
    with costs() as found:
        x[-1:].fill_(7.0)
        2.0 - x.clamp(min=1) * 3 + torch.tensor(1.0)
    assert (found.uploads, found.launches) == ([], {"fill_": 1, "clamp": 1, "mul": 1, "rsub": 1, "add": 1})


@pytest.mark.parametrize(
    "wait", [float, bool, torch.Tensor.cpu, lambda x: torch.empty(1).copy_(x), lambda x: x[x > 0], torch.nonzero]
)
def test_what_needs_the_result_on_the_host_waits(wait):
    x = on_gpu(1)
    with costs() as found, contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
        wait(x)
    assert found.waits.total() == 1


@pytest.mark.parametrize(("pinned", "non_blocking"), [(True, True), (True, False), (False, True)])
def test_a_copy_to_pinned_memory_need_not_wait(pinned, non_blocking):
    target = on_gpu(4)
    with costs() as found:
        memory = torch.empty(4, pin_memory=pinned)
        memory[:2].copy_(target[:2], non_blocking=non_blocking)
    assert (found.downloads, found.waits.total()) == ((1, 0) if pinned and non_blocking else (0, 1))


def test_a_reduction_in_another_dtype_converts_first():
    """As torch does on CUDA: sum(dtype=float64) of narrow input makes a float64 copy of all of it."""
    with costs() as found:
        on_gpu(100, 8).sum(0, dtype=torch.float64)
    assert (found.launched, found.largest_wide) == (2, 800)
    with costs() as found:
        on_gpu(100, 8).sum(0)
    assert (found.launched, found.largest_wide) == (1, 0)


@pytest.mark.parametrize("world_size", [2, 4096])
def test_messages_have_names_and_bytes(world_size):
    with ranks_of_fakes(world_size):
        assert dist.get_world_size() == world_size
        with costs() as found:
            dist.all_reduce(on_gpu(5, dtype=torch.float64))
    assert found.messages == [("allreduce_", torch.float64, 40)]
    assert not dist.is_initialized()


def test_functions_work_under_autograd_and_indices():
    """Both ask for the guard of the current CUDA device."""
    x = on_gpu(4).requires_grad_()
    assert (x[1:] * 2).grad_fn(on_gpu(3))[0].shape == (3,)
