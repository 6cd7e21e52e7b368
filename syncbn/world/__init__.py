"""Rank, world size and device under torchrun, mpirun, mpiexec, srun and others, and the process group of all ranks.

| module      | what it does                                             |
|-------------|----------------------------------------------------------|
| rendezvous  | lets ranks find each other; names those that are missing |
| group       | chooses device and backend; makes the process group      |

Only `init_process_group` loads torch and mpi4py.
"""

from __future__ import annotations

from ..environment import Launch as Launch
from ..environment import LaunchError as LaunchError
from ..environment import read_environment as read_environment
from .group import World as World
from .group import init_process_group as init_process_group
