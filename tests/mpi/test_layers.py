"""The layers over MPI: P ranks equal one rank on the concatenated batch, and errors are errors on all of them.

Run by mpirun, on any number of ranks from 2.
"""

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from support.masks import MASKED_STEPS, assert_masked_parity
from support.parity import STEPS, assert_control, assert_parity, batch_norm_step, every_case, splits
from support.ranks import RankFailedError, rank_errors, run_ranks
from support.steps import assert_equals_whole_batch, batch, torch_step
from torch import nn

import syncbn
import syncbn.numpy
from syncbn.comm.torch import TorchCommunicator

WORLD = MPI.COMM_WORLD
SIZE = WORLD.Get_size()
SPLITS = splits(SIZE)
pytestmark = pytest.mark.mpi(min_size=2)


@every_case(SPLITS)
def test_every_split_equals_the_whole_batch(step, sizes, dtype):
    assert_parity("mpi", sizes, step, dtype)


@pytest.mark.parametrize("formats", [("channels_last", "strided"), ("strided", "channels_last")])
def test_memory_formats_equal_the_whole_batch(formats):
    # 70 channels: messages beyond a cache line, and odd
    assert_parity("mpi", SPLITS["uneven"], torch_step, channels=70, arguments=(None, formats))


@pytest.mark.parametrize("step", MASKED_STEPS)
def test_masked_batches_equal_the_gathered_valid_positions(step):
    kinds = [("random", None, "nothing", "padding")[rank % 4] for rank in range(SIZE)]
    assert_masked_parity("mpi", SPLITS["uneven"], kinds, step)


@pytest.mark.parametrize("step", [batch_norm_step, *STEPS])
def test_unsynchronised_layers_differ_from_the_whole_batch(step):
    assert_control("mpi", SPLITS["even"], step)


def _half(rank, world, xs, dys, step):
    half = world.Split(rank % 2)
    try:
        return step(half.Get_rank(), half, xs[rank % 2 :: 2], dys[rank % 2 :: 2])
    finally:
        half.Free()


@pytest.mark.parametrize("step", STEPS)
def test_sub_communicators_normalise_by_themselves(step):
    xs, dys = batch(4, [(n, 3, 3, 5) for n in SPLITS["uneven"]])
    results = run_ranks(_half, SIZE, "mpi", xs, dys, step)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert_equals_whole_batch(results[half], xs[half], dys[half])
    with pytest.raises(AssertionError):
        assert_equals_whole_batch(results, xs, dys)


def _outside(rank, world):
    group = world.Split(MPI.UNDEFINED if rank == 0 else 0, rank)
    syncbn.SyncBatchNorm(2, process_group=group)(torch.randn(3, 2))


def _intercommunicator(rank, world):
    half = world.Split(rank % 2)
    syncbn.numpy.SyncBatchNorm(2, comm=half.Create_intercomm(0, world, 1 - rank % 2))


def test_a_communicator_without_this_rank_and_an_intercommunicator_are_refused():
    first, *others = rank_errors(_outside, SIZE, "mpi")
    assert isinstance(first, ValueError)
    assert "expected an MPI communicator that this process is in; got MPI.COMM_NULL" in str(first)
    assert others == [None] * (SIZE - 1)
    for error in rank_errors(_intercommunicator, SIZE, "mpi"):
        assert isinstance(error, ValueError)
        assert "expected an MPI intracommunicator; got an intercommunicator: merge it" in str(error)


def _wrong_on_the_last(rank, world, bad):
    layer = syncbn.SyncBatchNorm(4, process_group=world)
    try:
        layer(bad if rank == SIZE - 1 else torch.randn(2, 4, 3))
    finally:
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("bad", [torch.randn(2, 5, 3), torch.ones(2, 4, dtype=torch.int64)], ids=["channels", "dtype"])
def test_bad_input_on_one_rank_is_an_error_on_every_rank(bad):
    *others, last = rank_errors(_wrong_on_the_last, SIZE, "mpi", bad)
    assert f"[rank {SIZE - 1}/{SIZE}] expected an input" in str(last)
    for rank, error in enumerate(others):
        assert type(error) is RuntimeError
        assert f"[rank {rank}/{SIZE}] expected statistics from every rank; another rank refused" in str(error)


def _wrong_array_on_rank_0(rank, world):
    syncbn.numpy.SyncBatchNorm(4, comm=world).forward(np.ones((2, 5 if rank == 0 else 4), np.float32))


def test_a_bad_array_on_one_rank_is_an_error_on_every_rank():
    first, *others = rank_errors(_wrong_array_on_rank_0, SIZE, "mpi")
    assert "expected an input with 4 channels" in str(first)
    assert all("another rank refused its input" in str(error) for error in others)


def _scaled(rank, world, sizes):
    return syncbn.scale_loss(torch.tensor(float(rank + 1)), sizes[rank], world).item()


def test_the_mean_of_scaled_losses_is_the_mean_over_samples():
    sizes = SPLITS["one_empty"]
    mean = sum((rank + 1) * n for rank, n in enumerate(sizes)) / sum(sizes)
    assert sum(run_ranks(_scaled, SIZE, "mpi", sizes)) / SIZE == pytest.approx(mean)


def _without_a_group(rank, world):
    import syncbn.comm.torch

    syncbn.comm.torch._looked_for_a_launcher = False
    with pytest.warns(RuntimeWarning, match=rf"launched as one of {SIZE} .*pass process_group=mpi4py\.MPI\.COMM_WORLD"):
        syncbn.SyncBatchNorm(2)(torch.randn(3, 2))
    syncbn.numpy.SyncBatchNorm(2).forward(np.eye(3, 2))  # whose None always means this process alone


def test_a_layer_without_a_group_says_that_it_is_not_synchronised():
    run_ranks(_without_a_group, SIZE, "mpi")


def _copies(rank, world):
    group = world.Dup()  # which mpi4py refuses to pickle
    with pytest.raises(ValueError, match="cannot serialize"):
        pickle.dumps(group)
    x = torch.full((4, 2), float(rank)) + torch.randn(4, 2) / 1e6
    layers = [syncbn.SyncBatchNorm(2, process_group=group), syncbn.numpy.SyncBatchNorm(2, comm=group)]
    converted = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), group)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    loaded = [pickle.loads(pickle.dumps(layer)) for layer in layers]
    for layer in (loaded[0], torch.load(file, weights_only=False)[0]):
        with pytest.raises(RuntimeError, match=r"pickled with one.*set layer\.process_group"):
            layer(x)
        layer.process_group = group
    with pytest.raises(RuntimeError, match=r"pickled with one.*layer\.comm"):
        loaded[1].forward(x.numpy())
    loaded[1].comm = group
    copies = [copy.deepcopy(layer) for layer in (*layers, *converted)]
    assert [getattr(c, "process_group", None) or c.comm for c in copies] == [group] * 3
    found = [layer(x).mean().item() for layer in (copies[0], copies[2], loaded[0])]
    found += [layer.forward(x.numpy()).mean().item() for layer in (copies[1], loaded[1])]
    group.Free()
    return found


def test_copies_keep_their_communicator_and_pickles_say_that_they_lost_it():
    ranks = np.arange(SIZE)
    expected = (ranks - ranks.mean()) / ranks.std()
    for rank, found in enumerate(run_ranks(_copies, SIZE, "mpi")):
        assert found == pytest.approx([expected[rank]] * 5, abs=1e-3)


@pytest.mark.skipif(SIZE > 2, reason="DistributedDataParallel takes seconds to import, in every process")
def test_ddp_over_gloo_with_layers_over_mpi_equals_one_process(monkeypatch, tmp_path):
    from support.tolerances import TRAINING, UNSYNCHRONISED
    from support.training import largest_difference, train

    def over_gloo(self, *_):
        raise AssertionError("a layer's message went over Gloo")

    monkeypatch.setattr(TorchCommunicator, "all_reduce", over_gloo)
    monkeypatch.setattr(TorchCommunicator, "direct_sums", over_gloo)
    store = Path(WORLD.bcast(tmp_path), "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=WORLD.Get_rank(), world_size=SIZE)
    try:
        sizes = [3, 5]
        whole = train(0, None, sizes, False, False)
        synchronised = run_ranks(_train, SIZE, "mpi", sizes, True)
        assert largest_difference(synchronised, whole) < TRAINING
        assert largest_difference(run_ranks(_train, SIZE, "mpi", sizes, False), whole) > UNSYNCHRONISED
        with pytest.raises(RankFailedError, match="went over Gloo"):
            run_ranks(_default_group_step, SIZE, "mpi")
    finally:
        dist.destroy_process_group()


def _train(rank, world, sizes, convert):
    from support.training import train

    return train(rank, dist.group.WORLD, sizes, convert, True, world)


def _default_group_step(rank, world):
    syncbn.SyncBatchNorm(2)(torch.randn(3, 2))
