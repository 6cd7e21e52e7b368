"""syncbn.even over MPI, without torch.distributed."""

import pytest
from mpi4py import MPI
from support.ranks import run_ranks
from support.tolerances import TRAINING
from support.uneven import furthest, train

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)


def test_ranks_equal_one_process():
    lengths = [0, 2, 1, 2][:SIZE]
    assert furthest(run_ranks(train, SIZE, "mpi", lengths), lengths) < TRAINING
