"""Communication over MPI, through mpi4py."""

from __future__ import annotations

import os
import threading
from typing import Any

from mpi4py import MPI

from .local import LocalCommunicator

# What launchers tell each process of a job of several about their number.
_JOB_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class MPICommunicator:
    """The ranks of an MPI communicator.

    Args:
        comm: an mpi4py intracommunicator that this process is in.

    Attributes:
        rank, world_size: this process's number in it, and how many there are.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.world_size: int = comm.Get_size()

    def all_reduce(self, buffer: Any) -> None:
        """Sums buffer, a tensor or an ndarray, over the ranks, in place in its own memory. See Communicator.

        A tensor of an accelerator goes through a buffer on the host.

        Raises:
            RuntimeError: called from another thread than the one that initialised MPI, of an MPI that does not allow
                it. Backward of accelerator tensors runs in such threads.
        """
        if _THREAD_LEVEL < MPI.THREAD_SERIALIZED and threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "expected MPI with thread support of at least MPI_THREAD_SERIALIZED, for autograd calls it from a "
                f"thread of its own; got {_LEVEL_NAMES[_THREAD_LEVEL]}: set mpi4py.rc.thread_level = 'multiple' before "
                "the first import of mpi4py.MPI, or use an MPI built with thread support"
            )
        numpy = getattr(buffer, "numpy", None)
        if numpy is None:
            self.comm.Allreduce(MPI.IN_PLACE, buffer)
        elif buffer.is_cpu:
            self.comm.Allreduce(MPI.IN_PLACE, numpy())
        else:
            host = buffer.cpu()  # waits for the kernels that fill buffer
            self.comm.Allreduce(MPI.IN_PLACE, host.numpy())
            buffer.copy_(host)


def communicator_of(group: Any) -> MPICommunicator | LocalCommunicator | None:
    """Returns the communicator of an mpi4py communicator, and None for anything else. See as_communicator."""
    if not isinstance(group, MPI.Comm):
        return None
    if group == MPI.COMM_NULL:
        raise ValueError(
            "expected an MPI communicator that this process is in; got MPI.COMM_NULL: give every rank the communicator "
            "that it belongs to"
        )
    if group.Is_inter():
        raise ValueError("expected an MPI intracommunicator; got an intercommunicator: merge it with its Merge method")
    if group == MPI.COMM_WORLD:
        _check_job_size(group.Get_size())
    return MPICommunicator(group) if group.Get_size() > 1 else LocalCommunicator()


def _check_job_size(size: int) -> None:
    """Refuses the world of an MPI library that does not know the launcher, which starts so many worlds of one."""
    for name in _JOB_SIZES:
        if size == 1 and os.environ.get(name, "1") not in ("", "1"):
            raise RuntimeError(
                f"expected MPI.COMM_WORLD of {os.environ[name]} processes, for the launcher set {name}; got 1: mpirun "
                f"and mpi4py's MPI library, {MPI.Get_library_version().split(',')[0]}, are not of one installation; "
                "use the mpirun beside that library"
            )


_THREAD_LEVEL: int = MPI.Query_thread()
_LEVEL_NAMES = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}
