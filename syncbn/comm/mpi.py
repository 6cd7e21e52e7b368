"""Communication over MPI, through mpi4py."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mpi4py import MPI

from ..environment import Launch, LaunchError, rank_prefix, read_environment
from .agreement import check, said
from .labels import Label
from .local import LocalCommunicator
from .mpi_sum import DIFFERENT, FAILED, UNSENT, Allreduce, watched_of
from .own import host, is_own, parts
from .stalls import Watched
from .stalls import timeout_seconds as environment_timeout

_TIMEOUT_SECONDS = 1800.0  # torch's own
_DELIVERY_SECONDS = 1.0  # MPICH's launcher ends at an abort, and drops what ranks said that it has not read yet
_own_comms: dict[Any, Any] = {}  # as comm.torch's groups, of MPI.COMM_WORLD
_float64_dtypes: set[Any] = set()  # torch's and NumPy's float64, once seen
_THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}
# MPI extensions that return whether the library accepts pointers to GPU memory, and the version from which on they
# answer for this process. Earlier versions, and MVAPICH2, answer for the build, but support may be turned off at run
# time, as in conda-forge's Open MPI 4; MPICH 3.4 fails one of its own assertions.
_GPU_QUERIES = {
    "cuda": ("MPIX_Query_cuda_support",),
    "rocm": ("MPIX_Query_rocm_support", "MPIX_Query_hip_support"),
}
_QUERY_VERSIONS = {"Open MPI": (5,), "MPICH": (4,)}


class MPICommunicator:
    """The ranks of an MPI communicator.

    Args:
        comm: an mpi4py intracommunicator that this process is in.
        timeout_seconds: how long a sum may wait for other ranks, unless SYNCBN_TIMEOUT_SECONDS says so.

    Attributes:
        rank, world_size: this process's rank in it and its number of ranks.
        timeout_seconds: how long a sum may wait.
    """

    def __init__(self, comm: Any, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self.comm = comm
        self.timeout_seconds = environment_timeout(timeout_seconds)
        self._watched: Watched | None = None  # from the first sum on
        self.rank: int = comm.Get_rank()
        self.world_size: int = comm.Get_size()
        self._allreduce = Allreduce(comm, self.rank, self.world_size)
        self._main_thread_only = MPI.Query_thread() < MPI.THREAD_SERIALIZED

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:
        """Sums buffer, a tensor or an ndarray, over the ranks, in place. See Communicator.

        A GPU-aware library (see gpu_aware) gets the address of a CUDA or ROCm tensor. The sum waits for kernels queued
        on the current stream; later kernels wait for the sum. Other libraries get a copy in pinned host memory. That
        costs little: GPU-aware libraries, too, copy messages this small to the host. Neither way has been run on a GPU.

        Each message says whose it is; where ranks say different things, all of them raise. Those in a GPU's memory say
        nothing: all ranks must have theirs there, or none.

        MPI has no timeouts: a thread logs a sum that waits for SYNCBN_STALL_SECONDS (30), and ends all ranks by
        MPI_Abort after timeout_seconds, naming layer, direction and call.

        Raises:
            TypeError: buffer is not of float64; MPI has no bfloat16, and mpi4py would sum it wrongly.
            RuntimeError: the ranks' messages are of different layers, directions, lengths or facts (see labels), which
                every rank reports. Or MPI failed, the communicator has been freed, or this thread may not call MPI:
                autograd runs backward of accelerator tensors in its own threads.
        """
        if buffer.dtype not in _float64_dtypes:
            self._check_dtype(buffer.dtype)
        is_cpu = getattr(buffer, "is_cpu", None)  # None: an ndarray
        if is_cpu and buffer.is_contiguous():
            address, length = buffer.data_ptr(), buffer.numel()
        elif is_cpu is None and buffer.flags.c_contiguous:
            address, length = buffer.ctypes.data, buffer.size
        else:
            self._sum_strided_or_on_gpu(buffer, label)
            return
        with self.direct(label, -1 if label is None else label.call):
            self._judge(self._allreduce.sum(address, length), length, label)

    def direct_sums(self) -> MPICommunicator | None:
        """Returns this object, which C++ can sum over; None where it was not compiled."""
        return self if self._allreduce.address else None

    @contextmanager
    def direct(self, label: Label | None, call: int) -> Iterator[int]:
        """Within it one sum can be made, by an operator in C++ that is given the address that this yields.

        Args:
            label: which layer's message this is, or None.
            call: which call of that layer.

        If the operator says that it has not summed, go_on must follow. Raises as all_reduce.
        """
        self._allreduce.prepare(label)
        with self._sum(label, call):
            yield self._allreduce.address

    def go_on(self, buffer: Any, label: Label | None) -> None:
        """Goes on after a sum of an operator that was none, or of different messages. Raises as all_reduce."""
        self._judge(self._allreduce.part.result, buffer.numel(), label)

    def _sum(self, label: Label | None, call: int) -> AbstractContextManager[None]:
        """Returns a context within which a sum is under way."""
        if self._main_thread_only and not MPI.Is_thread_main():
            raise self._thread_error()
        if self._watched is None:
            self._watched = watched_of(self.comm, self.timeout_seconds, self._end)
        return self._watched.sum(label, call)

    def _judge(self, result: int, length: int, label: Label | None) -> None:
        """Raises where a sum failed, or was one of messages that do not belong together; on all ranks alike."""
        if result == FAILED:
            error = self._allreduce.error()
            raise self._failure(length, error) from error
        if result in (DIFFERENT, UNSENT):
            check(said(length, label), self.rank, self.world_size, self._sums)
        if result == UNSENT:  # and yet no rank says another length
            raise self._failure(length, MPI.Exception(MPI.ERR_COUNT))

    def _sums(self, numbers: list[float]) -> list[float]:
        sums = [0.0] * len(numbers)
        received = array("d", sums)
        self.comm.Allreduce(array("d", numbers), received)
        return received.tolist()

    def _end(self, reason: str) -> None:
        """Ends all ranks. The thread that waits in MPI cannot be made to raise an error."""
        print(
            f"{reason}. That is the timeout (init_process_group's, or SYNCBN_TIMEOUT_SECONDS): all ranks end",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_DELIVERY_SECONDS)
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # for which mpirun ends the others

    def _failure(self, length: int, error: MPI.Exception) -> RuntimeError:
        if self.comm == MPI.COMM_NULL:
            return RuntimeError(
                f"{self._prefix()}expected an MPI communicator to sum over; got one that was freed: free it, or "
                "destroy its process group, after the last use of the layers that have it"
            )
        return RuntimeError(
            f"{self._prefix()}expected MPI_Allreduce of {length} float64 to succeed; got {error}: see "
            "that all ranks run the same layers in the same order, and start them with `mpirun ... python -m "
            "mpi4py ...`, so that an error on one ends all"
        )

    def _sum_strided_or_on_gpu(self, buffer: Any, label: Label | None) -> None:
        """Sums a buffer that is not contiguous host memory: a copy, or in place on a GPU."""
        if getattr(buffer, "is_cpu", True):
            dense = buffer.copy() if hasattr(buffer, "copy") else buffer.contiguous()
            self.all_reduce(dense, label)
            buffer[...] = dense
            return
        if buffer.is_cuda and buffer.is_contiguous():
            import torch  # the buffer's library

            if ("rocm" if torch.version.hip else "cuda") in gpu_aware():
                with torch.cuda.device(buffer.device):  # which MPI may ask for
                    torch.cuda.current_stream().synchronize()  # MPI does not wait for kernels
                    self._sum_on_gpu(buffer, label)
                return
        host = buffer.new_empty(buffer.shape, device="cpu", pin_memory=buffer.is_cuda)
        host.copy_(buffer)  # waits for the kernels that fill buffer
        self.all_reduce(host, label)
        buffer.copy_(host, non_blocking=True)  # torch reuses pinned memory only after this copy

    def _sum_on_gpu(self, buffer: Any, label: Label | None) -> None:
        try:
            with self._sum(label, -1 if label is None else label.call):
                self.comm.Allreduce(
                    MPI.IN_PLACE, [MPI.buffer.fromaddress(buffer.data_ptr(), buffer.nbytes), MPI.DOUBLE]
                )
        except MPI.Exception as error:
            raise self._failure(buffer.numel(), error) from error

    def _check_dtype(self, dtype: Any) -> None:
        if str(dtype).removeprefix("torch.") != "float64":
            raise TypeError(
                f"{self._prefix()}expected a buffer of float64 to sum over MPI; got {dtype}: convert it first"
            )
        _float64_dtypes.add(dtype)

    def _thread_error(self) -> RuntimeError:
        return RuntimeError(
            f"{self._prefix()}expected MPI with thread support of at least MPI_THREAD_SERIALIZED, for this is not the "
            f"thread that initialised it (autograd, say, calls from threads of its own); got {thread_level()}: set "
            "mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI, or use an MPI that supports it"
        )

    def _prefix(self) -> str:
        return rank_prefix(self.rank, self.world_size)


def communicator_of(group: Any) -> MPICommunicator | LocalCommunicator | None:
    """Returns the communicator for an mpi4py communicator, or of an MPI world of several ranks for a name or number.

    None for anything else. See as_communicator.
    """
    if is_own(group):
        is_running = MPI.Is_initialized() and not MPI.Is_finalized()
        if not is_running or MPI.COMM_WORLD.Get_size() == 1:
            return None
        group = _own_comm(group)
    if not isinstance(group, MPI.Comm):
        return None
    if group == MPI.COMM_NULL:
        raise ValueError(
            "expected an MPI communicator that this process is in; got MPI.COMM_NULL, which a communicator is once it "
            "was freed, and what ranks get that Split or Create leave out: give every rank the communicator that it "
            "belongs to, and free it after its last use"
        )
    if MPI.Is_finalized() or not MPI.Is_initialized():  # Get_size would end the process
        state = "after MPI.Finalize()" if MPI.Is_finalized() else "before MPI.Init()"
        raise RuntimeError(f"expected an MPI communicator while MPI is initialised; got one {state}: mind their order")
    if group.Is_inter():
        raise ValueError("expected an MPI intracommunicator; got an intercommunicator: merge it with its Merge method")
    if group.Get_size() > 1:
        return MPICommunicator(group)
    if group != MPI.COMM_SELF and MPI.COMM_WORLD.Get_size() == 1:
        check_world(read_environment())
    return LocalCommunicator()


def _own_comm(group: str | int) -> Any:
    """Returns the communicator of those ranks of MPI.COMM_WORLD; made at the first call, by all ranks. See own."""
    if group not in _own_comms:
        world = MPI.COMM_WORLD
        rank = world.Get_rank()
        all_ranks = parts(group, rank, world.Get_size(), lambda: world.allgather(host()))
        if all_ranks not in _own_comms:  # under another name
            color = next(i for i, ranks in enumerate(all_ranks) if rank in ranks)
            _own_comms[all_ranks] = world.Split(color, rank)
        _own_comms[group] = _own_comms[all_ranks]
    return _own_comms[group]


def check_world(launch: Launch | None) -> None:
    """Refuses an MPI library that does not match the launcher: each process would be a world of one.

    Args:
        launch: the result of read_environment; None, without a launcher, passes.

    Raises:
        LaunchError: MPI.COMM_WORLD has another rank or size than the launcher's.
    """
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    if launch is not None and (launch.rank, launch.world_size) != (rank, size):
        how = "start with the mpirun that was installed with that library (under Slurm, with srun's fitting --mpi)"
        if launch.launcher == "torchrun":
            how = "torchrun starts no MPI: start with that library's mpirun, or leave MPI out"
        raise LaunchError(
            f"{launch.prefix}expected MPI.COMM_WORLD to have the rank and size that the "
            f"launcher set in {launch.source}; got rank {rank} of {size}: the launcher and {library()}, which mpi4py "
            f"has loaded, do not belong together; {how}"
        )


@functools.cache
def gpu_aware() -> tuple[str, ...]:
    """Returns those of "cuda" and "rocm" for which the MPI library says that it accepts pointers to GPU memory.

    Sources: MPI 4.1's memory allocation kinds; a function of Open MPI from version 5 and of MPICH from version 4; for
    Cray MPICH MPICH_GPU_SUPPORT_ENABLED=1, with which it refuses to start without support. Every other library counts
    as not GPU-aware, which costs a copy; the opposite mistake would crash the process.

    MPI must be initialised. Not collective.
    """
    info = MPI.COMM_WORLD.Get_info()
    kinds = (kind.split(":") for kind in (info.get("mpi_memory_alloc_kinds") or "").split(","))
    reported = {name for name, *only in kinds if not only or "device" in only}
    info.Free()
    vendor, version = MPI.get_vendor()
    if vendor in _QUERY_VERSIONS and version >= _QUERY_VERSIONS[vendor]:
        loaded = ctypes.CDLL(MPI.__file__)  # mpi4py's extension module, linked with the library
        for gpu, names in _GPU_QUERIES.items():
            queries = (getattr(loaded, name, None) for name in names)
            reported |= {gpu for query in queries if query and query()}
    if "CRAY MPICH" in MPI.Get_library_version() and os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":
        reported |= _GPU_QUERIES.keys()
    return tuple(gpu for gpu in _GPU_QUERIES if gpu in reported)


def library() -> str:
    """Returns the MPI library that mpi4py has loaded, as "Open MPI 5.0.11". MPI need not be initialised."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def thread_level() -> str:
    """Returns MPI's thread support, as "MPI_THREAD_MULTIPLE". MPI must be initialised."""
    return _THREAD_LEVELS[MPI.Query_thread()]
