"""Runs the functions test_* of the modules beside this one on every rank, and reports each as a line of JSON.

mpirun -n 3 python -m mpi4py tests/mpi_backend/run.py [part of a name ...]

The first error ends the job: python -m mpi4py aborts all ranks.
"""

import importlib
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import syncbn.mpi  # noqa: F401 - registers the backend

HERE = Path(__file__).parent
MODULES = ("collectives", "works", "groups", "training")


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="ComplexHalf support is experimental")
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE.parent))  # for oracle and steps
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=60))
    for module in map(importlib.import_module, MODULES):
        for name, function in list(vars(module).items()):
            if name.startswith("test_") and all(part in name for part in sys.argv[1:]):
                torch.manual_seed(dist.get_rank())
                function()
                dist.barrier()  # so that "passed" says so of all ranks
                if dist.get_rank() == 0:
                    print(json.dumps({"passed": name}), flush=True)
    dist.destroy_process_group()
    if not sys.argv[1:]:
        assert not dist.is_initialized()


if __name__ == "__main__":
    main()
