"""The processes of a benchmark: one, without a process group, or several on this host over Gloo."""

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
    """The ranks that run a benchmark together; a world of one where torch.distributed is not initialised."""

    def __init__(self) -> None:
        self.grouped = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.grouped else (0, 1)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.grouped:
            dist.barrier()

    def sum(self, v: Tensor) -> Tensor:
        """Returns the sum of v over ranks."""
        return self._reduced(v, dist.ReduceOp.SUM)

    def slowest(self, times: list[float]) -> list[float]:
        """Returns, for each time, the largest over ranks."""
        reduced: list[float] = self._reduced(torch.tensor(times, dtype=torch.float64), dist.ReduceOp.MAX).tolist()
        return reduced

    def _reduced(self, v: Tensor, operation: Any) -> Tensor:
        v = v.clone()
        if self.grouped:
            dist.all_reduce(v, operation)
        return v


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
        program(World(), arguments)
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
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    program(World(), arguments)
    dist.destroy_process_group()
