"""MPI_Allreduce of float64 whose messages say whose they are: in C++, or in Python where that was not compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from .. import native
from .asking import MPIAsking
from .labels import Label
from .stalls import Watched, stop
from .structures import Lengths, MPISum, Tag

DONE, DIFFERENT, FAILED, UNSENT = -1, -2, -3, -4  # see csrc/mpi_sum.cpp
_ROOM, _BITS = 8192, 20  # as there


def _load() -> Any:
    library = native.load("comm._mpi_sum")
    if library is not None:
        library.syncbn_mpi_sum.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
        library.syncbn_mpi_sum.restype = ctypes.c_long
    return library


_library = _load()


def _handle(mpi_object: Any) -> int:
    handle: int = MPI._handleof(mpi_object)
    return handle


class _Kept:
    """What is kept for a communicator, for all objects here that send over it.

    Attributes:
        lengths: of messages, that its ranks have compared.
        watched: its sums; None before the first.
        asking: how its ranks ask each other where they are; None before the first sum, and where threads cannot.
    """

    def __init__(self) -> None:
        self.lengths = Lengths()
        self.watched: Watched | None = None
        self.asking: MPIAsking | None = None


_keys: list[int] = []  # the one under which that is an attribute of communicators


def _kept(comm: Any) -> _Kept:
    if not _keys:
        _keys.append(MPI.Comm.Create_keyval(delete_fn=_forget))
        # Of this communicator attributes are deleted first when MPI is finalised, which the thread must not see.
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=lambda *_: stop()), True)
    kept: _Kept | None = comm.Get_attr(_keys[0])
    if kept is None:
        kept = _Kept()
        comm.Set_attr(_keys[0], kept)
    return kept


def _forget(comm: Any, _: int, kept: _Kept) -> None:
    """Called when a communicator is freed, by all its ranks; at the end of MPI all are gone anyway."""
    if kept.asking is not None and comm != MPI.COMM_WORLD:
        kept.asking.close()


def watched_of(comm: Any, timeout_seconds: float, end: Callable[[str], None]) -> Watched:
    """Returns the sums of a communicator, for all objects that send over it.

    Args:
        comm: an mpi4py communicator.
        timeout_seconds, end: see Watched; those of the first call serve.

    Collective:
        at the first call for a communicator, which it duplicates, but for MPI without MPI_THREAD_MULTIPLE.
    """
    kept = _kept(comm)
    if kept.watched is None:
        rank, world_size, over = comm.Get_rank(), comm.Get_size(), "MPI"
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            starting = Watched(rank, world_size, over, timeout_seconds, None, end)
            with starting.sum(None, -1):  # ranks may be late at the first already
                kept.asking = MPIAsking(MPI, comm.Dup())
        kept.watched = Watched(rank, world_size, over, timeout_seconds, kept.asking, end)
    return kept.watched


class Allreduce:
    """Sums over one communicator.

    Args:
        comm: an mpi4py communicator.
        rank, world_size: this process's rank in it and its number of ranks.

    Attributes:
        address: of the structure for operators in C++, or 0 where there is no C++.
        part: that structure.
    """

    def __init__(self, comm: Any, rank: int, world_size: int) -> None:
        self._comm = comm
        self.part = MPISum(rank=rank, world_size=world_size)
        self._kept = _kept(comm)
        self.part.lengths = ctypes.pointer(self._kept.lengths)
        self.address = 0
        if _library is not None:
            self.part.sum = ctypes.cast(_library.syncbn_mpi_sum, ctypes.c_void_p).value
            mpi = ctypes.CDLL(MPI.__file__)  # mpi4py's extension module, linked with the library
            self.part.allreduce = ctypes.cast(mpi.MPI_Allreduce, ctypes.c_void_p).value
            self.part.are_ints = MPI._sizeof(MPI.Comm) == ctypes.sizeof(ctypes.c_int)
            self.part.type, self.part.op = _handle(MPI.DOUBLE), _handle(MPI.SUM)
            self.address = ctypes.addressof(self.part)

    def prepare(self, label: Label | None) -> None:
        """Makes the next sum one of a label's message."""
        self.part.tag = None if label is None else label.address or label.tag()
        self.part.comm = MPI._handleof(self._comm)  # that of no communicator once it was freed

    def sum(self, address: int, length: int) -> int:
        """Sums a vector in place. Returns what syncbn_mpi_sum returns. See prepare."""
        if self.address:
            result: int = _library.syncbn_mpi_sum(self.address, address, length)
            return result
        return self._sum_in_python(address, length)

    def error(self) -> MPI.Exception:
        """Returns MPI's error of a sum that failed."""
        return MPI.Exception(self.part.code or MPI.ERR_COUNT)

    def _sum_in_python(self, address: int, length: int) -> int:
        lengths = self.part.lengths.contents
        if length not in lengths.known[: lengths.count]:
            if (result := self._have_equal(_number_of(None, length), 0, 0)) != DONE:
                return UNSENT if result == DIFFERENT else result
            if lengths.count < len(lengths.known):
                lengths.known[lengths.count] = length
                lengths.count += 1
        return self._have_equal(_number_of(self.part.tag, length), address, length)

    def _have_equal(self, t: float, address: int, length: int) -> int:
        sent, received = ((ctypes.c_double * (length + 2 + _ROOM))() for _ in range(2))
        sent[0], sent[1] = t, t * t
        ctypes.memmove(ctypes.addressof(sent) + 16, address, 8 * length)
        self.part.code = 0
        try:
            self._comm.Allreduce([sent, length + 2, MPI.DOUBLE], [received, length + 2, MPI.DOUBLE])
        except MPI.Exception as error:
            self.part.code = error.Get_error_code()
            return FAILED
        ctypes.memmove(address, ctypes.addressof(received) + 16, 8 * length)
        totals = received[0], received[1]
        is_exact = all(total < 2**53 for total in totals)
        return DONE if is_exact and self.part.world_size * int(totals[1]) == int(totals[0]) ** 2 else DIFFERENT


def _number_of(tag: int | None, length: int) -> float:
    number = Tag.from_address(tag).number if tag else 0
    return float((number ^ length) * 0x9E3779B97F4A7C15 % 2**64 >> 64 - _BITS)
