"""The ranks that `syncbn check` runs on: those of torchrun, mpirun or srun, or this process alone."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ...environment import under_launcher
from ...world import World, init_process_group

_REPORT_TIMEOUT = timedelta(seconds=600)


class Ranks:
    """Joins the ranks of this launch unless torch.distributed is initialised. A with statement leaves them again.

    Args:
        timeout: of messages in group; over MPI four times as long.

    Attributes:
        rank, size: this process's rank and the number of ranks.
        group: the process_group for the layers under test.
        name: describes the ranks, for output.

    Raises:
        LaunchError: see init_process_group.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._world: World | None = None
        if under_launcher() and not dist.is_initialized():
            self._world = init_process_group(device="cpu")
        joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.group: Any = None
        self.name = "one process (ranks: torchrun ... -m syncbn check, or mpirun or srun python -m syncbn check)"
        if self.size > 1:
            self.name = f"{self.size} ranks over {dist.get_backend()}"
            # A separate group for reports: in the cases' group, ranks may still wait for one that raised.
            self._reports = dist.new_group(timeout=_REPORT_TIMEOUT)
            self.renew_group()
        if self.rank == 0 and self._world is not None:
            print(self._world, flush=True)

    def gather(self, report: Any, alone: bool) -> list[Any]:
        """Returns all ranks' reports, on every rank.

        Args:
            report: this rank's.
            alone: whether this rank raised, so that the others may be waiting for its message.

        Raises:
            TimeoutError: the others still wait, and their backend has no timeout.
        """
        if self.size == 1:
            return [report]
        arrived = dist.barrier(group=self._reports, async_op=True)
        deadline = time.monotonic() + 3 * self._timeout.total_seconds()
        while not arrived.is_completed():
            if alone and time.monotonic() > deadline:
                raise TimeoutError("the other ranks wait for this one's message, and nothing frees them")
            time.sleep(0.0005)
        arrived.wait()
        reports = [report] * self.size
        dist.all_gather_object(reports, report, group=self._reports)
        return reports

    def renew_group(self) -> None:
        """Replaces the group: after a failure, ranks may be at different messages of the old one."""
        if self.size > 1:
            # Sums over MPI end all ranks at their timeout, so gather's report must come before.
            self.group = dist.new_group(timeout=self._timeout * (4 if dist.get_backend() == "mpi4py" else 1))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world is not None:
            self._world.__exit__(kind, error, trace)
