"""Devices without float64 are refused in words, on this rank, and told to the others; a stand-in for Apple's mps."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from syncbn.comm import GroupHandle
from syncbn.core import NOTHING
from syncbn.kernels import PLAIN, choose, has_float64, selection
from syncbn.nn.eager import EagerCall


class Messages:
    """A communicator that keeps what is sent."""

    rank, world_size = 1, 3

    def __init__(self):
        self.sent = []

    def all_reduce(self, buffer):
        self.sent.append(buffer)


@pytest.fixture
def x(monkeypatch):
    """A tensor on mps, which refuses float64 as torch does there."""
    ones = torch.ones

    def refusing(*shape, dtype=None, device=None, **options):
        if dtype == torch.float64 and torch.device(device).type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return ones(*shape, dtype=dtype, device=device, **options)

    monkeypatch.setattr(torch, "ones", refusing)
    has_float64.cache_clear()
    with FakeTensorMode():
        yield torch.empty(4, 3, 5, device="mps")
    has_float64.cache_clear()


def test_no_kernels_serve_it(x):
    with pytest.raises(TypeError, match=r"expected a tensor on a device with float64.*got one on mps.*: train"):
        choose(x)


def test_the_kernels_that_are_asked_for_say_so_too(x, monkeypatch):
    monkeypatch.setattr(selection, "_FORCED", "aten")
    with pytest.raises(RuntimeError, match=r"on any device with float64; got a torch.* on mps"):
        choose(x)


def test_other_ranks_learn_of_it(x):
    comm = Messages()
    call = EagerCall(3, NOTHING, 1e-5, GroupHandle(comm), PLAIN)
    with pytest.raises(TypeError, match=r"\[rank 1/3\] expected a tensor on a device with float64"):
        call.check(x, None, None, None)
    (sent,) = comm.sent
    assert (sent.shape, sent.dtype, sent.device.type) == ((7,), torch.float64, "cpu")


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_most_devices_have_it(device):
    assert has_float64(torch.device(device))
