"""The torch.distributed backend "mpi4py", for torch from PyPI. `import syncbn.mpi` registers it.

    import torch.distributed as dist
    import syncbn.mpi

    dist.init_process_group("mpi4py")    # under mpirun, mpiexec or srun; rank and size are MPI's

Then torch.distributed, with DistributedDataParallel and new_group, sends over MPI, and syncbn's layers call MPI
directly. Start with `mpirun -n 4 python -m mpi4py train.py`, so that one rank's error ends all ranks.
`syncbn.init_process_group()` does all of this where MPI started the ranks; elsewhere it chooses another backend.

| module     | what it does                                                   |
|------------|----------------------------------------------------------------|
| backend    | process groups, their store, and the registration              |
| operations | the operations of torch.distributed.ProcessGroup, as MPI calls |
| tensors    | tensors as MPI buffers                                         |
| work       | operations under way, and the progress thread                  |
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
