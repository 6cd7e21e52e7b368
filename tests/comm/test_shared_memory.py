"""Sums in shared memory: right whatever the lengths and the timing, and an error where ranks fail or do not fit."""

import _thread
import ctypes
import errno
import functools
import os
import random
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.parity import STEPS, assert_parity
from support.ranks import rank_errors, run_ranks
from support.shared_memory import joined, on_all, summed

import syncbn
from syncbn.comm import as_communicator, shared_memory

pytestmark = pytest.mark.skipif(bool(shared_memory.absence()), reason=shared_memory.absence())
SECONDS = timedelta(seconds=1)
PART = 8192  # float64 that go at once


def names():
    return {path.name for path in Path("/dev/shm").glob("syncbn-*")}


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("length", [1, 129, PART - 1, PART, PART + 1, 3 * PART + 5])
def test_sums_are_added_in_the_order_of_ranks(world_size, length):
    generator = np.random.default_rng(length)
    vectors = np.ldexp(generator.standard_normal((world_size, length)), generator.integers(-30, 30, (1, length)))
    expected = vectors[0].copy()
    for vector in vectors[1:]:
        expected += vector
    for found in on_all(joined(world_size), lambda rank, memory: summed(memory, vectors[rank])):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("world_size", [2, 5])
def test_every_sum_is_right_whenever_ranks_come(world_size):
    """What a rank reads belongs to the sum that it takes part in, though others are ahead of it, or far behind."""

    def work(rank, memory):
        lengths, delays = random.Random(0), random.Random(rank)
        for step in range(400):
            if delays.random() < 0.2:
                time.sleep(delays.choice([0.0, 0.0001, 0.001]))
            found = summed(memory, np.full(lengths.choice([1, 3, 400, PART + 1]), float(step * (rank + 1))))
            assert (found == step * world_size * (world_size + 1) / 2).all(), step
        return True

    assert on_all(joined(world_size), work) == [True] * world_size


def test_the_number_of_messages_may_overflow():
    memories = joined(2)
    for rank in range(2):
        ctypes.c_uint32.from_address(memories[0]._address + 128 * rank).value = 2**32 - 3
    results = on_all(memories, lambda rank, memory: [summed(memory, [step, rank]).tolist() for step in range(8)])
    assert results == [[[2.0 * step, 1.0] for step in range(8)]] * 2
    assert ctypes.c_uint32.from_address(memories[0]._address).value == 5


def test_different_lengths_are_an_error_on_every_rank_and_the_next_sum_is_right():
    lengths = [5, 7, 5]
    memories = joined(3)
    errors = on_all(memories, lambda rank, memory: summed(memory, np.ones(lengths[rank])))
    for rank, error in enumerate(errors):
        assert error == (
            f"[rank {rank}/3] expected the same message of the same layer from every rank; got 5 float64 from ranks 0, "
            "2; 7 float64 from rank 1: see that every rank runs the same layers, with as many channels, in the same "
            "order, forward and backward, with the same dtype, eps, momentum and parameters, and has converted the "
            "same model, for layers are known by their paths in it"
        )
    assert [list(found) for found in on_all(memories, lambda rank, memory: summed(memory, [rank, 1.0]))] == [[3, 3]] * 3


def test_a_rank_that_does_not_come_in_time_is_named():
    memories = joined(3, SECONDS)
    late = re.compile(r"\[rank 0/3\] expected rank 2 to take part in a sum of 4 float64 within 0:00:01; got nothing")
    errors = on_all(memories[:2], lambda rank, memory: summed(memory, np.ones(4)))
    assert late.match(errors[0])
    assert "[rank 1/3] expected rank 2" in errors[1]
    for memory in memories[:2]:
        with pytest.raises(RuntimeError, match=r"got one in which this rank has given up waiting for rank 2: start"):
            summed(memory, np.ones(4))
    assert list(summed(memories[2], np.ones(4))) == [3.0] * 4  # what the others have sent they have sent
    with pytest.raises(RuntimeError, match=r"expected rank 0 to take part .*; got its leaving: .* or given up"):
        summed(memories[2], np.ones(4))


def test_a_sum_that_was_complete_when_a_rank_left_is_one(monkeypatch):
    """The rank comes and goes between this one's look for its message and that for its lock."""
    memories, other = joined(2), []

    class Library:
        def __getattr__(self, name):
            return getattr(library, name)

        def syncbn_shared_is_locked(self, *_):
            memory = memories.pop()
            other.append(threading.Thread(target=lambda: other.append(summed(memory, [2.0]))))
            other[0].start()
            other[0].join()
            return 0

    library = shared_memory._library
    monkeypatch.setattr(shared_memory, "_library", Library())
    assert list(summed(memories[0], [1.0])) == [3.0]
    assert list(other[1]) == [3.0]


def test_a_rank_that_has_left_is_named_at_once():
    memories = joined(2)
    del memories[1]
    with pytest.raises(
        RuntimeError, match=r"expected rank 1 to take part in a sum of 4 float64; got its leaving: it has ended"
    ):
        summed(memories[0], np.ones(4))
    with pytest.raises(RuntimeError, match="got one that rank 1 has left: start all ranks again"):
        summed(memories[0], np.ones(4))


def test_an_interrupt_ends_the_wait_and_the_group(request):
    # Other tests of this process may have set another.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    memories = joined(2)
    threading.Timer(0.2, _thread.interrupt_main, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        summed(memories[0], np.ones(4))
    with pytest.raises(RuntimeError, match="got one in which this rank's last sum was broken off, or is under"):
        summed(memories[0], np.ones(4))


def _fork(rank, group):
    buffer = torch.ones(3, dtype=torch.float64)
    as_communicator(group).all_reduce(buffer)
    if rank == 0:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                as_communicator(group).all_reduce(buffer)
            except RuntimeError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        return os.fdopen(reader).read()
    return ""


def test_a_fork_cannot_answer_in_its_parents_place():
    message, _ = run_ranks(_fork, 2, "gloo")
    assert message.startswith("[rank 0/2] expected the process that joined the group to use it; got a fork of it")


def _leave_a_child(rank, group, done):
    buffer = torch.ones(2, dtype=torch.float64)
    as_communicator(group).all_reduce(buffer)
    if rank == 1:
        if os.fork() == 0:
            while not done.exists():
                time.sleep(0.01)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="expected rank 1 to take part in a sum of 2 float64; got its leaving"):
        as_communicator(group).all_reduce(buffer)
    done.touch()


def test_a_child_does_not_pass_for_its_parent(tmp_path):
    done = tmp_path / "done"
    try:
        assert rank_errors(_leave_a_child, 2, "gloo", done)[0] is None
    finally:
        done.touch()


def _end(rank, group, how):
    layer, x = syncbn.SyncBatchNorm(2, process_group=group), torch.randn(4, 2)
    layer(x)
    if rank == 1:
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.destroy_process_group()
        time.sleep(2)
        return
    layer(x)


@pytest.mark.parametrize("how", ["exit", "kill", "destroy"])
def test_a_process_that_ends_is_named_by_those_that_wait(how):
    waiting, _ = rank_errors(_end, 2, "gloo", how)
    assert isinstance(waiting, RuntimeError)
    assert str(waiting).startswith(
        "[rank 0/2] expected rank 1 to take part in a sum of 5 float64, forward of SyncBatchNorm(2), call 1; got its "
        "leaving: it has ended, destroyed the process group, or given up, whose last message was forward of "
    )


def _without(rank, absent):
    """Takes the shared memory from this process, if its rank is among them."""
    if rank in absent:
        shared_memory._FOLDER = Path("/nonexistent")


def _step_without(rank, group, xs, dys, dtype, step, absent):
    _without(rank, absent)
    result = step(rank, group, xs, dys, dtype)
    assert as_communicator(group).shares_memory == (not absent)
    return result


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("absent", [(), (0,), (1,), (0, 1, 2)])
def test_with_and_without_shared_memory_ranks_equal_the_whole_batch(step, absent):
    before = names()
    assert_parity("gloo", [1, 0, 5], _step_without, spatial=(4, 5), arguments=(step, absent))
    assert names() <= before


def _random(rank):
    generator = torch.Generator().manual_seed(rank)
    exponents = torch.randint(-20, 20, (129,), generator=generator)
    return torch.ldexp(torch.randn(129, dtype=torch.float64, generator=generator), exponents)


def _sum_of_random(rank, group, absent):
    """The sum over ranks of 129 numbers whose magnitudes differ by 2^40, so that their order shows."""
    _without(rank, absent)
    buffer = _random(rank)
    as_communicator(group).all_reduce(buffer)
    return buffer


@pytest.mark.parametrize("absent", [(), (0, 1, 2, 3)], ids=["shared memory", "messages"])
def test_gloo_sums_in_the_order_of_ranks_on_every_rank(absent):
    expected = ((_random(0) + _random(1)) + _random(2)) + _random(3)
    assert not torch.equal(expected, ((_random(3) + _random(2)) + _random(1)) + _random(0))
    for found in run_ranks(_sum_of_random, 4, "gloo", absent):
        assert torch.equal(found, expected)


def _odd_buffers(rank, group):
    gaps = torch.arange(6, dtype=torch.float64)[::2]
    as_communicator(group).all_reduce(gaps)
    with pytest.raises(TypeError, match=rf"\[rank {rank}/2\] expected a buffer of float64 to sum; got torch.float32"):
        as_communicator(group).all_reduce(torch.ones(4))
    return gaps.tolist()


def test_buffers_with_gaps_are_summed_and_those_of_other_dtypes_refused():
    assert run_ranks(_odd_buffers, 2, "gloo") == [[0.0, 4.0, 8.0]] * 2


def _on_another_default_device(rank, group):
    buffer = torch.ones(2, dtype=torch.float64)
    with torch.device("meta"):
        as_communicator(group).all_reduce(buffer)
    return buffer.tolist()


def test_the_default_device_does_not_matter():
    assert run_ranks(_on_another_default_device, 2, "gloo") == [[2.0, 2.0]] * 2


def _two_groups(rank, _):
    groups = [dist.new_group([0, 1, 2]), dist.new_group([0, 2])]
    sums = []
    for group in groups[: 1 if rank == 1 else 2] * 2:
        buffer = torch.tensor([1.0, rank], dtype=torch.float64)
        as_communicator(group).all_reduce(buffer)
        sums.append(buffer.tolist())
    return sums


def test_groups_share_no_memory_with_each_other():
    all_three, two = [3.0, 3.0], [2.0, 2.0]
    assert run_ranks(_two_groups, 3, "gloo") == [[all_three, two] * 2, [all_three] * 2, [all_three, two] * 2]


def test_memory_that_would_run_out_is_not_begun(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    before = names()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert joined(2) == [None, None]
    assert names() <= before


def test_nothing_is_left_behind():
    before, files = names(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(threading.BrokenBarrierError):  # some have not come yet, and the process ends meanwhile
        shared_memory.join(0, 2, SECONDS, lambda note: threading.Barrier(2).wait(0.01))
    assert names() <= before
    memories = joined(3)
    assert all(memories)
    assert names() <= before
    del memories
    assert len(os.listdir("/proc/self/fd")) == files


def test_says_why_there_is_none(monkeypatch):
    assert shared_memory.absence() == ""
    monkeypatch.setattr(shared_memory, "_FOLDER", Path("/nonexistent"))
    assert shared_memory.absence() == "/nonexistent is not there, or not to be written to"
    monkeypatch.setattr(shared_memory, "_library", None)
    assert "compiler" in shared_memory.absence() or "source folder" in shared_memory.absence()
