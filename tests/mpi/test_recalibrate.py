"""syncbn.recalibrate over MPI, without torch.distributed."""

import pytest
from mpi4py import MPI
from support.population import SPLITS, recalibrated, truth
from support.ranks import run_ranks
from support.tolerances import TRAINING, UNSYNCHRONISED, difference

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_equal_one_process_on_the_concatenated_batches(split):
    expected = truth(SIZE, split)
    for got in run_ranks(recalibrated, SIZE, "mpi", split):
        assert difference(got, expected) < TRAINING


def test_statistics_of_single_ranks_differ():
    expected = truth(SIZE, "uneven")
    for got in run_ranks(recalibrated, SIZE, "mpi", "uneven", False):
        assert difference(got, expected) > UNSYNCHRONISED
