"""Sub-groups, their communicators and their end; the store and the rendezvous; functional collectives and meshes."""

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from mpi4py import MPI

import syncbn.comm
import syncbn.comm.torch
import syncbn.mpi
from syncbn.comm.mpi import MPICommunicator

pytestmark = pytest.mark.mpi(min_size=2)

# From this version on destroy_process_group tells the group.
TELLS = "shutdown" in dir(dist.ProcessGroup)


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


def summed(group):
    tensor = torch.tensor([10.0 ** rank()])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def test_the_default_group_is_mpis_world():
    assert (rank(), size()) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert dist.get_backend() == dist.group.WORLD.name() == "mpi4py"
    assert isinstance(dist.group.WORLD, syncbn.mpi.MPIProcessGroup)


def test_the_store_is_shared():
    store = dist.distributed_c10d._get_default_store()
    store.set(f"key {rank()}", f"value {rank()}")
    other = (rank() + 1) % size()
    assert store.get(f"key {other}") == f"value {other}".encode()
    assert not store.check([f"key {size()}"])


def test_groups_overlap_and_those_outside_get_none():
    for members in ([0, 1], [1, 0], list(range(size())), [size() - 1], [0, size() - 1]):
        group = dist.new_group(members)
        if rank() in members:
            assert dist.get_world_size(group) == len(set(members))
            assert summed(group) == sum(10.0**r for r in set(members))
            root = torch.tensor([rank()])
            dist.broadcast(root, max(members), group)
            assert root.item() == max(members)
        else:
            assert group is dist.GroupMember.NON_GROUP_MEMBER
        dist.destroy_process_group(group)


def test_only_members_need_call():
    members = [0, size() - 1]
    if rank() in members:
        group = dist.new_group(members, use_local_synchronization=True)
        assert summed(group) == 1 + 10.0 ** (size() - 1)
        dist.destroy_process_group(group)


def test_many_groups_come_and_go():
    for _ in range(30):
        group = dist.new_group(list(range(size())), timeout=timedelta(seconds=20))
        assert summed(group) == sum(10.0**r for r in range(size()))
        dist.destroy_process_group(group)


def test_a_destroyed_group_says_so():
    group = dist.new_group(list(range(size())))
    dist.destroy_process_group(group)
    if not TELLS:
        group.shutdown()
    for call in (lambda: group.allreduce([torch.ones(1)]), lambda: group.communicator):
        with pytest.raises(RuntimeError, match="the process group has been destroyed: make a new one"):
            call()
    group.shutdown()  # and again


def test_an_operation_under_way_when_its_group_is_destroyed_is_named():
    group = dist.new_group(list(range(size())))
    work = group.recv([torch.zeros(1)], (rank() + 1) % size(), 5)
    with pytest.warns(RuntimeWarning, match="destroyed with 1 operations under way, the first of them .*recv of"):
        group.shutdown()
    group.abort()
    with pytest.raises(RuntimeError, match="aborted"):
        work.wait()


def test_syncbn_sends_over_the_groups_communicator():
    communicator = syncbn.comm.as_communicator(None)
    assert type(communicator) is MPICommunicator
    assert communicator is dist.group.WORLD.communicator
    assert communicator.comm not in (MPI.COMM_WORLD, dist.group.WORLD._comm)
    assert (communicator.rank, communicator.world_size) == (rank(), size())
    group = dist.new_group([0, 1])
    if rank() < 2:
        assert syncbn.comm.as_communicator(group) is group.communicator
    group = dist.new_group([0])
    if rank() == 0:
        assert type(syncbn.comm.as_communicator(group)) is syncbn.comm.LocalCommunicator


@pytest.mark.parametrize("group", ["own", "node", 1, *([2] if MPI.COMM_WORLD.size % 2 == 0 else [])])
def test_groups_by_name_and_by_size(group, monkeypatch):
    hosts = "aba" + "a" * size()
    monkeypatch.setattr("socket.gethostname", lambda: hosts[rank()])
    communicator = syncbn.comm.as_communicator(group)
    members = {
        "own": list(range(size())),
        "node": [r for r in range(size()) if hosts[r] == hosts[rank()]],
        1: [rank()],
        2: [rank() // 2 * 2, rank() // 2 * 2 + 1],
    }[group]
    assert (communicator.rank, communicator.world_size) == (members.index(rank()), len(members))
    buffer = torch.tensor([10.0 ** rank()], dtype=torch.float64)
    communicator.all_reduce(buffer)
    assert buffer.item() == sum(10.0**r for r in members)
    if len(members) > 1:
        assert type(communicator) is MPICommunicator
        assert communicator is syncbn.comm.as_communicator(group)


def test_a_mesh_has_groups_of_this_backend():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, size()), mesh_dim_names=("outer", "inner"))
    assert type(syncbn.comm.as_communicator(mesh["inner"])) is MPICommunicator
    assert summed(mesh.get_group("inner")) == sum(10.0**r for r in range(size()))


def test_functional_collectives():
    group = dist.group.WORLD
    expected = torch.full((2,), float(size()))
    assert torch.equal(functional.all_reduce(torch.ones(2), "sum", group).clone(), expected)
    # Their names from torch 2.13 on, and before.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
    gathered = gather(torch.full((1,), float(rank())), 0, group).clone()
    assert torch.equal(gathered, torch.arange(float(size())))
    part = scatter(torch.arange(float(size())), "sum", 0, group).clone()
    assert part.item() == rank() * size()


def test_broadcast_of_many_tensors_at_once():
    tensors = [torch.full((n,), float(rank())) for n in (3, 50, 7)]
    dist._broadcast_coalesced(dist.group.WORLD, tensors, 64, 1)
    assert all((t == 1).all() for t in tensors)


def test_ranks_other_than_mpis_are_refused():
    from torch._C._distributed_c10d import _DistributedBackendOptions

    from syncbn.mpi.backend import create

    asked = _DistributedBackendOptions()
    asked.store, asked.group_id, asked.timeout = dist.HashStore(), "wrong", timedelta(seconds=1)
    asked.group_rank, asked.group_size, asked.global_ranks_in_group = (rank() + 1) % size(), size(), []
    with pytest.raises(
        ValueError, match=rf"expected rank {rank()} of {size()}, as in MPI.COMM_WORLD.*init_method unset"
    ):
        create(asked)


def test_nothing_warns_when_the_backend_is_registered_again():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.mpi.backend.register()
