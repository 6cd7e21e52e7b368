"""Noisy layers over MPI."""

import pytest
from mpi4py import MPI
from support.noisy import STEPS, assert_noisy_control, assert_noisy_parity

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("step", STEPS)
def test_ranks_equal_one_process_on_the_whole_batch(step):
    assert_noisy_parity("mpi", [1 + 2 * rank for rank in range(SIZE)], step)
    assert_noisy_parity("mpi", [0 if rank == 1 else 3 for rank in range(SIZE)], step)


def test_ranks_with_noise_of_their_own_differ():
    assert_noisy_control("mpi", SIZE)
