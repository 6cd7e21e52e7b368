"""The structures of csrc/shared_memory.h and csrc/mpi_sum.cpp, by which messages reach C++."""

from __future__ import annotations

import ctypes


class Tag(ctypes.Structure):
    """Whose message it is."""

    _fields_ = (("number", ctypes.c_long), ("text", ctypes.c_char * 112), ("facts", ctypes.c_char * 128))


class SharedSum(ctypes.Structure):
    """A rank's part in sums."""

    _fields_ = (
        ("sum", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("world_size", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("tag", ctypes.c_void_p),
        ("call", ctypes.c_long),
        ("done", ctypes.c_long),
        ("is_posted", ctypes.c_long),
        ("result", ctypes.c_long),
    )


class Lengths(ctypes.Structure):
    """The lengths of messages that ranks of an MPI communicator have compared."""

    _fields_ = (("count", ctypes.c_long), ("known", ctypes.c_long * 255))


class MPISum(SharedSum):
    """A rank's part in sums over MPI."""

    _fields_ = (  # type: ignore[assignment]  # those of the base come first
        ("allreduce", ctypes.c_void_p),
        ("are_ints", ctypes.c_long),
        ("type", ctypes.c_void_p),
        ("op", ctypes.c_void_p),
        ("comm", ctypes.c_void_p),
        ("lengths", ctypes.POINTER(Lengths)),
        ("code", ctypes.c_long),
    )
