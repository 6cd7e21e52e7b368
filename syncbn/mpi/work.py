"""MPI requests as torch.distributed's Work, and the thread that makes progress on them while nobody waits.

MPI makes progress only inside its own calls. A thread that waits for a Work tests its requests, with growing pauses, so
that a late rank can use the core. For Works that nobody waits for yet, and for futures, one thread per process does the
same; it sleeps while nothing is under way, and needs MPI_THREAD_MULTIPLE. With less thread support there is no such
thread: MPI makes progress only while somebody waits, and get_future() blocks until the operation is complete.
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

# How to wait for a request. First spin: a small message takes less time than falling asleep and waking up. Then sleep
# for an eighth of the time waited so far, within limits. Several tests follow each sleep, for on a network a collective
# takes several steps, and one test makes one step.
_SPIN_SECONDS, _MIN_SLEEP_SECONDS, _MAX_SLEEP_SECONDS = 2e-4, 5e-5, 1e-3
_TESTS_PER_SLEEP = 4
# How many Works to keep alive for C++ callers that have not waited yet. torch 2.6 keeps only the C++ half of a Work,
# which calls methods of the Python half.
_MAX_UNCLAIMED = 256
_yield_core = getattr(os, "sched_yield", lambda: None)  # not on Windows


class MPIWork(dist.Work):
    """An operation under way.

    Args:
        label: operation, dtype and backend, for messages.
        requests: its MPI requests.
        results: the tensors that the operation writes, for result() and get_future().
        finish: called once MPI is done; copies results from MPI's buffers to the tensors.
        keep: objects to keep alive until then. mpi4py does so only for some operations' buffers.
        seconds: the timeout.
        background: whether to make progress while nobody waits.
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
        self._unresolved_future: torch.futures.Future[Any] | None = None
        self._status = MPI.Status()
        if background:
            _progress.unclaimed[id(self)] = self
            if len(_progress.unclaimed) > _MAX_UNCLAIMED:
                _progress.unclaimed.popitem(last=False)
            _progress.watch(self)

    def advance(self) -> bool:
        """Tests the requests once, unless another thread is doing so. Returns whether the operation is over."""
        if self._done or not self._lock.acquire(blocking=False):
            return self._done
        try:
            if not self._done:
                self._done = self._test()
        finally:
            self._lock.release()
        if self._done:
            self._resolve_future()
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
            self._error = operation_error(self.label, error)
        if self._requests:  # after an error, MPI may still write for the others of them
            _progress.abandoned.append(self)
        else:
            self._keep, self._finish = [], None
        return True

    def fail(self, reason: str) -> None:
        """Ends the operation with an error, for those who wait. MPI may go on with it, so its memory is kept."""
        with self._lock:
            if self._done:
                return
            self._error = RuntimeError(f"{self.label}: {reason}")
            _progress.abandoned.append(self)
            self._done = True
        self._resolve_future()

    def _resolve_future(self) -> None:
        with self._lock:  # one thread takes the future, and resolves it without the lock, for it runs callbacks
            future, self._unresolved_future = self._unresolved_future, None
        if future is not None and self._error is not None:
            future.set_exception(self._error)
        elif future is not None:
            future.set_result(self._results)

    @property
    def is_over(self) -> bool:
        """Whether the operation was over at the last test."""
        return self._done

    def fail_if_late(self) -> bool:
        """Fails the operation if its timeout has passed, and returns whether it has."""
        if time.monotonic() <= self._deadline:
            return False
        self.fail(_timed_out(self._seconds))
        return True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits until the operation is complete and its results are in the tensors. Returns True.

        Args:
            timeout: 0 for the group's.

        Raises:
            RuntimeError: MPI reported an error, or the timeout has passed.
        """
        own = timeout.total_seconds()
        deadline = time.monotonic() + own if own > 0 else self._deadline
        self._deadline = max(self._deadline, deadline)
        start, tests = time.monotonic(), 0
        while not self.advance():
            waited = time.monotonic() - start
            tests += 1
            if waited < _SPIN_SECONDS:
                _yield_core()  # to a late rank on the same core
            elif tests % _TESTS_PER_SLEEP == 0:
                if start + waited > deadline:
                    self.fail(_timed_out(own if own > 0 else self._seconds))
                time.sleep(min(max(waited / 8, _MIN_SLEEP_SECONDS), _MAX_SLEEP_SECONDS))
        _progress.unclaimed.pop(id(self), None)
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Returns a future of the list of results. Its callbacks may run in the progress thread."""
        if not _progress.is_supported or threading.current_thread() is _progress.thread:
            self._wait_quietly()  # no other thread would complete it
        with self._lock:
            if self._future is None:
                # DistributedDataParallel, in C++, takes an exception set on a future for its value, that is tensors.
                # An exception raised by a callback (here value(), which raises it again) is an error in C++ as well.
                self._unresolved_future = torch.futures.Future()
                self._future = self._unresolved_future.then(torch.futures.Future.value)
            future = self._future
        if self._done:
            self._resolve_future()
        else:
            _progress.watch(self)
        _progress.unclaimed.pop(id(self), None)
        return future

    def _wait_quietly(self) -> None:
        try:
            self.wait()
        except Exception as error:
            if error is not self._error:  # that one goes to the future
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
        """Returns the rank, in the group, of the sender of a received message."""
        return int(self._status.Get_source())

    _source_rank = source_rank  # torch.distributed.recv calls it so


class _Progress:
    """The progress thread, and the Works that must stay alive.

    Attributes:
        is_supported: whether MPI's thread support allows the thread.
        thread: None before its first use.
        unclaimed: Works that nobody has waited for yet, by id.
        abandoned: failed Works whose buffers MPI may still use.
    """

    def __init__(self) -> None:
        self.is_supported: bool = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.thread: threading.Thread | None = None
        self.unclaimed: collections.OrderedDict[int, MPIWork] = collections.OrderedDict()
        self.abandoned: list[MPIWork] = []
        self._watched: collections.deque[MPIWork] = collections.deque()
        self._work_available = threading.Event()
        self._start_lock = threading.Lock()
        self._stopped = False

    def watch(self, work: MPIWork) -> None:
        """Makes progress on work until it is over."""
        if not self.is_supported or self._stopped:
            return
        self._watched.append(work)
        if not self._work_available.is_set():
            with self._start_lock:
                if self.thread is None:
                    self.thread = threading.Thread(target=self._run, name="syncbn-mpi-progress", daemon=True)
                    self.thread.start()
            self._work_available.set()

    def stop(self) -> None:
        """Ends the thread: it must not call MPI during or after MPI_Finalize."""
        self._stopped = True
        self._work_available.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=5)

    def _run(self) -> None:
        pause = _MIN_SLEEP_SECONDS
        while not self._stopped:
            if not self._watched:
                self._work_available.clear()
                if not self._watched:  # nothing came before clear()
                    self._work_available.wait()
                pause = _MIN_SLEEP_SECONDS
            time.sleep(pause)
            before = len(self._watched)
            for _ in range(before):
                work = self._watched.popleft()
                if not (work.advance() or work.fail_if_late()):
                    self._watched.append(work)
                del work
            pause = _MIN_SLEEP_SECONDS if len(self._watched) < before else min(2 * pause, _MAX_SLEEP_SECONDS)


def operation_error(label: str, error: Exception) -> Exception:
    """Returns the error to raise for an MPI error of the operation `label`; other errors as they are."""
    if not isinstance(error, MPI.Exception):
        return error
    hint = "see whether every rank of the group called it with tensors of the same sizes and dtypes"
    if error.Get_error_class() == MPI.ERR_TRUNCATE:
        hint = "a message was longer than the tensor for it: give every rank tensors of the sizes that the others send"
    elif error.Get_error_class() in (MPI.ERR_ROOT, MPI.ERR_RANK):
        hint = "it was given a rank that is not in the group"
    reason = " ".join(error.Get_error_string().split())  # several lines in MPICH
    return RuntimeError(f"{label}: expected MPI to succeed; got {reason}: {hint}")


def _timed_out(seconds: float) -> str:
    return (
        f"Timed out after {seconds:g} s: expected every rank to take part; not all have: see whether one has failed, "
        "or calls other operations, or give init_process_group a longer timeout"
    )


_progress = _Progress()
atexit.register(_progress.stop)
