"""The launcher of the other tests: every way in which a rank can end."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import RankFailedError, rank_errors, run_ranks
from syncbn.comm import as_communicator

LAUNCHERS = ["thread", "gloo"]


def _sum_of_ranks(rank, group):
    buffer = torch.tensor([1.0, rank], dtype=torch.float64)
    as_communicator(group).all_reduce(buffer)
    return buffer.tolist()


def _raise_on_rank_1(rank, group):
    if rank == 1:
        raise KeyError("mine")
    return _sum_of_ranks(rank, group)


def _exit_on_rank_1(rank, group):
    if rank == 1:
        os._exit(3)
    return _sum_of_ranks(rank, group)


def _hang_on_rank_1(rank, group):
    if rank == 1:
        time.sleep(3600)
    return rank


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_results_come_in_the_order_of_the_ranks(launcher):
    assert run_ranks(_sum_of_ranks, 3, launcher) == [[3.0, 3.0]] * 3


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_raises_is_reported_with_its_own_error(launcher):
    with pytest.raises(RankFailedError, match=r"(?s)rank 1: .*KeyError: 'mine'"):
        run_ranks(_raise_on_rank_1, 2, launcher)
    assert isinstance(rank_errors(_raise_on_rank_1, 2, launcher)[1], KeyError)


def test_a_rank_that_exits_is_reported_with_its_code():
    with pytest.raises(RankFailedError, match="rank 1: exited with code 3"):
        run_ranks(_exit_on_rank_1, 2, "gloo")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_hangs_is_reported(launcher):
    with pytest.raises(RankFailedError, match=r"rank 1: no answer within 8"):
        run_ranks(_hang_on_rank_1, 2, launcher, timeout=8)


def test_no_rank_sees_a_process_group_of_this_process():
    run_ranks(_sum_of_ranks, 2, "gloo")
    assert not dist.is_initialized()
