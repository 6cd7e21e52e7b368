"""Tests on the ranks of mpirun, which ../test_mpi_backend.py starts: all in one process group of the backend."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def process_group(request):
    import syncbn.mpi  # noqa: F401 - registers the backend, and starts MPI

    dist.init_process_group("mpi4py", timeout=timedelta(seconds=60))
    yield
    if not request.session.testsfailed:  # else other ranks may not come to free their communicators
        dist.destroy_process_group()
        assert not dist.is_initialized()


@pytest.fixture(autouse=True)
def seed(process_group):
    torch.manual_seed(dist.get_rank())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lets a test pass only when it has passed on all ranks; a rank that fails ends the run instead."""
    result = yield
    dist.barrier()
    return result
