"""process_group="own": groups that only layers send over, made once on all ranks."""

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import LocalCommunicator, as_communicator, communicator_named, named_group
from syncbn.comm.torch import TorchCommunicator


def groups():
    return len(dist.distributed_c10d._world.pg_map)


def _made_once(rank, world):
    first = syncbn.SyncBatchNorm(3, process_group="own")
    comm = first._syncbn_group.communicator()
    assert (comm.rank, comm.world_size, groups()) == (rank, 3, 2)
    assert comm.group is not world
    # The default group's timeout, not torch's own of half an hour.
    assert comm.group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)
    model = syncbn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3), first), process_group="own")
    layers = [*model, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    assert [layer._syncbn_group.communicator().group is comm.group for layer in layers] == [True] * 4
    assert [layer.process_group for layer in layers] == ["own"] * 4
    assert named_group("own") == first._syncbn_group.name == "own"
    assert communicator_named("own").group is comm.group
    assert as_communicator("own:3").group is comm.group
    assert groups() == 2
    with pytest.raises(ValueError, match=r'expected SIZE in "own:SIZE" to divide the number of ranks, 3; got 2'):
        as_communicator("own:2")
    assert isinstance(as_communicator("own:1"), LocalCommunicator)
    dist.barrier()


def test_it_is_made_once_and_shared_by_layers_copies_and_pickles():
    run_ranks(_made_once, 3, "gloo")


def _parts(rank, world):
    comm = as_communicator("own:2")
    torch.manual_seed(rank // 2)
    whole = torch.randn(4, 3, 5)
    layer = syncbn.SyncBatchNorm(3, process_group="own:2")
    y = layer(whole[rank % 2 * 2 :][:2])
    expected = torch.nn.BatchNorm1d(3)(whole)[rank % 2 * 2 :][:2]
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, syncbn.SyncBatchNorm(3)(whole[rank % 2 * 2 :][:2]), atol=1e-3)
    return comm.rank, comm.world_size


def test_a_size_makes_groups_of_consecutive_ranks():
    assert run_ranks(_parts, 4, "gloo") == [(0, 2), (1, 2)] * 2


def _beside_ddp(rank, world):
    """Nothing of the layers goes over the default group, also where DDP looks for unused parameters."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    whole = torch.randn(4, 3, 5, 5)
    single = copy.deepcopy(net)
    single(whole).square().mean().backward()
    model = syncbn.convert_sync_batchnorm(net, process_group="own")
    seen, send = [], TorchCommunicator.all_reduce

    def all_reduce(self, buffer, label=None):
        seen.append(self.group is world)
        send(self, buffer, label)

    TorchCommunicator.all_reduce = all_reduce
    TorchCommunicator.shared_memory = lambda self: None  # so that all goes by all_reduce
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp(whole[rank * 2 :][:2]).square().mean().backward()
    assert seen == [False, False]
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_it_keeps_messages_apart_from_those_of_ddp():
    run_ranks(_beside_ddp, 2, "gloo")


def _compiled(rank, world):
    layer = torch.compile(syncbn.SyncBatchNorm(3, process_group="own"), backend="aot_eager")
    torch.manual_seed(0)
    whole = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(whole[rank * 2 :][:2]), torch.nn.BatchNorm1d(3)(whole)[rank * 2 :][:2])


def test_graphs_name_it():
    run_ranks(_compiled, 2, "gloo")


def test_before_torch_distributed_is_initialised_it_is_this_process_alone():
    layer = syncbn.SyncBatchNorm(3, process_group="own")
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x), torch.nn.BatchNorm1d(3)(x))
    assert isinstance(layer._syncbn_group.communicator(), LocalCommunicator)


@pytest.mark.parametrize("name", ["mine", "own:", "own:0", "own:x", "OWN", ""])
def test_other_names_are_refused(name):
    with pytest.raises(TypeError, match=rf'expected process_group.*"own" or "own:SIZE"; got {name!r}'):
        syncbn.SyncBatchNorm(3, process_group=name)


def _coalesced(rank, world):
    """A message that a coalescing manager put off would leave the sum of this rank alone."""
    comm, v = TorchCommunicator(world), torch.full((5,), rank + 1.0, dtype=torch.float64)
    with dist._coalescing_manager(group=world):
        comm._sum_on_device(v)
        return v.tolist()


def test_a_coalescing_manager_does_not_put_messages_off():
    assert run_ranks(_coalesced, 2, "gloo") == [[3.0] * 5] * 2
