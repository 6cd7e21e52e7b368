"""Messages over MPI say whose they are, and how long: ranks that disagree all raise, and nothing is lost.

Run by mpirun, on any number of ranks from 2.
"""

import contextlib

import numpy as np
import pytest
import torch
from mpi4py import MPI
from support.ranks import rank_errors, run_ranks
from torch import nn

import syncbn
from syncbn.comm import Labels, mpi_sum
from syncbn.comm.mpi import MPICommunicator

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)
WAYS = ["C++", "Python", "both"]  # which sum: both, on ranks in turn, for their messages are the same


@contextlib.contextmanager
def _summing(way, rank):
    with pytest.MonkeyPatch.context() as patch:
        if way == "Python" or (way == "both" and rank % 2):
            patch.setattr(mpi_sum, "_library", None)
        yield


def _lengths(rank, world, way, lengths):
    with _summing(way, rank):
        comm = MPICommunicator(world.Dup())
        seen = []
        for length in (*lengths, (7, 7), lengths[0]):
            vector = np.full(length[min(rank, 1)], rank + 1.0)
            try:
                comm.all_reduce(vector)
                seen.append(float(vector.sum()))
            except RuntimeError as error:
                assert (vector == rank + 1).all()
                seen.append(str(error))
        comm.comm.Free()
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(256, 255), (5, 9000), (129, 4000), (100_000, 3)])
def test_different_lengths_are_an_error_on_every_rank_and_the_next_sum_is_right(way, lengths):
    """Sums of them ended in a broken heap, or in a segmentation fault."""
    for rank, (first, second, after, again) in enumerate(run_ranks(_lengths, SIZE, "mpi", way, [lengths] * 2)):
        assert first == second == again
        others = f"rank{'s' * (SIZE > 2)} {', '.join(map(str, range(1, SIZE)))}"
        assert first.startswith(
            f"[rank {rank}/{SIZE}] expected the same message of the same layer from every rank; got "
            f"{lengths[0]} float64 from rank 0; {lengths[1]} float64 from {others}: see that"
        )
        assert after == 7 * SIZE * (SIZE + 1) / 2


def _labelled(rank, world, way, layers, facts):
    with _summing(way, rank):
        comm = MPICommunicator(world)
        label = None if layers[rank % 2] is None else Labels.of(layers[rank % 2]).forward
        if label is not None:
            label.call = 4 + rank
            label.know(facts[rank % 2])
        vector = np.full(9, rank + 1.0)
        comm.all_reduce(vector, label)
    return float(vector[0])


FACTS = (torch.float32, 1e-5, 0.1, True, True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("layers", "facts", "expected"),
    [
        (("a", "a"), (FACTS, FACTS), None),
        (("a", None), (FACTS, None), None),  # a graph sends with everybody
        (("a", "a"), (FACTS, "refused its input"), None),  # what is not a number tells
        (
            ("a", "b"),
            (FACTS, FACTS),
            "of a, call 4, 9 float64, float32, eps 1e-05, momentum 0.1, weight and bias from",
        ),
        (("a", "a"), (FACTS, (torch.float32, 1e-5, None, True, True)), "no running statistics to update, weight and"),
        (("a", "a"), (FACTS, (torch.float32, 1e-5, 0.1, True, False)), "eps 1e-05, momentum 0.1, weight from rank"),
    ],
)
def test_what_messages_say_is_compared(way, layers, facts, expected):
    if expected is None:
        assert run_ranks(_labelled, SIZE, "mpi", way, layers, facts) == [SIZE * (SIZE + 1) / 2] * SIZE
        return
    for error in rank_errors(_labelled, SIZE, "mpi", way, layers, facts):
        assert isinstance(error, RuntimeError)
        assert expected in str(error)


def network():
    return nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))


def _changed(rank, world, change, is_checked=False):
    model = syncbn.convert_sync_batchnorm(network(), world)
    with syncbn.check_collectives(model) if is_checked else contextlib.nullcontext():
        _trained(rank, model, change)


def _trained(rank, model, change):
    x = torch.randn(4, 3, requires_grad=True)
    model(x).sum().backward()  # all alike
    first = model[0]
    before = first.running_mean.clone()
    if rank == 1:
        x = change(model, x)
    try:
        model(x).sum().backward()
    finally:
        assert torch.equal(first.running_mean, before) == (change in (_swap, _dtype, _evaluated))


def _swap(model, x):
    model[0], model[2] = model[2], model[0]
    return x


def _eps(model, x):
    model[2].eps = 1e-3
    return x


def _momentum(model, x):
    model[2].momentum = 0.2
    return x


def _no_bias(model, x):
    model[2].bias = None
    return x


def _untracked(model, x):
    model[2].track_running_stats = False
    return x


def _dtype(model, x):
    return x.bfloat16()


CHANGES = {
    _swap: ("forward of 0, call 1, 7 float64, float32", "forward of 2, call 1, 7 float64, float32"),
    _eps: (
        "forward of 2, call 1, 7 float64, float32, eps 1e-05",
        "forward of 2, call 1, 7 float64, float32, eps 0.001",
    ),
    _momentum: ("momentum 0.1", "momentum 0.2"),
    _no_bias: ("momentum 0.1, weight and bias", "momentum 0.1, weight from rank 1"),
    _untracked: ("momentum 0.1", "no running statistics to update"),
    _dtype: ("forward of 0, call 1, 7 float64, float32", "forward of 0, call 1, 7 float64, bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_not_the_same_on_all_ranks_are_an_error_on_all(change):
    for error in rank_errors(_changed, SIZE, "mpi", change):
        assert isinstance(error, RuntimeError)
        for part in ("expected the same message of the same layer from every rank", *CHANGES[change]):
            assert part in str(error)


def _evaluated(model, x):
    model[0].eval()
    return x


def test_trap_14_in_check_mode_a_layer_that_one_rank_evaluates_is_named_and_nobody_waits():
    for rank, error in enumerate(rank_errors(_changed, SIZE, "mpi", _evaluated, True)):
        assert str(error).startswith(
            f"[rank {rank}/{SIZE}] expected the same message of the same layer from every rank"
        )
        assert "forward of 0, call 1, 7 float64" in str(error)
        assert "forward of 2, call 1, 7 float64" in str(error)
