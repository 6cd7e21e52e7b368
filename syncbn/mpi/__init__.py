"""torch.distributed over MPI, with torch from PyPI: `import syncbn.mpi` registers the backend "mpi4py".

    import torch.distributed as dist
    import syncbn.mpi

    dist.init_process_group("mpi4py")    # under mpirun, mpiexec or srun; rank and size are MPI's

Then DistributedDataParallel, new_group and the other operations of torch.distributed send over MPI, and syncbn's layers
call MPI directly. Start with `mpirun -n 4 python -m mpi4py train.py`, and one rank's error ends all of them.
`syncbn.init_process_group()` does all of this where MPI started the ranks, and the right thing elsewhere.
"""

from __future__ import annotations

try:
    from .backend import MPIProcessGroup as MPIProcessGroup
    from .backend import register
except ModuleNotFoundError as error:
    if error.name != "mpi4py":
        raise
    message = "expected mpi4py, through which syncbn.mpi sends; got no such package: pip install mpi4py"
    raise ModuleNotFoundError(message, name="mpi4py") from error

register()
