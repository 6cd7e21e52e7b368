"""The processes of a benchmark: one, without a process group; several on this host over Gloo; or those of mpirun."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes


class World:
    """The ranks that run a benchmark together.

    Args:
        comm: an mpi4py communicator; None for torch.distributed, or a world of one where that is not initialised.
        device: what this rank measures on.

    Attributes:
        grouped: whether there is a process group of either kind.
        rank, size: this process's number, and how many there are.
        process_group: what layers that synchronise take, None for torch.distributed.
        transport: what messages go over: an MPI library, gloo, or None in a world of one.
    """

    def __init__(self, comm: Any = None, device: torch.device | None = None) -> None:
        self.process_group, self.device = comm, device or torch.device("cpu")
        joined = dist.is_available() and dist.is_initialized()
        self.grouped = joined or comm is not None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.transport: str | None = dist.get_backend() if joined else None
        if comm is not None:
            from syncbn.comm.mpi import library

            self.rank, self.size, self.transport = comm.Get_rank(), comm.Get_size(), library()

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.process_group is not None:
            self.process_group.Barrier()
        elif self.grouped:
            dist.barrier()

    def sum(self, v: Tensor) -> Tensor:
        """Returns the sum of v over ranks."""
        return self._reduced(v, "SUM")

    def slowest(self, times: list[float]) -> list[float]:
        """Returns, for each time, the largest over ranks."""
        reduced: list[float] = self._reduced(torch.tensor(times, dtype=torch.float64), "MAX").tolist()
        return reduced

    def _reduced(self, v: Tensor, operation: str) -> Tensor:
        v, on = v.clone(), v.device
        if self.process_group is not None:
            from mpi4py import MPI

            self.process_group.Allreduce(MPI.IN_PLACE, v.numpy(), getattr(MPI, operation))
        elif self.grouped:
            v = v.to(self.device)  # NCCL takes no other
            dist.all_reduce(v, getattr(dist.ReduceOp, operation))
        return v.to(on)


def launch_over_mpi(program: Callable[[World, Any], None], arguments: Any) -> None:
    """Runs program(world, arguments) on the ranks that mpirun started, of which this is one.

    Raises:
        RuntimeError: there is one only.
    """
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() == 1:
        raise RuntimeError(
            "expected 2 or more processes of MPI's; got 1: start it with `mpirun -n 2 python -m mpi4py -m ...`"
        )
    program(World(MPI.COMM_WORLD), arguments)


def device_of(rank: int, arguments: Any) -> torch.device:
    """Returns the device that a rank of this host measures on, and makes it the current one.

    Raises:
        RuntimeError: torch sees fewer GPUs.
    """
    if getattr(arguments, "device", "cpu") == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if rank >= count:
        raise RuntimeError(
            f"expected a GPU for each rank with --device cuda, {rank + 1} or more; torch sees {count}: measure fewer "
            "ranks, or on the CPU"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def launch(program: Callable[[World, Any], None], ranks: int, arguments: Any) -> None:
    """Runs program(world, arguments): here, or on each of several new processes.

    Args:
        program: a function of a module, for new processes find it by its name.
        ranks: the number of processes; 0 to run in this one, with no process group.
        arguments: passed on; picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; it has the traceback, and the others are ended.
    """
    if not ranks:
        program(World(device=device_of(0, arguments)), arguments)
        return
    # The last is what torch imports, for seconds, in the first backward of every process that has not got it.
    preload = ["torch", "torch.distributed", "torch.fx.experimental.symbolic_shapes"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _rank,
            (program, ranks, str(Path(folder, "store")), torch.get_num_threads(), arguments),
            nprocs=ranks,
            start_method="forkserver",
        )


def _rank(
    rank: int, program: Callable[[World, Any], None], ranks: int, store: str, threads: int, arguments: Any
) -> None:
    torch.set_num_threads(threads)
    device = device_of(rank, arguments)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    program(World(device=device), arguments)
    dist.destroy_process_group()
