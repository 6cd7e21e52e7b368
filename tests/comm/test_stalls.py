"""Ranks that wait for long say for whom, and where those are. In shared memory: test_shared_memory_labels.py."""

import logging
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import nn

import syncbn
from syncbn.comm import shared_memory


class _Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def _late(rank, group, first):
    kept = _Kept()
    logging.getLogger("syncbn").addHandler(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_library", None)
        patch.setenv("SYNCBN_STALL_SECONDS", "1")
        model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)))
        x = torch.randn(4, 3)
        for step in range(2):
            if step == (not first) and rank == 2:
                time.sleep(4)
            model(x)
    return kept.texts


@pytest.mark.parametrize("first", [False, True])
def test_over_gloo_who_waits_says_for_whom_and_where_that_rank_is(first):
    texts = run_ranks(_late, 3, "gloo", first)
    assert texts[2] == []
    whose = "" if first else ", forward of 0, call 1"
    where = "is in no sum, and whose last was forward of 2, call 0"
    if first:
        where = "does not answer: it has ended, is stopped, or has made no sum yet"
    for rank in range(2):
        (text,) = texts[rank]
        said = f"has waited N s in a sum over Gloo{whose}, for rank 2, which {where}; it ends after 60 s"
        assert re.sub(r"waited \d+ s", "waited N s", text) == f"[rank {rank}/3] {said}"


def _given_up(rank, group):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_library", None)
        own = dist.new_group(timeout=timedelta(seconds=6))
        layer = syncbn.SyncBatchNorm(3, process_group=own)
        layer(torch.randn(4, 3))
        if rank == 2:
            time.sleep(9)
            return None
        with pytest.raises(RuntimeError) as caught:
            layer(torch.randn(4, 3))
        return str(caught.value)


def test_an_error_of_gloos_timeout_says_the_same():
    for rank, text in enumerate(run_ranks(_given_up, 3, "gloo")[:2]):
        assert text.startswith(f"[rank {rank}/3] expected every rank to take part in a sum over Gloo, forward of ")
        assert "while waiting for rank 2, which is in no sum, and whose last was forward of SyncBatchNorm(3)" in text


def _fast(rank, group):
    kept = _Kept()
    logging.getLogger("syncbn").addHandler(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_library", None)
        patch.setenv("SYNCBN_STALL_SECONDS", "2")
        layer = syncbn.SyncBatchNorm(3)
        for _ in range(30):
            layer(torch.randn(4, 3))
            time.sleep(0.1)
    return kept.texts


def test_who_does_not_wait_says_nothing():
    assert run_ranks(_fast, 2, "gloo") == [[], []]
