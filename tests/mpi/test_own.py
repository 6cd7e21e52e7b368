"""Groups of MPI.COMM_WORLD's ranks by host and by size, for layers without torch.distributed."""

import copy
import pickle
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from support.steps import batch
from torch import nn

import syncbn
import syncbn.numpy
from syncbn.comm import LocalCommunicator, as_communicator
from syncbn.comm import mpi as over_mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)
# Of 2 ranks a host each, of more an uneven number, not in the order of the ranks.
HOSTS = "ab" if SIZE == 2 else "aba" + "a" * (SIZE - 3)


@pytest.fixture(autouse=True)
def _on_hosts(monkeypatch):
    assert not dist.is_initialized()
    monkeypatch.setattr(over_mpi, "_own_comms", {})
    monkeypatch.setattr(socket, "gethostname", lambda: HOSTS[RANK])
    yield
    for comm in {id(comm): comm for comm in over_mpi._own_comms.values()}.values():
        comm.Free()


def members(group):
    """The ranks of this rank's group."""
    if group == "node":
        return [other for other in range(SIZE) if HOSTS[other] == HOSTS[RANK]]
    size = SIZE if group == "own" else group
    return [other for other in range(SIZE) if other // size == RANK // size]


@pytest.mark.parametrize("group", ["own", "node", 1, SIZE, *({2} if SIZE % 2 == 0 else ())])
def test_each_group_equals_one_process_on_its_ranks_batches(group):
    xs, _ = batch(4, [(2 + r, 3, 5) for r in range(SIZE)])
    ranks = members(group)
    whole = torch.cat([torch.as_tensor(np.asarray(xs[r])).double() for r in ranks])
    first = sum(2 + r for r in ranks if r < RANK)
    x, single = whole[first : first + 2 + RANK], nn.BatchNorm1d(3).double()
    expected = single(whole)[first : first + 2 + RANK].detach()

    layer = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    converted = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3).double(), group)
    for each in (layer, converted, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(each(x).detach(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.running_var, single.running_var, rtol=1e-12, atol=1e-12)
    array = syncbn.numpy.SyncBatchNorm(3, comm=group, dtype="float64")
    np.testing.assert_allclose(array.forward(x.numpy()), expected.numpy(), rtol=1e-12, atol=1e-12)
    loss = syncbn.scale_loss(torch.ones(()), len(x), group)
    assert loss.item() == pytest.approx(len(ranks) * len(x) / len(whole))

    comm = as_communicator(group)
    assert (comm.rank, comm.world_size) == (ranks.index(RANK), len(ranks))
    assert isinstance(comm, LocalCommunicator) == (len(ranks) == 1)
    if len(ranks) > 1:
        assert as_communicator(group).comm is comm.comm is not WORLD
        unsynchronised = nn.BatchNorm1d(3).double()(x)
        assert not torch.allclose(unsynchronised, expected, atol=1e-3)


def test_groups_of_the_same_ranks_are_made_once():
    assert as_communicator("own").comm is as_communicator(SIZE).comm


def test_a_number_that_does_not_divide_that_of_all_ranks_is_refused_on_every_rank():
    with pytest.raises(
        ValueError, match=rf"\[rank {RANK}/{SIZE}\] expected a number of ranks.*, {SIZE}; got {SIZE + 1}"
    ):
        as_communicator(SIZE + 1)
    assert over_mpi._own_comms == {}
    with pytest.raises(ValueError, match="expected comm, where it is a number of ranks, to be at least 1; got 0"):
        syncbn.numpy.SyncBatchNorm(3, comm=0)
