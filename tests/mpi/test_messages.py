"""syncbn's communicator over MPI: what it sums, and what it refuses. Run by mpirun, on any number of ranks from 2."""

import threading

import numpy as np
import pytest
import torch
from mpi4py import MPI
from support.ranks import rank_errors, run_ranks

import syncbn
from syncbn.comm import LocalCommunicator, as_communicator
from syncbn.comm.mpi import MPICommunicator

SIZE = MPI.COMM_WORLD.Get_size()
TOTAL = SIZE * (SIZE + 1) / 2  # of rank + 1
pytestmark = pytest.mark.mpi(min_size=2)


def _sums(rank, world):
    comm = as_communicator(world)
    assert (comm.rank, comm.world_size) == (rank, SIZE)
    buffers = [torch.arange(4097.0, dtype=torch.float64), np.arange(4097.0)]
    for buffer in buffers:
        buffer *= rank + 1
        address = torch.as_tensor(buffer).data_ptr()
        comm.all_reduce(buffer)
        assert torch.as_tensor(buffer).data_ptr() == address
    return [np.asarray(buffer) for buffer in buffers]


def test_tensors_and_arrays_are_summed_in_place():
    for found in run_ranks(_sums, SIZE, "mpi"):
        for buffer in found:
            np.testing.assert_array_equal(buffer, np.arange(4097) * TOTAL)


def _irrational_sum(rank, world):
    buffer = torch.from_numpy(np.random.default_rng(rank).standard_normal(333))
    as_communicator(world).all_reduce(buffer)
    return buffer.numpy().tobytes()


def test_every_rank_gets_the_same_bits():
    assert len(set(run_ranks(_irrational_sum, SIZE, "mpi"))) == 1


def _strided(rank, world):
    whole = torch.full((7, 4), float(rank + 1), dtype=torch.float64)
    kept = whole.numpy()
    comm = as_communicator(world)
    comm.all_reduce(whole[::2, 1])
    comm.all_reduce(kept[1::2, 2])
    comm.all_reduce(whole.t()[3:])  # transposed: dense, but not in the order of the other ranks' buffers
    return kept


def test_trap_33_buffers_that_are_not_contiguous_are_summed_and_their_neighbours_left():
    for rank, found in enumerate(run_ranks(_strided, SIZE, "mpi")):
        expected = np.full((7, 4), rank + 1.0)
        expected[::2, 1] = expected[1::2, 2] = expected[:, 3] = TOTAL
        np.testing.assert_array_equal(found, expected)


def _dtypes(rank, world):
    comm = as_communicator(world)
    for buffer in (
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3),
        torch.ones(3, dtype=torch.int64),
        np.ones(3, np.float32),
        np.ones(3, ">f8"),
    ):
        with pytest.raises(TypeError, match=rf"\[rank {rank}/{SIZE}\] expected a buffer of float64 .*; got "):
            comm.all_reduce(buffer)
    for dtype in (torch.bfloat16, torch.float16):
        layer = syncbn.SyncBatchNorm(1, process_group=world, momentum=1.0)
        y = layer(torch.full((3, 1), 20.0 + rank, dtype=dtype, requires_grad=True))
        assert y.dtype == dtype
        y.float().square().sum().backward()
    return layer.running_mean.item(), layer.running_var.item()


def test_trap_33_narrow_input_is_right_because_its_messages_are_float64():
    values = np.repeat(20.0 + np.arange(SIZE), 3)
    for mean, var in run_ranks(_dtypes, SIZE, "mpi"):
        assert (mean, var) == pytest.approx((values.mean(), values.var(ddof=1)))


def _on_a_thread(function):
    errors = []

    def run():
        try:
            function()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return str(errors[0]) if errors else None


def _backward_on_a_thread(rank, world):
    x = torch.randn(4, 3, requires_grad=True)
    loss = syncbn.SyncBatchNorm(3, process_group=world)(x).square().sum()  # forward: on this thread
    return _on_a_thread(loss.backward)


@pytest.mark.parametrize("level", ["SINGLE", "FUNNELED"])
def test_trap_33_a_thread_that_mpi_does_not_support_is_refused(level, monkeypatch):
    monkeypatch.setattr(MPI, "Query_thread", lambda: getattr(MPI, f"THREAD_{level}"))
    for rank, error in enumerate(run_ranks(_backward_on_a_thread, SIZE, "mpi")):
        assert f"[rank {rank}/{SIZE}] expected MPI with thread support of at least MPI_THREAD_SERIALIZED" in error
        assert f"got MPI_THREAD_{level}: set mpi4py.rc.thread_level" in error


@pytest.mark.parametrize("level", ["SERIALIZED", "MULTIPLE"])
def test_trap_33_a_thread_that_mpi_supports_is_not_refused(level, monkeypatch):
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
    monkeypatch.setattr(MPI, "Query_thread", lambda: getattr(MPI, f"THREAD_{level}"))
    assert run_ranks(_backward_on_a_thread, SIZE, "mpi") == [None] * SIZE


@pytest.mark.parametrize("buffer", [torch.ones(9, dtype=torch.float64), np.ones(9)], ids=["tensor", "array"])
def test_an_error_of_mpi_names_the_operation(buffer, monkeypatch):
    comm = MPICommunicator(MPI.COMM_SELF)
    monkeypatch.setattr(comm, "rank", 1)
    monkeypatch.setattr(comm, "world_size", 3)
    comm._allreduce.part.op = MPI._handleof(MPI.OP_NULL)
    with pytest.raises(
        RuntimeError, match=r"\[rank 1/3\] expected MPI_Allreduce of 9 float64 to succeed; got .*(?i:mpi_(err_)?op)"
    ):
        comm.all_reduce(buffer)
    assert buffer.sum() == 9


def _freed(rank, world):
    group = world.Dup()
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    layer(torch.randn(3, 2))
    group.Free()
    with pytest.raises(ValueError, match=r"got MPI\.COMM_NULL, which a communicator is once it was freed, and "):
        as_communicator(group)
    layer(torch.randn(3, 2))


def test_a_layer_whose_communicator_was_freed_raises():
    for rank, error in enumerate(rank_errors(_freed, SIZE, "mpi")):
        assert isinstance(error, RuntimeError)
        assert f"[rank {rank}/{SIZE}] expected an MPI communicator to sum over; got one that was freed: " in str(error)
        assert "order" not in str(error), "which is not to blame"


def test_a_world_of_one_sends_nothing():
    assert isinstance(as_communicator(MPI.COMM_SELF), LocalCommunicator)
    assert isinstance(as_communicator(MPI.COMM_WORLD.Split(MPI.COMM_WORLD.Get_rank())), LocalCommunicator)
