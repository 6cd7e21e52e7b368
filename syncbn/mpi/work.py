"""MPI's requests as torch.distributed's Work, and the thread that moves them on while nobody waits.

MPI makes progress only inside its own calls. Whoever waits for a Work tests its requests, with pauses that grow, so
that the core is free for the rank that is late. For Works that nobody waits for yet, and for futures, one thread per
process does the same: it sleeps as long as nothing is under way, and needs MPI_THREAD_MULTIPLE. With less than that
there is no such thread: MPI moves on inside its calls only, and get_future() returns when the operation is complete.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

# How a request is waited for: first tests alone, for a small message takes less than falling asleep and waking up; then
# pauses of an eighth of the time so far, from a twentieth of a millisecond to one, with several tests after each: on a
# network a collective takes several steps, of which a test makes one.
_FREE_SECONDS, _SHORTEST_SECONDS, _LONGEST_SECONDS = 2e-4, 5e-5, 1e-3
_TESTS = 4
# How many Works are kept for a caller in C++ who has not yet waited for them. torch 2.6 keeps the C++ half of a Work
# only, which needs the methods of the Python half.
_UNCLAIMED = 256
_give_way = getattr(os, "sched_yield", lambda: None)  # not on Windows


class MPIWork(dist.Work):
    """An operation under way.

    Args:
        label: names the operation, the dtype and the group, for messages.
        requests: what MPI has under way for it.
        results: the tensors that the operation writes, for result() and get_future().
        finish: what to do once MPI is done: copies back what MPI did not write into the tensors themselves.
        keep: what must stay in memory until then. mpi4py keeps some operations' buffers alive and not others'.
        seconds: after which who waits gets an error.
        background: whether it has to move on, too, while nobody waits.
    """

    def __init__(
        self,
        label: str,
        requests: Sequence[Any],
        results: Sequence[torch.Tensor] = (),
        finish: Callable[[], None] | None = None,
        keep: Sequence[Any] = (),
        seconds: float = 1800.0,
        background: bool = True,
    ) -> None:
        super().__init__()
        self.label = label
        self._requests, self._finish, self._keep = list(requests), finish, list(keep)
        self._results = list(results)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._done = False
        self._error: Exception | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._to_settle: torch.futures.Future[Any] | None = None
        self._status = MPI.Status()
        if background:
            _progress.unclaimed[id(self)] = self
            if len(_progress.unclaimed) > _UNCLAIMED:
                _progress.unclaimed.popitem(last=False)
            _progress.watch(self)

    def advance(self) -> bool:
        """Tests the requests, once, unless another thread is at it. Returns whether the operation is over."""
        if self._done or not self._lock.acquire(blocking=False):
            return self._done
        try:
            if not self._done:
                self._done = self._test()
        finally:
            self._lock.release()
        if self._done:
            self._settle()
        return self._done

    def _test(self) -> bool:
        try:
            while self._requests:
                if not self._requests[-1].Test(self._status):
                    return False
                self._requests.pop()
            if self._finish is not None:
                self._finish()
        except Exception as error:
            self._error = refused(self.label, error)
        if self._requests:  # an error has left some under way, and MPI may still write
            _progress.lost.append(self)
        else:
            self._keep, self._finish = [], None
        return True

    def fail(self, reason: str) -> None:
        """Ends the operation, for those who wait, with an error. MPI may go on with it, so its memory stays."""
        with self._lock:
            if self._done:
                return
            self._error = RuntimeError(f"{self.label}: {reason}")
            _progress.lost.append(self)
            self._done = True
        self._settle()

    def _settle(self) -> None:
        with self._lock:  # whoever takes the future out settles it, once, and its callbacks run without the lock
            future, self._to_settle = self._to_settle, None
        if future is not None and self._error is not None:
            future.set_exception(self._error)
        elif future is not None:
            future.set_result(self._results)

    @property
    def is_over(self) -> bool:
        """Whether the operation was over when it was last looked at."""
        return self._done

    def late(self) -> bool:
        """Returns whether the group's timeout has passed; if so the operation has failed."""
        if time.monotonic() <= self._deadline:
            return False
        self.fail(_timed_out(self._seconds))
        return True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Returns True when the operation is complete, and its results are in the tensors.

        Args:
            timeout: the longest to wait; 0 for the group's own timeout.

        Raises:
            RuntimeError: MPI refused the operation, or the time is over.
        """
        own = timeout.total_seconds()
        deadline = time.monotonic() + own if own > 0 else self._deadline
        self._deadline = max(self._deadline, deadline)
        start, tests = time.monotonic(), 0
        while not self.advance():
            waited = time.monotonic() - start
            tests += 1
            if waited < _FREE_SECONDS:
                _give_way()  # to a rank on the same core that is late
            elif tests % _TESTS == 0:
                if start + waited > deadline:
                    self.fail(_timed_out(own if own > 0 else self._seconds))
                time.sleep(min(max(waited / 8, _SHORTEST_SECONDS), _LONGEST_SECONDS))
        _progress.unclaimed.pop(id(self), None)
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Returns a future of the list of results. Its callbacks may run in the thread that moves operations on."""
        if not _progress.works or threading.current_thread() is _progress.thread:
            self._wait_quietly()  # nobody else would complete it
        with self._lock:
            if self._future is None:
                # An exception set on a future is but its value to C++, whose DistributedDataParallel would take it for
                # tensors; one that a callback raises is an error there, too.
                self._to_settle = torch.futures.Future()
                self._future = self._to_settle.then(torch.futures.Future.value)
            future = self._future
        if self._done:
            self._settle()
        else:
            _progress.watch(self)
        _progress.unclaimed.pop(id(self), None)
        return future

    def _wait_quietly(self) -> None:
        try:
            self.wait()
        except Exception as error:
            if error is not self._error:  # which the future will carry
                raise

    def is_completed(self) -> bool:
        return self.advance()

    def is_success(self) -> bool:
        return self.advance() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._results

    def source_rank(self) -> int:
        """Returns the rank, in the group, that a received message came from."""
        return int(self._status.Get_source())

    _source_rank = source_rank  # as torch.distributed.recv calls it


class _Progress:
    """The thread that moves operations on, and the Works that must not be freed yet."""

    def __init__(self) -> None:
        self.works: bool = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.thread: threading.Thread | None = None
        self.unclaimed: collections.OrderedDict[int, MPIWork] = collections.OrderedDict()
        self.lost: list[MPIWork] = []
        self._watched: collections.deque[MPIWork] = collections.deque()
        self._some = threading.Event()
        self._start = threading.Lock()
        self._stopped = False

    def watch(self, work: MPIWork) -> None:
        """Moves work on until it is over."""
        if not self.works or self._stopped:
            return
        self._watched.append(work)
        if not self._some.is_set():
            with self._start:
                if self.thread is None:
                    self.thread = threading.Thread(target=self._run, name="syncbn-mpi-progress", daemon=True)
                    self.thread.start()
            self._some.set()

    def stop(self) -> None:
        """Ends the thread, which must not call MPI while or after the process finalises it."""
        self._stopped = True
        self._some.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=5)

    def _run(self) -> None:
        pause = _SHORTEST_SECONDS
        while not self._stopped:
            if not self._watched:
                self._some.clear()
                if not self._watched:  # nothing came between the two
                    self._some.wait()
                pause = _SHORTEST_SECONDS
            time.sleep(pause)
            before = len(self._watched)
            for _ in range(before):
                work = self._watched.popleft()
                if not (work.advance() or work.late()):
                    self._watched.append(work)
                del work
            pause = _SHORTEST_SECONDS if len(self._watched) < before else min(2 * pause, _LONGEST_SECONDS)


def refused(label: str, error: Exception) -> Exception:
    """Returns the error to raise for one that MPI reported about the operation that label names."""
    if not isinstance(error, MPI.Exception):
        return error
    hint = "see whether every rank of the group called it with tensors of the same sizes and dtypes"
    if error.Get_error_class() == MPI.ERR_TRUNCATE:
        hint = "a message was longer than the tensor for it: give every rank tensors of the sizes that the others send"
    elif error.Get_error_class() in (MPI.ERR_ROOT, MPI.ERR_RANK):
        hint = "it was given a rank that is not in the group"
    reason = " ".join(error.Get_error_string().split())  # MPICH's has several lines
    return RuntimeError(f"{label}: expected MPI to succeed; got {reason}: {hint}")


def _timed_out(seconds: float) -> str:
    return (
        f"Timed out after {seconds:g} s: expected every rank to take part; not all have: see whether one has failed, "
        "or calls other operations, or give init_process_group a longer timeout"
    )


_progress = _Progress()
atexit.register(_progress.stop)
