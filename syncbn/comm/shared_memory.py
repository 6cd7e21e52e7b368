"""Communication between processes of one machine through shared memory.

A small sum takes microseconds. Over Gloo it takes half a millisecond or more, for each message goes through a socket to
a thread that has to wake up first.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from .. import native
from ..environment import rank_prefix
from .agreement import difference
from .labels import Label
from .stalls import log, stall_seconds
from .structures import SharedSum, Tag

HANDSHAKE_BYTES = 64  # length of each message that join exchanges
_FOLDER = Path("/dev/shm")  # files in memory, on Linux; containers must share it for their ranks to share memory
_POLL_MICROSECONDS = 100_000  # how often a waiting rank checks that the others are alive


def _load() -> Any:
    """Returns the compiled library, or None where there is none."""
    library = native.load("comm._shared_memory")
    if library is not None:
        number, pointer = ctypes.c_long, ctypes.c_void_p
        library.syncbn_shared_bytes.argtypes = [number]
        library.syncbn_shared_said.argtypes = [pointer, number, number, number, pointer]
        for name in ("lock", "unlock", "is_locked"):
            getattr(library, f"syncbn_shared_{name}").argtypes = [ctypes.c_int, number]
        library.syncbn_shared_sum.argtypes = [pointer, pointer, number]
        library.syncbn_shared_bytes.restype = library.syncbn_shared_sum.restype = number
    return library


_library = _load()


def absence() -> str:
    """Returns why processes cannot share memory here, or ""."""
    if _library is None:
        return native.absence() if sys.platform == "linux" else "only on Linux"
    return "" if os.access(_FOLDER, os.W_OK) else f"{_FOLDER} is not there, or not to be written to"


class _Message(ctypes.Structure):
    """What a rank has sent: csrc/shared_memory.cpp's Message."""

    _fields_ = (("length", ctypes.c_long), ("call", ctypes.c_long), ("tag", Tag))

    def __str__(self) -> str:
        if self.length < 0:
            return "nothing"
        return ", ".join(filter(None, (self.whose(), f"{self.length} float64")))

    def in_full(self) -> str:
        """Returns the same with what the layer was told."""
        return ", ".join(filter(None, (str(self), self.tag.facts.decode(errors="replace"))))

    def whose(self) -> str:
        """Returns the layer, direction and call, or "" where nobody said."""
        tag = self.tag.text.decode(errors="replace")
        return f"{tag}, call {self.call}" if tag and self.call >= 0 else tag


class SharedMemory:
    """Ranks on one machine. Made by join.

    Args:
        file: descriptor of the memory's file, which this object closes. Each rank holds a lock on byte `rank` of it
            for as long as it takes part.
        rank, world_size: this process's rank and the number of ranks.
        timeout: how long a sum may wait for other ranks.
    """

    _file = -1  # not open
    membership: Any = None  # kept for it

    def __init__(self, file: int, rank: int, world_size: int, timeout: timedelta) -> None:
        if _library.syncbn_shared_lock(file, rank):
            raise OSError("the system has no locks of open files")
        self.rank, self.world_size = rank, world_size
        self._timeout, self._stall_seconds = timeout, stall_seconds()
        self._memory = mmap.mmap(file, 0)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        of = ctypes.cast(_library.syncbn_shared_sum, ctypes.c_void_p)
        self._part = SharedSum(of, self._address, rank, world_size, _POLL_MICROSECONDS)
        self._part_address = ctypes.addressof(self._part)
        self._failure: str | None = None
        # One thread at a time; a signal's handler that sums within a sum of its thread is told so, by _failure.
        self._lock = threading.RLock()
        self._file = file
        _live.add(self)

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # releases the lock once mmap's duplicate is closed, too
            self._memory.close()
        self._file = -1

    def leave(self) -> None:
        """Takes part no more, for the group is destroyed: the others, who would wait, are told. Not within a sum."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._failure and self._file >= 0:
                    self._failure = "one that was destroyed"
                    _library.syncbn_shared_unlock(self._file, self.rank)
            finally:
                self._lock.release()

    def all_reduce(self, address: int, length: int, label: Label | None = None) -> None:
        """Sums a vector over the ranks, in place, in rank order, so that all ranks get the same bits.

        Args:
            address: of contiguous float64.
            length: number of elements, the same on every rank.
            label: which layer's message this is, or None.

        Collective:
            every rank must call, in the same order.

        Raises:
            RuntimeError: a rank has ended, or has not come within the timeout; no further sum is possible then. Or the
                ranks' lengths, layers or directions differ, which every rank reports. Or this process is a fork of the
                one that joined.
        """
        with self.direct(label, -1 if label is None else label.call):
            self._sum(address, length, self._try(address, length))

    @contextmanager
    def direct(self, label: Label | None, call: int) -> Iterator[int]:
        """Within it one sum can be made, by an operator in C++ that is given the address that this yields.

        Args:
            label: which layer's message this is, or None.
            call: which call of that layer.

        If the operator says that the ranks have not all come, go_on must follow. Raises as all_reduce.
        """
        if self._file < 0:
            raise self._error(
                "the process that joined the group to use it",
                "a fork of it, which would answer in its place",
                "start processes by spawn or forkserver, and let each join a group of its own",
            )
        with self._lock:
            if self._failure:
                raise self._error("a group whose ranks are all there", self._failure, "start all ranks again")
            # Cleared by _sum at its end: an interrupt may break off anywhere before.
            self._failure = "one in which this rank's last sum was broken off, or is under way in this very thread"
            part = self._part
            part.tag, part.call = None if label is None else label.address or label.tag(), call
            try:
                yield self._part_address
                self._failure = None
            finally:
                if self._failure:
                    _library.syncbn_shared_unlock(self._file, self.rank)  # tells the others not to wait

    def go_on(self, buffer: Any, label: Label | None) -> None:  # noqa: ARG002  # it is that of direct
        """Goes on with a sum that an operator has begun, of a tensor. Raises as all_reduce."""
        self._sum(buffer.data_ptr(), buffer.numel(), self._missing(self._part.result))

    def _sum(self, address: int, length: int, missing: int | None) -> None:
        """Waits for the ranks, `missing` first, and sums; sets _failure to None where further sums are possible."""
        start, reports_at = time.monotonic(), self._stall_seconds
        while missing is not None:
            # Checked before the last try: a rank may have sent its part and left since.
            is_there = _library.syncbn_shared_is_locked(self._file, missing)
            waited = time.monotonic() - start
            is_late = waited > self._timeout.total_seconds()
            if waited > reports_at:
                reports_at = math.inf
                log.warning("%s", self._stalled(waited))
            last = missing
            self._part.microseconds = _POLL_MICROSECONDS if is_there and not is_late else 0
            missing = self._try(address, length)
            self._part.microseconds = _POLL_MICROSECONDS
            if missing != last:
                continue
            if not is_there:
                self._failure = f"one that rank {missing} has left"
                raise self._error(
                    f"rank {missing} to take part in {self._what(length)}",
                    f"its leaving: it has ended, destroyed the process group, or given up, {self._last(missing)}",
                    f"see what rank {missing} says; every rank must run the same layers equally often",
                )
            if is_late:
                self._failure = f"one in which this rank has given up waiting for rank {missing}"
                raise self._error(
                    f"rank {missing} to take part in {self._what(length)} within {self._timeout}",
                    f"nothing from it, which has not left the group, {self._last(missing)}",
                    "see that every rank runs the same layers in the same order, forward and backward, or, if it was "
                    "only slow, give init_process_group a longer timeout",
                )
        self._failure = None

    def _try(self, address: int, length: int) -> int | None:
        """Returns None once the sum is done, or, after that time, a rank that has not come yet; then call again."""
        missing: int = _library.syncbn_shared_sum(self._part_address, address, length)
        return self._missing(missing)

    def _missing(self, result: int) -> int | None:
        """Returns what _try returns, of the library's result."""
        if result == -2:
            raise self._difference()
        return None if result == -1 else result

    def _difference(self) -> RuntimeError:
        """Returns the error of messages that do not belong together, from those that are there."""
        self._failure = None
        said = [self._said(rank) for rank in range(self.world_size)]
        return difference(
            rank_prefix(self.rank, self.world_size),
            [message.in_full() if is_there else "nothing yet" for is_there, message in said],
        )

    def _said(self, rank: int) -> tuple[bool, _Message]:
        """Returns whether a rank has sent what belongs to this one's last message, and that, or what it last sent."""
        message = _Message()
        address = ctypes.addressof(message)
        there = _library.syncbn_shared_said(self._address, self.rank, self.world_size, rank, address)
        return bool(there), message

    def _what(self, length: int) -> str:
        return ", ".join(filter(None, (f"a sum of {length} float64", self._said(self.rank)[1].whose())))

    def _last(self, rank: int) -> str:
        return f"whose last message was {self._said(rank)[1]}"

    def _stalled(self, waited: float) -> str:
        """Returns what a rank that waits for long says of the others."""
        said = [(rank, *self._said(rank)) for rank in range(self.world_size)]
        missing = [f"rank {rank} (last {message})" for rank, is_there, message in said if not is_there]
        return (
            f"{rank_prefix(self.rank, self.world_size)}has waited {waited:.0f} s in a sum, {said[self.rank][2]}, for "
            f"{', '.join(missing) or 'ranks that have just come'}; it gives up after {self._timeout}"
        )

    def _error(self, expected: str, got: str, remedy: str) -> RuntimeError:
        prefix = rank_prefix(self.rank, self.world_size)
        return RuntimeError(f"{prefix}expected {expected}; got {got}: {remedy}")


_live: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


def _close_all() -> None:
    """Closes the memory in a forked child, which must not take its parent's part nor keep its locks."""
    for memory in list(_live):
        memory._close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_all)


def join(
    rank: int, world_size: int, timeout: timedelta, exchange: Callable[[bytes], list[bytes]]
) -> SharedMemory | None:
    """Returns memory that all ranks share, or None on every rank if one of them cannot share it.

    Args:
        rank, world_size: this process's rank in the group and the number of ranks.
        timeout: how long a sum may wait for other ranks.
        exchange: all_gather of HANDSHAKE_BYTES bytes; returns all ranks' bytes in rank order.

    Collective:
        three calls of exchange.
    """
    shared = name = None
    exchange(bytes(HANDSHAKE_BYTES))  # barrier: all ranks are here, so the file exists only briefly
    if rank == 0 and _library is not None:
        name = _create_file(_library.syncbn_shared_bytes(world_size))
    try:
        name = exchange((name or "").encode().ljust(HANDSHAKE_BYTES))[0].decode().strip()
        if name and _library is not None:
            with suppress(OSError):  # another machine, container or user
                file = os.open(_FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
                try:
                    shared = SharedMemory(file, rank, world_size, timeout)
                except BaseException:
                    os.close(file)
                    raise
        answers = exchange(str(shared is not None).encode().ljust(HANDSHAKE_BYTES))
    finally:
        if rank == 0 and name:
            (_FOLDER / name).unlink(missing_ok=True)
    return shared if all(answer.strip() == b"True" for answer in answers) else None


def _create_file(size: int) -> str | None:
    """Creates a file in memory of `size` bytes. Returns its name, or None if that failed."""
    name = f"syncbn-{uuid.uuid4()}"
    try:
        file = os.open(_FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)  # reserves it: running out later would kill the process
    except BaseException as error:
        (_FOLDER / name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        return None
    finally:
        os.close(file)
    return name
