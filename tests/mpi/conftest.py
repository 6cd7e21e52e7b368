"""Tests on the ranks of mpirun, which ../test_mpi.py starts; pytest without --with-mpi does not collect them."""


def pytest_ignore_collect(collection_path, config):
    return None if config.getoption("--with-mpi", default=False) else True
