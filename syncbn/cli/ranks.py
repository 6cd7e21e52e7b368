"""The ranks of a launch that `syncbn check` runs on: torchrun's over Gloo, mpirun's over MPI, or this process alone."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .launch import under_launcher, under_mpi

_REPORT_TIMEOUT = timedelta(seconds=600)


class Alone:
    """This process.

    Attributes:
        rank, size: this process's number, and how many there are.
        group: what the layers under test take as process_group.
        name: of the ranks, for people.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.group: Any = None
        self.name = "one process (ranks: torchrun ... -m syncbn check, or mpirun ... python -m mpi4py -m syncbn check)"

    def gather(self, report: Any) -> list[Any]:
        """Returns the reports of all ranks, on every rank; report.failure is what this rank raised, or "".

        Raises:
            TimeoutError: this rank raised alone, and the others wait for its message for ever.
        """
        return [report]

    def renew(self) -> None:
        """Makes another group, for a failure may have left ranks at different messages of the old one."""

    def close(self) -> None:
        """Leaves the other ranks."""

    def abort(self) -> None:
        """Ends all ranks."""
        sys.exit(1)


class TorchRanks(Alone):
    """The ranks of torch.distributed, which is initialised over Gloo where it is not.

    Args:
        timeout: of a rank's wait for a message of group's.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout, self._initialised = timeout, not dist.is_initialized()
        if self._initialised:
            dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.name = f"{self.size} ranks"
        # Reports go over a group of their own: the cases' may be held up by a rank that raised.
        self._reports = dist.new_group(timeout=_REPORT_TIMEOUT)
        self.renew()

    def gather(self, report: Any) -> list[Any]:
        reports = [report] * self.size
        dist.all_gather_object(reports, report, group=self._reports)
        return reports

    def renew(self) -> None:
        self.group = dist.new_group(timeout=self._timeout)

    def close(self) -> None:
        if self._initialised:
            dist.destroy_process_group()


class MPIRanks(Alone):
    """The ranks of MPI.COMM_WORLD.

    Args:
        timeout: how long a rank that raised waits for the others, which MPI does not free.
    """

    def __init__(self, timeout: timedelta) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise RuntimeError(
                f'expected mpi4py, for mpirun started this process; got {error}: pip install "syncbn[mpi]"'
            ) from None
        from ..comm import as_communicator
        from ..comm.mpi import library

        as_communicator(MPI.COMM_WORLD)  # raises where it is not the launcher's
        self._timeout, self._world, self._reports = timeout, MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        self.name = f"{self.size} ranks over {library()}"
        self.renew()

    def gather(self, report: Any) -> list[Any]:
        arrived, deadline = self._reports.Ibarrier(), time.monotonic() + self._timeout.total_seconds()
        while not arrived.Test():
            if report.failure and time.monotonic() > deadline:
                raise TimeoutError("the other ranks wait for this one's message, and MPI cannot free them")
            time.sleep(0.0005)
        reports: list[Any] = self._reports.allgather(report)
        return reports

    def renew(self) -> None:
        self.group = self._world.Dup()

    def abort(self) -> None:
        self._world.Abort(1)


def ranks_of_this_launch(timeout: timedelta) -> Alone:
    """Returns the ranks; see their classes for the timeout.

    Raises:
        RuntimeError: launched by mpirun, and there is no mpi4py, or its MPI does not know the launcher.
    """
    if dist.is_initialized() or under_launcher():
        return TorchRanks(timeout)
    return MPIRanks(timeout) if under_mpi() else Alone()
