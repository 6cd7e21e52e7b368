"""One thread per rank in every test: ranks share the machine's cores. And what tests of several files are given."""

from pathlib import Path

import pytest
import torch
from support.implementations import IMPLEMENTATIONS

from syncbn.kernels import gpu

torch.set_num_threads(1)

ON_MPI_RANKS = [Path(__file__).parent / name for name in ("mpi", "mpi_backend")]


def pytest_ignore_collect(collection_path, config):
    """Leaves the tests on ranks of mpirun to pytest --with-mpi, which test_mpi.py and test_mpi_backend.py start."""
    on_ranks = any(collection_path.is_relative_to(folder) for folder in ON_MPI_RANKS)
    return True if on_ranks and not config.getoption("--with-mpi", default=False) else None


def pytest_configure(config):
    """Gives each MPI rank a temporary folder of its own: ranks would clear up a shared one under each other."""
    if config.getoption("--with-mpi", default=False) and config.option.basetemp:
        from mpi4py import MPI

        config.option.basetemp = f"{config.option.basetemp}{MPI.COMM_WORLD.Get_rank()}"


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.interpreted) if implementation.kernels is gpu else name
        for name, implementation in IMPLEMENTATIONS.items()
        if not implementation.error_free  # tests/kernels/gpu has tests of these sums
    ]
)
def implementation(request, monkeypatch):
    """Each implementation of the kernels, in each way in which it works."""
    return IMPLEMENTATIONS[request.param].set_up(monkeypatch, request)
