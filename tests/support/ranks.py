"""Runs one function on several ranks: as threads, as processes over Gloo, or on those that this process is one of.

    run_ranks(fn, 3, "thread", *args)  ->  [fn(rank, group, *args) for each rank], all running at once

`group` serves as process_group. A failing rank's own error is raised, and no rank is left behind, whether a rank
raises, hangs or exits.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What the other ranks get to finish by themselves after one has failed; processes may still be starting.
THREAD_GRACE_SECONDS, PROCESS_GRACE_SECONDS = 3.0, 15.0

_processes = multiprocessing.get_context("forkserver")
# What each rank would take seconds to import: DistributedDataParallel needs torch._dynamo, and graphs the rest.
_GRAPHS = ["torch._dynamo", "torch._inductor.compile_fx", "torch.export._trace", "sympy"]
_processes.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "syncbn.nn", *_GRAPHS])


class ThreadCommunicator:
    """A syncbn.comm.Communicator between threads: sums in the order of the ranks, and keeps what it was asked for."""

    def __init__(self, rank: int, buffers: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(buffers)
        self.messages: list[tuple[torch.dtype | str, int]] = []
        self.labels: list[Any] = []
        self._buffers, self._barrier = buffers, barrier

    def all_reduce(self, buffer: Any, label: Any = None) -> None:
        self.messages.append((buffer.dtype, len(buffer)))
        self.labels.append(label)
        self._buffers[self.rank] = buffer
        self._barrier.wait()
        lengths = {len(b) for b in self._buffers}
        total = sum(self._buffers[1:], start=self._buffers[0] + 0.0) if len(lengths) == 1 else None
        self._barrier.wait()
        if total is None:
            raise AssertionError(f"ranks sent buffers of different lengths: {lengths}")
        buffer[...] = total


class RankFailedError(AssertionError):
    """One or more ranks raised, hung or exited; carries what each of them said."""


def run_ranks(fn: Callable[..., Any], world_size: int, launcher: str, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Returns fn(rank, group, *args) of every rank.

    Args:
        fn: for "gloo" a function that pickle finds by its name, with picklable arguments and result.
        world_size: the number of ranks.
        launcher: "thread" or "gloo"; or, where all ranks of mpirun call, and get the same, "mpi" within tests/mpi, with
            MPI.COMM_WORLD as group, or "group" within tests/mpi_backend, with torch.distributed's default group.
        args: passed on.
        timeout: seconds after which ranks that have not answered count as hung; under mpirun pytest's ends all.

    Raises:
        RankFailedError: naming the ranks, with their tracebacks.
    """
    outcomes = _LAUNCHERS[launcher](fn, world_size, args, timeout)
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
    if failed:
        raise RankFailedError("\n".join(f"rank {rank}: {failure.text}" for rank, failure in failed.items()))
    return [outcome.value for outcome in outcomes]


def rank_errors(
    fn: Callable[..., Any], world_size: int, launcher: str, *args: Any, timeout: float = 60.0
) -> list[BaseException | None]:
    """Returns the exception that fn raised on each rank, None for a rank that did not raise."""
    outcomes = _LAUNCHERS[launcher](fn, world_size, args, timeout)
    return [outcome.error if isinstance(outcome, _Failure) else None for outcome in outcomes]


class _Success:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Failure:
    def __init__(self, error: BaseException, text: str) -> None:
        self.error, self.text = error, text


def _attempt(fn: Callable[..., Any], *args: Any) -> _Success | _Failure:
    try:
        return _Success(fn(*args))
    except BaseException as error:  # a rank's every end is reported, by its number
        return _Failure(error, traceback.format_exc())


def _run_threads(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    barrier = threading.Barrier(world_size)
    buffers: list[Any] = [None] * world_size
    answers: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        answers[rank] = _attempt(fn, rank, ThreadCommunicator(rank, buffers, barrier), *args)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    failing = False
    while any(answer is None for answer in answers) and time.monotonic() < deadline:
        if not failing and any(isinstance(answer, _Failure) for answer in answers):
            failing, deadline = True, min(deadline, time.monotonic() + THREAD_GRACE_SECONDS)
        time.sleep(0.0002)
    barrier.abort()  # frees who waits for a rank that will not come
    for thread in threads:
        thread.join(0.1)
    return [answer or _Failure(TimeoutError(), f"no answer within {timeout} s") for answer in answers]


def _run_gloo(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    outcomes: list[Any] = [None] * world_size
    with tempfile.TemporaryDirectory() as folder:
        processes, waiting = [], {}
        for rank in range(world_size):
            receiver, sender = _processes.Pipe(duplex=False)
            process = _processes.Process(
                target=_gloo_rank, args=(sender, fn, rank, world_size, str(Path(folder, "store")), args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            waiting[receiver] = rank
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for receiver in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(receiver)
                try:
                    outcomes[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    processes[rank].join()
                    text = f"exited with code {processes[rank].exitcode} and no answer"
                    outcomes[rank] = _Failure(SystemExit(processes[rank].exitcode), text)
                receiver.close()
                if isinstance(outcomes[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + PROCESS_GRACE_SECONDS)
        for receiver, rank in waiting.items():
            processes[rank].kill()
            outcomes[rank] = _Failure(
                TimeoutError(), f"no answer within {timeout} s, or {PROCESS_GRACE_SECONDS} s of a failure"
            )
            receiver.close()
        for process in processes:
            process.join()
    return outcomes


def _gloo_rank(sender: Any, fn: Callable[..., Any], rank: int, world_size: int, store: str, args: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    outcome = _attempt(fn, rank, dist.group.WORLD, *args)
    sender.send_bytes(pickle.dumps(outcome))
    if isinstance(outcome, _Success):
        dist.destroy_process_group()


def _run_mpi(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    assert world.Get_size() == world_size
    return world.allgather(_attempt(fn, world.Get_rank(), world, *args))


def _run_group(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    assert dist.get_world_size() == world_size
    outcomes: list[Any] = [None] * world_size
    dist.all_gather_object(outcomes, _attempt(fn, dist.get_rank(), dist.group.WORLD, *args))
    return outcomes


_LAUNCHERS = {"thread": _run_threads, "gloo": _run_gloo, "mpi": _run_mpi, "group": _run_group}
