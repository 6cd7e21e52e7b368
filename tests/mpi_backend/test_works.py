"""Operations under way: that they move on by themselves, keep their memory, end in futures, and fail in words."""

import gc
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from test_collectives import all_gather_single, reduce_scatter_single

from syncbn.mpi.tensors import reduce_buffer
from syncbn.mpi.work import MPIWork

pytestmark = pytest.mark.mpi(min_size=2)

LARGE = 400_000  # elements: no implementation sends as much before the other side is ready


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def test_an_operation_moves_on_while_nobody_waits():
    tensor = torch.full((LARGE,), rank() + 1.0)
    work = dist.all_reduce(tensor, async_op=True)
    assert until(lambda: work.is_over), "neither wait nor is_completed has been called"
    assert tensor[0] == tensor[-1] == size() * (size() + 1) / 2
    assert work.wait()


def test_an_operation_in_the_foreground_would_not():
    comm, tensor = dist.group.WORLD.communicator.comm, torch.ones(LARGE)
    request = comm.Iallreduce(MPI.IN_PLACE, reduce_buffer(tensor), MPI.SUM)
    work = MPIWork("control", [request], [tensor], keep=[tensor], background=False)
    assert not until(lambda: work.is_over, 0.1)
    work.wait()
    assert tensor[0] == size()


def test_other_work_is_done_between_start_and_wait():
    tensors = [torch.full((LARGE,), float(rank() + k)) for k in range(4)]
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    product = torch.ones(100, 100) @ torch.ones(100, 100)
    single = torch.ones(1)
    dist.all_reduce(single)  # a later operation may be waited for first
    for work in reversed(works):
        work.wait()
    assert product[0, 0] == 100
    assert single.item() == size()
    assert [t[-1].item() for t in tensors] == [sum(range(size())) + size() * k for k in range(4)]


def test_the_caller_may_forget_the_tensors():
    futures = []
    for start in (
        lambda: dist.all_reduce(torch.ones(LARGE), async_op=True),
        lambda: dist.all_reduce(torch.ones(LARGE, dtype=torch.bfloat16), async_op=True),
        lambda: dist.broadcast(torch.full((LARGE,), float(rank() + size())), 0, async_op=True),
    ):
        futures.append(start().get_future())
        gc.collect()
        junk = [torch.zeros(LARGE) for _ in range(3)]
        del junk
    assert [f.wait()[0][-1].item() for f in futures] == [size(), size(), size()]


def test_a_future_runs_its_callbacks_and_they_may_start_operations():
    seen = []

    def again(future):
        seen.append(threading.current_thread().name)
        nested = dist.all_reduce(future.value()[0], async_op=True)
        return nested.get_future().wait()[0]  # in the thread that would have to complete it

    first = dist.all_reduce(torch.ones(LARGE), async_op=True).get_future()
    assert first.then(again).wait()[0] == size() ** 2
    assert len(seen) == 1


def test_a_future_of_a_finished_operation_is_done_and_is_one():
    work = dist.all_reduce(torch.ones(2), async_op=True)
    work.wait()
    assert work.get_future().done()
    assert work.get_future() is work.get_future()
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.result()[0].tolist() == [size()] * 2


def test_from_several_threads():
    group = [dist.new_group(list(range(size()))) for _ in range(3)]
    found = [None] * 3

    def run(i):
        tensor = torch.full((1000,), float(i))
        for _ in range(20):
            dist.all_reduce(tensor, dist.ReduceOp.AVG, group[i])
        found[i] = tensor

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f[7].item() for f in found] == [0, 1, 2]
    for g in group:
        dist.destroy_process_group(g)


def test_an_operation_that_others_do_not_join_is_an_error_in_time():
    other = (rank() + 1) % size()
    buffer = torch.zeros(3)
    for _ in range(2):
        work = dist.irecv(buffer, other, tag=11)
        with pytest.raises(RuntimeError, match=r"recv of torch.float32 over mpi4py: Timed out after 0.05 s: expected"):
            work.wait(timedelta(seconds=0.05))
        with pytest.raises(RuntimeError, match="expected every rank"):
            work.get_future().wait()
        assert not work.is_success()
        assert "expected every rank" in str(work.exception())
    dist.barrier()
    for _ in range(2):  # nobody waits for these, but MPI has room for them
        dist.send(torch.ones(3), (rank() - 1) % size(), tag=11)


def test_the_groups_timeout_ends_futures():
    group = dist.new_group(list(range(size())), timeout=timedelta(seconds=0.1))
    future = dist.irecv(torch.zeros(1), (rank() + 1) % size(), group, tag=1).get_future()
    with pytest.raises(RuntimeError, match=r"Timed out after 0.1 s: expected every rank to take part"):
        future.wait()
    dist.barrier()  # now that all have waited in vain
    dist.send(torch.ones(1), (rank() - 1) % size(), group, tag=1)


def test_a_message_longer_than_its_tensor_is_an_error_and_not_an_overflow():
    after, before = (rank() + 1) % size(), (rank() - 1) % size()
    guarded = torch.zeros(4)
    sending = dist.isend(torch.ones(4), after, tag=2)
    with pytest.raises(RuntimeError, match=r"recv of torch.float32 over mpi4py: .* longer than the tensor for it"):
        dist.recv(guarded[:2], before, tag=2)
    sending.wait()
    assert guarded[2:].tolist() == [0, 0]


def refusals():
    n, ones, world = size(), torch.ones(2), dist.group.WORLD
    halves = [n + 1] + [0] * (n - 1)
    cases = {
        r"all_reduce of torch.float32 over mpi4py: .* PREMUL_SUM.* multiply": lambda: dist.all_reduce(
            ones, dist._make_nccl_premul_sum(2.0)
        ),
        rf"all_gather .*list of {n} tensors.*got 1": lambda: dist.all_gather([ones], ones),
        r"all_gather .*expected a tensor of 2 elements.*got 3": lambda: dist.all_gather([torch.ones(3)] * n, ones),
        rf"all_gather_into_tensor .* {2 * n} elements": lambda: all_gather_single(torch.ones(2), ones),
        rf"reduce_scatter_tensor .* {2 * n} elements": lambda: reduce_scatter_single(ones, torch.ones(1)),
        rf"all_to_all_single .*input split sizes for {n} ranks": lambda: dist.all_to_all_single(
            torch.ones(n), torch.ones(n), None, halves
        ),
    }
    for tag in (-1, 2**31):  # the first of which MPI would take for any tag
        expected = rf"expected a tag from 0 to \d+; got {tag}"
        cases |= {
            f"send .*{expected}": lambda tag=tag: world.send([ones], 0, tag),
            f"recv .*{expected}": lambda tag=tag: world.recv([ones], 0, tag),
        }
    yield from ((ValueError, pattern, call) for pattern, call in cases.items())
    unknown = "send of torch.float32 over mpi4py: .* it was given a rank that is not in the group"
    yield RuntimeError, unknown, lambda: world.send([ones], n, 0)
    cases = {
        r"torch.float32.*ReduceOp.BAND": lambda: dist.all_reduce(ones, dist.ReduceOp.BAND),
        r"torch.int32.*ReduceOp.AVG": lambda: dist.all_reduce(ones.int(), dist.ReduceOp.AVG),
        r"torch.complex64.*ReduceOp.MAX": lambda: world.allreduce([ones.cfloat()], options("MAX")),
        r"all_reduce .*sparse_coo: send to_dense\(\)": lambda: dist.all_reduce(ones.to_sparse()),
        r"broadcast .*meta device": lambda: dist.broadcast(ones.to("meta"), 0),
        r"broadcast .*one dtype": lambda: world.broadcast([ones, ones.int()]),
    }
    yield from ((TypeError, pattern, call) for pattern, call in cases.items())


def options(operation):
    chosen = dist.AllreduceOptions()
    chosen.reduceOp = getattr(dist.ReduceOp, operation)
    return chosen


def test_refusals_name_operation_dtype_and_cure():
    for kind, pattern, call in refusals():
        with pytest.raises((kind, RuntimeError), match=pattern) as caught:
            call()
        assert caught.type is kind
        assert f"[rank {rank()}/{size()}] " in str(caught.value)
    dist.barrier()  # all have refused, and the group goes on


def test_what_is_pending_is_not_kept_after_its_end():
    before = len(dist.group.WORLD._pending)
    for _ in range(50):
        dist.all_reduce(torch.ones(2))
    assert len(dist.group.WORLD._pending) <= max(before, 1)
