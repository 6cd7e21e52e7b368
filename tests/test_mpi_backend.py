"""The backend "mpi4py" of torch.distributed: runs tests/mpi_backend under mpirun, and jobs that end in errors."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from support.mpirun import mpirun, needs_mpi, passed_on_ranks, run

pytestmark = needs_mpi


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_backend_on_ranks(ranks, tmp_path):
    assert min(passed_on_ranks(ranks, Path(__file__).parent / "mpi_backend", tmp_path)) > 60


def test_an_error_on_one_rank_ends_all():
    code = (
        "import syncbn.mpi, torch, torch.distributed as dist; dist.init_process_group('mpi4py'); "
        "assert dist.get_rank() != 1, 'rank 1 has had enough'; dist.all_reduce(torch.ones(1)); print('went on')"
    )
    status, output = mpirun(2, "-m", "mpi4py", "-c", code)
    assert status != 0
    assert "rank 1 has had enough" in output
    assert "went on" not in output


def test_without_mpirun_it_is_a_world_of_one_and_an_mpirun_of_another_installation_is_an_error():
    code = (
        "import os, pytest, syncbn.mpi, syncbn.comm, torch, torch.distributed as dist\n"
        "os.environ |= {'PMI_RANK': '0', 'PMI_SIZE': '3'}\n"
        "with pytest.raises(RuntimeError, match='expected MPI.COMM_WORLD to have the rank and size'):\n"
        "    dist.init_process_group('mpi4py')\n"
        "del os.environ['PMI_RANK'], os.environ['PMI_SIZE']\n"
        "dist.init_process_group('mpi4py'); "
        "t = torch.ones(2); dist.all_reduce(t); dist.barrier(); assert t.tolist() == [1, 1]; "
        "assert type(syncbn.comm.as_communicator(None)) is syncbn.comm.LocalCommunicator; "
        "dist.destroy_process_group(); print('as one')"
    )
    status, output = run(sys.executable, "-c", code)
    assert (status, output.strip()) == (0, "as one")


def test_the_package_alone_registers_nothing():
    assert "mpi4py" not in dist.Backend.backend_list
