"""Labels: every message of a layer in eager mode says which layer, direction and call it is of."""

import copy
import pickle

import pytest
import torch
from support.ranks import run_ranks
from torch import nn

import syncbn
from syncbn.comm import GroupHandle


def network():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))


class Noting:
    """A communicator that copies the labels."""

    def __init__(self, comm):
        self.rank, self.world_size, self.comm, self.seen = comm.rank, comm.world_size, comm, []

    def all_reduce(self, buffer, *, label=None):
        self.seen.append((label.layer, label.direction, label.call))
        self.comm.all_reduce(buffer)


class Unlabelled:
    """A communicator of a user's own, whose second parameter is another."""

    def __init__(self, comm):
        self.rank, self.world_size, self.comm, self.others = comm.rank, comm.world_size, comm, []

    def all_reduce(self, buffer, op="sum"):
        self.others.append(op)
        self.comm.all_reduce(buffer)


def _labels(rank, comm, dtype, calls, fuse, gaps):
    noting = Noting(comm)
    model = syncbn.convert_sync_batchnorm(network(), noting, fuse).to(dtype)
    for _ in range(calls):
        x = torch.randn(4, 6 if gaps else 3, dtype=dtype)[:, :: 2 if gaps and rank else 1][:, :3].requires_grad_()
        model(x).square().sum().backward()
    return noting.seen


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_messages_know_layer_direction_and_call_whichever_way_they_go(fuse, gaps):
    """With gaps rank 0's first layer is one call of C++, and rank 1's goes the general way."""
    expected = [
        (layer, direction, call)
        for call in range(3)
        for layer, direction in (("0", "forward"), ("1.0", "forward"), ("1.0", "backward"), ("0", "backward"))
    ]
    assert run_ranks(_labels, 2, "thread", torch.float32, 3, fuse, gaps) == [expected] * 2


def test_both_messages_of_float64_have_one_number():
    (seen,) = run_ranks(_labels, 1, "thread", torch.float64, 2, False, False)
    assert [label for label in seen if label[0] == "0"] == [
        ("0", direction, call) for call in range(2) for direction in ("forward", "forward", "backward")
    ]


def _derivatives(rank, comm):
    noting = Noting(comm)
    layer = syncbn.SyncBatchNorm(3, process_group=noting)
    x = torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return noting.seen


def test_sums_of_second_derivatives_are_labelled_too():
    first, *rest = run_ranks(_derivatives, 2, "thread")[0]
    assert first == ("SyncBatchNorm(3)", "forward", 0)
    assert {label[1] for label in rest} == {"derivatives", "backward"}


def _without(rank, comm):
    own = Unlabelled(comm)
    layer = syncbn.SyncBatchNorm(3, process_group=own)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    return own.others


def test_a_communicator_that_takes_no_label_gets_none():
    assert run_ranks(_without, 2, "thread") == [["sum", "sum"]] * 2


def _shared(rank, group):
    model = syncbn.convert_sync_batchnorm(network())
    for step in range(3):
        x = torch.randn(4, 3, requires_grad=True)
        y = model(x) if step != 1 else model(x.expand(2, 4, 3)[rank])  # one call of C++, whatever the strides
        y.sum().backward()
    return [[label.call for label in model[0]._syncbn_group.labels[:2]], [rank, group.rank()]]


def test_calls_are_counted_where_the_sum_is_in_shared_memory():
    assert [calls for calls, _ in run_ranks(_shared, 2, "gloo")] == [[2, 2]] * 2


def test_names_are_of_the_converted_model_and_stay():
    model = syncbn.convert_sync_batchnorm(network())
    model[1][0].process_group = 1
    layers = model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for converted in layers:
        assert [layer._syncbn_group.labels.forward.layer for layer in (converted[0], converted[1][0])] == ["0", "1.0"]
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert layer._syncbn_group.labels.backward.layer == "SyncBatchNorm(3)"
    assert GroupHandle(None).labels.forward.layer == ""
