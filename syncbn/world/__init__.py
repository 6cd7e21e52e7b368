"""Who am I? Rank, world size and device under torchrun, mpirun, mpiexec, srun and others, and the group of all ranks.

| module      | what it does                                                   |
|-------------|----------------------------------------------------------------|
| rendezvous  | lets the ranks find each other, and says who is missing        |
| group       | chooses device and backend, and makes the process group        |

Torch and mpi4py are loaded when `init_process_group` is called.
"""

from __future__ import annotations

from ..environment import Launch as Launch
from ..environment import LaunchError as LaunchError
from ..environment import read_environment as read_environment
from .group import World as World
from .group import init_process_group as init_process_group
