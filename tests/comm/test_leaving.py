"""Shared memory: who leaves is known at once, threads share it, and a signal's handler cannot wait for itself."""

import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

import syncbn
from syncbn.comm import as_communicator, shared_memory

pytestmark = pytest.mark.skipif(bool(shared_memory.absence()), reason=shared_memory.absence())


def _destroyed(rank, group, by_world):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x)  # the graph and the layer keep the group
    start = time.monotonic()
    if rank == 1:
        if by_world:
            world = syncbn.World(1, 2, 1, 2, torch.device("cpu"), "gloo", None)
            world._group = dist.group.WORLD
            world.close()
        else:
            dist.destroy_process_group()
            time.sleep(5)
        with pytest.raises(RuntimeError, match="got one that was destroyed: start all ranks again"):
            y.sum().backward()
        time.sleep(2)
        return None
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    return time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("by_world", [False, True])
def test_a_rank_that_destroys_the_group_is_not_waited_for_though_its_layers_live_on(by_world):
    (seconds, error), _ = run_ranks(_destroyed, 2, "gloo", by_world)
    assert seconds < 60, "the timeout"
    assert "expected rank 1 to take part in a sum of 6 float64, backward of SyncBatchNorm(3), call 0" in error
    assert "got its leaving: it has ended, destroyed the process group, or given up" in error


def _first_sums(rank, group):
    found, start = [], threading.Barrier(4)

    def first():
        start.wait()
        found.append(as_communicator(group).shared_memory())

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(found), len(set(map(id, found)))


def test_threads_that_make_their_first_sum_at_once_share_one_memory():
    for number, memories in run_ranks(_first_sums, 2, "gloo"):
        assert (number, memories) == (4, 1)


def _interrupted(rank, group):
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    said = []

    def handler(*_):
        try:
            layer(torch.randn(4, 3))
        except RuntimeError as error:
            said.append(str(error))

    if rank == 1:
        time.sleep(2)
    else:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    layer(torch.randn(4, 3))
    layer(torch.randn(4, 3))
    return said, layer.num_batches_tracked.item(), layer.running_mean.tolist()


def test_a_handler_that_sums_within_a_sum_gets_an_error_and_the_sum_goes_on():
    (said, *of_0), (_, *of_1) = run_ranks(_interrupted, 2, "gloo")
    assert len(said) == 1
    assert "last sum was broken off, or is under way in this very thread" in said[0]
    assert of_0 == of_1
    assert of_0[0] == 3
