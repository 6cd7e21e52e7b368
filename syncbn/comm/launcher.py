"""What launchers tell a process about the job that it is one of."""

from __future__ import annotations

import os
from typing import NamedTuple

# Kind, and the variables of rank and size, of which the first that are set count, for launchers nest: torchrun within
# srun; mpirun within an allocation, where the ranks carry Slurm's variables of the daemons that started them.
_LAUNCHERS = (
    ("torch", "RANK", "WORLD_SIZE"),
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpi", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("mpi", "PMI_RANK", "PMI_SIZE"),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


class Job(NamedTuple):
    """This process's place among those that a launcher started.

    Attributes:
        kind: "torch" (torchrun, or whoever sets its variables), "mpi" (an mpirun) or "slurm" (srun).
        rank, size: its number, and how many there are.
        rank_variable, size_variable: the environment variables that say so.
    """

    kind: str
    rank: int
    size: int
    rank_variable: str
    size_variable: str


def job() -> Job | None:
    """Returns the job that this process was launched as part of, or None where no launcher is known."""
    for kind, rank, size in _LAUNCHERS:
        values = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(value.isdecimal() for value in values):
            return Job(kind, int(values[0]), int(values[1]), rank, size)
    return None
