"""Tests on the ranks of mpirun, which ../test_mpi.py starts; pytest without --with-mpi does not collect them."""


def pytest_ignore_collect(collection_path, config):
    return None if config.getoption("--with-mpi", default=False) else True


def pytest_configure(config):
    """Gives each rank temporary folders of its own: ranks that share pytest's clear up what others are looking at."""
    if config.getoption("--with-mpi", default=False) and config.option.basetemp:
        from mpi4py import MPI

        config.option.basetemp = f"{config.option.basetemp}{MPI.COMM_WORLD.Get_rank()}"
