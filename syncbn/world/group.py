"""`init_process_group`: one process group of the ranks that any launcher started."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import socket
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..environment import MPI_LAUNCHERS, Launch, LaunchError, rank_prefix, read_environment
from .rendezvous import RankInfo, abort_mpi_at_exit, gather_rank_info, local_rank_and_size, mpi_world, open_store

if TYPE_CHECKING:
    import torch

_JOIN_TIMEOUT = timedelta(minutes=5)
_LAUNCHERS = {
    "torchrun": "torchrun",
    "openmpi": "mpirun (Open MPI)",
    "mvapich2": "mpirun (MVAPICH2)",
    "hydra": "mpiexec (MPICH or Intel MPI)",
    "slurm": "srun",
    "environment": "RANK and WORLD_SIZE",
}


class World:
    """The ranks that `init_process_group` has joined. str() describes this rank; a with statement closes the group.

    An exception that leaves the with statement, or the script, ends all ranks: torchrun and srun end the others when
    this process ends; under mpirun this process aborts MPI.

    Attributes:
        rank, world_size: this process's rank and the number of ranks.
        local_rank, local_world_size: the same among the processes of this node.
        device: the torch.device for this rank's tensors.
        backend: the torch.distributed backend.
        launcher: torchrun, openmpi, mvapich2, hydra, slurm, environment, or None without a launcher.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        local_world_size: int,
        device: torch.device,
        backend: str,
        launcher: str | None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.device, self.backend, self.launcher = device, backend, launcher
        self._group: Any = None
        self._exported: list[str] = []

    def __repr__(self) -> str:
        names = ("rank", "world_size", "local_rank", "local_world_size", "device", "backend", "launcher")
        return f"World({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __str__(self) -> str:
        if self.launcher is None:
            return (
                f"a world of one process, on {self.device}, for no launcher started it "
                "(several: torchrun --nproc-per-node 4 SCRIPT, mpirun -n 4 python SCRIPT, srun python SCRIPT)"
            )
        return (
            f"rank {self.rank} of {self.world_size}, {self.local_rank} of {self.local_world_size} on "
            f"{socket.gethostname()}, {self.device}, {self.backend}, started by {_LAUNCHERS[self.launcher]}"
        )

    def close(self) -> None:
        """Destroys the process group and unsets the variables that were set. A second call does nothing."""
        import torch.distributed as dist

        group, self._group = self._group, None
        if group is not None and dist.group.WORLD is group:
            layers = sys.modules.get("syncbn.comm.torch")
            if layers is not None:
                layers.leave_shared_memory()
            dist.destroy_process_group()
        while self._exported:
            os.environ.pop(self._exported.pop(), None)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.launcher in MPI_LAUNCHERS:
            abort_mpi_at_exit(error)
        self.close()


def init_process_group(
    backend: str | None = None, *, device: str | None = None, timeout: timedelta | None = None
) -> World:
    """Makes the ranks of this launch torch.distributed's default process group.

    The same script runs under torchrun, mpirun, mpiexec, srun and a PyTorchJob, and without a launcher as a world of
    one. See `syncbn.world.read_environment` for how the launcher is found. On a node with several GPUs, local_rank is
    the index of this rank's GPU among those that the process sees; it becomes torch.cuda's current device.

    For libraries that read them, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set
    unless they already are.

    Args:
        backend: of torch.distributed, as "gloo" or "cpu:gloo,cuda:nccl". If None: "nccl" for ranks on GPUs; else
            syncbn's "mpi4py" where MPI started the ranks and mpi4py is installed; else "gloo".
        device: "cuda" or "cpu"; if None, "cuda" where torch sees a GPU.
        timeout: a datetime.timedelta, within which all ranks must join, and each operation must then complete. Layers'
            sums over MPI end all ranks then, for they cannot be broken off. If None, 5 minutes to join, and the
            backend's default for operations.

    Collective:
        every rank must call. If ranks are missing or their settings differ, all raise.

    Raises:
        LaunchError: a contradictory environment, no address of rank 0, a port in use, ranks that do not join in time
            (the message names those that did), an unavailable backend, a process group that exists already.
        TypeError, ValueError: a backend, timeout or device that is none of the above.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if dist.is_initialized():
        raise LaunchError(
            "expected torch.distributed not to be initialised yet; got a group of "
            f"{dist.get_world_size()} ranks: call syncbn.init_process_group once, instead of torch's, or close its "
            "World before"
        )
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"expected device to be None, 'cpu' or 'cuda'; got {device!r}: the launcher says which GPU")
    if not isinstance(timeout, timedelta | None):
        raise TypeError(f"expected timeout to be None or a datetime.timedelta; got {timeout!r}: timedelta(seconds=...)")
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"expected timeout to be above 0; got {timeout.total_seconds():g} s: None for the default")
    if not isinstance(backend, str | None):
        raise TypeError(f"expected backend to be None or a name, as 'gloo'; got {backend!r}: leave it out")
    launch = read_environment()
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = _check_backend(backend, kind) if backend else _default_backend(kind, launch)
    if backend == "mpi4py" and launch is not None:
        mpi_world(launch)
    gpus = _gpu_names() if kind == "cuda" else []
    if launch is None:
        addr, port, store = None, None, HashStore()
        world = World(0, 1, 0, 1, _device(kind, 0, gpus), backend, None)
    else:
        store, addr, port = open_store(launch, timeout or _JOIN_TIMEOUT)
        info: RankInfo = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": launch.world_size,
            "backend": backend,
            "device": kind,
            "gpus": gpus,
            "local_rank": launch.local_rank,
        }
        infos = gather_rank_info(store, launch, info, timeout or _JOIN_TIMEOUT)
        local_rank, local_world_size = local_rank_and_size(infos, launch.rank)
        local_world_size = launch.local_world_size or local_world_size
        where = _device(kind, local_rank, gpus)
        world = World(launch.rank, launch.world_size, local_rank, local_world_size, where, backend, launch.launcher)
    _make_group(world, store, timeout)
    if launch is not None:
        _export(world, addr, port)
    return world


def _default_backend(kind: str, launch: Launch | None) -> str:
    """Returns the backend for ranks on this kind of device. See init_process_group for the rule."""
    import torch.distributed as dist

    if kind == "cuda" and dist.is_nccl_available():
        return "nccl"
    return "mpi4py" if launch is not None and launch.is_mpi and not _why_no_mpi_backend() else "gloo"


def _check_backend(backend: str, kind: str) -> str:
    """Returns the requested backend in torch's lower case.

    Raises:
        LaunchError: it is not available.
    """
    import torch.distributed as dist

    backend = backend.lower()
    if backend == "nccl" and kind != "cuda":
        raise LaunchError("expected a GPU for backend='nccl'; got none: leave backend out, or ask for 'gloo'")
    missing = _why_no_mpi_backend() if "mpi4py" in backend else ""
    # One for each type of device, as "cpu:gloo,cuda:nccl", or one for all.
    asked = [part.rpartition(":")[2] for part in backend.split(",")] if ":" in backend else [backend]
    if not all(map(dist.is_backend_available, asked)):
        internal = ("undefined", "fake")  # for torch's tests
        names = [n for n in dist.Backend.backend_list if n not in internal and dist.is_backend_available(n)]
        raise LaunchError(
            f"expected a backend that this process has, one of {', '.join(names)}; got {backend!r}"
            f"{missing and f', which has {missing}'}: leave backend out, or import first what registers it; "
            "that over MPI is 'mpi4py', and takes mpi4py and its MPI library"
        )
    return backend


def _why_no_mpi_backend() -> str:
    """Registers the torch.distributed backend "mpi4py". Returns "", or why that failed."""
    import torch.distributed as dist

    try:
        importlib.import_module("..mpi", __package__)
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library
        if not dist.is_backend_available("mpi4py"):
            return f"{type(error).__name__}: {error}".split("\n")[0]
    return "" if dist.is_backend_available("mpi4py") else "not been registered"


def _gpu_names() -> list[str]:
    """Returns a unique name for each GPU that this process sees: its UUID, or its index where torch has no UUID."""
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not properties:
        raise LaunchError("expected a GPU for device='cuda'; got none: see CUDA_VISIBLE_DEVICES, or ask for 'cpu'")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [str(getattr(gpu, "uuid", f"GPU {index} of {visible}")) for index, gpu in enumerate(properties)]


def _device(kind: str, local_rank: int, gpus: list[str]) -> torch.device:
    """Returns this rank's device. Launchers may show each process only its own GPU, which then has index 0."""
    import torch

    return torch.device(kind, local_rank % len(gpus)) if kind == "cuda" else torch.device(kind)


def _make_group(world: World, store: Any, timeout: timedelta | None) -> None:
    import torch
    import torch.distributed as dist

    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    try:
        dist.init_process_group(
            world.backend,
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            device_id=world.device if world.backend == "nccl" else None,
        )
    except RuntimeError as error:
        if world.world_size == 1:
            raise
        raise LaunchError(
            f"{rank_prefix(world.rank, world.world_size)}expected a {world.backend} group, for all ranks have joined; "
            f"got {str(error).splitlines()[0]}: see whether another rank says why; if none does, and "
            f"{socket.gethostname()} has several network interfaces, or its name leads to itself alone, set "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface of the others' network"
        ) from error
    world._group = dist.group.WORLD
    _let_gloo_threads_end_at_exit()


@functools.cache  # once
def _let_gloo_threads_end_at_exit() -> None:
    """Releases the GIL for a moment at exit.

    A model that refers to the group keeps Gloo's threads alive. After the last message of a backward pass such a thread
    needs the GIL to free that pass's context. If Python is already finalising, the process dies of "terminate called
    without an active exception" (pytorch issue 190489), and torchrun's other agents wait for minutes. The thread needs
    microseconds, but a main thread that only exits never yields the GIL.
    """
    atexit.register(time.sleep, 0.05)


def _export(world: World, addr: str | None, port: int | None) -> None:
    """Sets torchrun's variables that are not set yet; World.close unsets them."""
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": addr,
        "MASTER_PORT": port,
    }
    for name, value in values.items():
        if value is not None and not os.environ.get(name):
            os.environ[name] = str(value)
            world._exported.append(name)
