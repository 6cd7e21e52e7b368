"""torch.distributed over MPI, with torch from PyPI: `import syncbn.mpi` registers the backend "mpi4py".

    import torch.distributed as dist
    import syncbn.mpi

    dist.init_process_group("mpi4py", init_method="mpi://")    # under mpirun, mpiexec or srun; reads no variables

Then DistributedDataParallel, new_group and the other operations of torch.distributed send over MPI, and syncbn's layers
call MPI directly. Start with `mpirun -n 4 python -m mpi4py train.py`, and one rank's error ends all of them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .comm.mpi_backend import MPIProcessGroup as MPIProcessGroup
from .comm.mpi_backend import register
from .comm.mpi_operations import NAME


def init_process_group(timeout: timedelta | None = None, **options: Any) -> None:
    """Initialises torch.distributed on MPI.COMM_WORLD: its ranks, its size.

    Args:
        timeout: after which an operation that other ranks have not joined is an error; torch.distributed's default is
            half an hour.
        options: further arguments of torch.distributed.init_process_group.

    Collective:
        all ranks call together. One broadcast tells where rank 0 serves the store; then two communicators are made.

    Raises:
        RuntimeError: mpirun and mpi4py's MPI library are not of one installation; or rank 0 cannot be reached by TCP.
    """
    dist.init_process_group(NAME, init_method="mpi://", timeout=timeout, **options)


register()
