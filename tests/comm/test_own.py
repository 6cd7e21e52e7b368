"""process_group="own", "node" and a number: groups that only layers send over, made once on all ranks."""

import copy
import inspect
import pickle
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import ROOT
from support.ranks import rank_errors, run_ranks
from support.tolerances import rounding
from torch.nn.parallel import DistributedDataParallel

import syncbn
import syncbn.numpy
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
    assert as_communicator(3).group is comm.group
    assert groups() == 2
    with pytest.raises(ValueError, match="divides that of all, 3; got 2"):
        as_communicator(2)
    assert isinstance(as_communicator(1), LocalCommunicator)
    dist.barrier()


def test_it_is_made_once_and_shared_by_layers_copies_and_pickles():
    run_ranks(_made_once, 3, "gloo")


def _members(rank, hosts, group):
    """The ranks of this rank's group."""
    if group == "node":
        return [other for other, host in enumerate(hosts) if host == hosts[rank]]
    size = len(hosts) if group == "own" else group
    return [other for other in range(len(hosts)) if other // size == rank // size]


def _parts(rank, world, hosts, group):
    """Every way in gives what nn.BatchNorm1d gives on the batches of the ranks of this rank's group."""
    socket.gethostname = lambda: hosts[rank]
    members, before = _members(rank, hosts, group), groups()
    parts = [torch.randn(2 + r, 3, 5, generator=torch.Generator().manual_seed(r)).double() for r in range(len(hosts))]
    x, others = parts[rank], torch.cat([parts[r] for r in members if r < rank] + [parts[0][:0]])
    whole = torch.cat([parts[r] for r in members])
    single = torch.nn.BatchNorm1d(3).double()
    expected = single(whole)[len(others) :][: len(x)]

    layer = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    converted = syncbn.convert_sync_batchnorm(torch.nn.BatchNorm1d(3).double(), process_group=group)
    graph = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    array = syncbn.numpy.SyncBatchNorm(3, comm=group, dtype="float64")
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for each in (layer, converted, graph, *copies):
        torch.testing.assert_close(each(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.running_var, single.running_var, rtol=1e-12, atol=1e-12)
        assert each.process_group == group
    y = syncbn.functional.sync_batch_norm(x, None, None, training=True, process_group=group)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(array.forward(x.numpy())), expected.detach(), rtol=1e-12, atol=1e-12)
    loss = syncbn.scale_loss(torch.ones(()), len(x), process_group=group)
    assert loss.item() == pytest.approx(len(members) * len(x) / len(whole))
    made = groups() - before
    comm = as_communicator(group)
    unsynchronised = torch.nn.BatchNorm1d(3).double()(x)
    same = torch.allclose(unsynchronised, expected, atol=1e-3)  # the negative control
    return (comm.rank, comm.world_size), made, same


@pytest.mark.parametrize(
    ("hosts", "group", "expected"),
    [
        ("a", "node", [(0, 1)]),
        ("a", 1, [(0, 1)]),
        ("aa", "node", [(0, 2), (1, 2)]),
        ("aa", 2, [(0, 2), (1, 2)]),
        ("ab", "node", [(0, 1), (0, 1)]),
        ("aba", "node", [(0, 2), (0, 1), (1, 2)]),
        ("abc", 3, [(0, 3), (1, 3), (2, 3)]),
        ("aabb", 2, [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_each_group_equals_one_process_on_its_ranks_batches(hosts, group, expected):
    results = run_ranks(_parts, len(hosts), "gloo", hosts, group)
    assert [r[0] for r in results] == expected
    # Only groups that this process is in are in torch's table.
    assert [r[1] for r in results] == [1] * len(hosts)
    assert [r[2] for r in results] == [size == 1 for _, size in expected]


def _under_two_names(rank, world):
    socket.gethostname = lambda: "ab"[rank // 2]
    made = [as_communicator(group).group for group in ("node", 2, "node")]
    assert made[0] is made[1] is made[2]
    assert groups() == 2
    assert (named_group("node"), named_group(2)) == ("node", "2")
    assert communicator_named("2").group is communicator_named("node").group is made[0]


def test_groups_of_the_same_ranks_are_made_once():
    run_ranks(_under_two_names, 4, "gloo")


def _build(rank, world, group):
    syncbn.convert_sync_batchnorm(torch.nn.BatchNorm1d(3), process_group=group)


@pytest.mark.parametrize("group", [2, 4])
def test_a_number_that_does_not_divide_that_of_all_ranks_is_refused_on_every_rank(group):
    for rank, error in enumerate(rank_errors(_build, 3, "gloo", group)):
        assert type(error) is ValueError
        expected = "expected a number of ranks in each group that divides that of all, 3"
        assert str(error).startswith(f"[rank {rank}/3] {expected}; got {group}: ")


@pytest.mark.parametrize("make", [syncbn.SyncBatchNorm, lambda c, process_group: _function(process_group)])
def test_what_is_no_number_of_ranks_is_refused(make):
    for number in (0, -2):
        with pytest.raises(ValueError, match=rf"expected process_group, where.*, to be at least 1; got {number}"):
            make(3, process_group=number)
    for other in (True, False, 2.0):
        with pytest.raises(TypeError, match=rf"expected process_group.*got {type(other).__name__}"):
            make(3, process_group=other)


def _function(group):
    return syncbn.functional.sync_batch_norm(torch.randn(2, 3), None, None, training=True, process_group=group)


def _under_ddp(rank, world, keep):
    """Running means after two steps of groups of two ranks, and the output of rank 0's module in evaluation."""
    layer = syncbn.SyncBatchNorm(1, momentum=0.5, dtype=torch.float64, affine=True, process_group=2)
    options = {}
    if keep:  # torch 2.13 gives it another name, and warns of this one
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    ddp = DistributedDataParallel(layer, **options)
    for step in (1.0, 2.0):
        ddp(torch.tensor([[step * 10 ** (rank // 2)], [step * 10 ** (rank // 2) + 1]]).double()).sum().backward()
    trained = layer.running_mean.item()
    ddp.eval()
    y = ddp(torch.zeros(1, 1, dtype=torch.float64)).item()
    return trained, y, layer.running_mean.item()


def test_trap_29_evaluation_under_ddp_takes_the_statistics_of_rank_0s_group():
    # Batch means of the groups: 1.5, then 2.5; and 10.5, then 20.5.
    first, second = 0.5 * 0.75 + 0.5 * 2.5, 0.5 * 5.25 + 0.5 * 20.5
    kept = run_ranks(_under_ddp, 4, "gloo", True)
    assert [r[0] for r in kept] == [r[2] for r in kept] == [first] * 2 + [second] * 2
    assert kept[0][1] == kept[1][1] != kept[2][1] == kept[3][1]
    broadcast = run_ranks(_under_ddp, 4, "gloo", False)
    # The second step goes on from rank 0's 0.75; evaluation through DDP then takes rank 0's again.
    assert [r[0] for r in broadcast] == [first] * 2 + [0.5 * 0.75 + 0.5 * 20.5] * 2
    assert [r[2] for r in broadcast] == [first] * 4
    assert len({r[1] for r in broadcast}) == 1
    assert "`broadcast_buffers=False`" in (ROOT / "syncbn" / "README.md").read_text()


def _beside_ddp(rank, world):
    """Nothing of the layers goes over the default group, also where DDP looks for unused parameters."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)).double()
    whole = torch.randn(4, 3, 5, 5, dtype=torch.float64)
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
    assert seen == [False] * 3  # in float64 the mean goes before the squares about it
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        # Two convolutions and a norm, 7 operations forward and 7 backward; sums over 4 pictures of 5 x 5.
        torch.testing.assert_close(ours.grad, theirs.grad, **rounding(torch.float64, 14, 100))


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


@pytest.mark.parametrize("name", ["mine", "own:2", "OWN", "8", ""])
def test_other_names_are_refused(name):
    with pytest.raises(TypeError, match=rf'expected process_group.*"own", "node", or a number of ranks; got {name!r}'):
        syncbn.SyncBatchNorm(3, process_group=name)


def _coalesced(rank, world):
    """A message that a coalescing manager put off would leave the sum of this rank alone."""
    comm, v = TorchCommunicator(world), torch.full((5,), rank + 1.0, dtype=torch.float64)
    with dist._coalescing_manager(group=world):
        comm._sum_on_device(v)
        return v.tolist()


def test_a_coalescing_manager_does_not_put_messages_off():
    assert run_ranks(_coalesced, 2, "gloo") == [[3.0] * 5] * 2
