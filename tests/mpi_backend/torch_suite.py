"""PyTorch's own tests of a torch.distributed backend, run on the backend "mpi4py", each on all ranks together.

    mpirun -n 4 python tests/mpi_backend/torch_suite.py [--match all_reduce,broadcast] [--seconds 60]

They are those of torch.testing._internal.distributed.distributed_test, of the installed torch, and need expecttest:
written for Gloo and NCCL and 3 or more ranks. With 4 they take some 5 minutes on two cores. Each runs in a process
group of its own. Rank 0 prints one line per test: passed, FAILED with the error of the first rank that has one, or
skipped with the test's own reason, and a summary. The exit status is 1 if a test failed that is not in EXPECTED.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
import unittest
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from mpi4py import MPI

import syncbn.mpi  # noqa: F401 - registers the backend

WORLD = MPI.COMM_WORLD

# Tests that cannot pass here, and why.
_CUDA = "a test on CUDA devices, of which this machine has none"
_GLOO = "a test of something that only Gloo has"
EXPECTED = {
    "test_SyncBatchNorm_process_group": "needs torchvision",
    "test_accumulate_gradients_no_sync": _CUDA,
    "test_accumulate_gradients_no_sync_allreduce_hook": _CUDA,
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook": _CUDA,
    "test_accumulate_gradients_no_sync_grad_is_view": _CUDA,
    "test_all_to_all_cuda": _CUDA,
    "test_all_to_all_cuda_complex": _CUDA,
    "test_all_to_all_full_group_cuda": _CUDA,
    "test_all_to_all_group_cuda": _CUDA,
    "test_barrier_group_cuda": _CUDA,
    "test_barrier_full_group_cuda": _CUDA,
    "test_batch_isend_irecv_mixed_backend_err": "needs NCCL",
    "test_batch_isend_irecv_op_err": _CUDA,
    "test_monitored_barrier_failure_order": _GLOO,
    "test_monitored_barrier_gloo": _GLOO,
    "test_monitored_barrier_gloo_rank_0_timeout": _GLOO,
    "test_monitored_barrier_gloo_subgroup": _GLOO,
    "test_monitored_barrier_wait_all_ranks": _GLOO,
    "test_sparse_all_reduce_sum": "the backend refuses sparse tensors",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="run tests whose names contain this; several separated by commas")
    parser.add_argument("--seconds", type=float, default=60.0, help="the process groups' timeout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = WORLD.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None)
    os.makedirs(os.path.join(folder, "test_dir"), exist_ok=True)
    os.environ.update(
        BACKEND="mpi4py", WORLD_SIZE=str(WORLD.size), RANK=str(WORLD.rank), TEMP_DIR=folder, INIT_METHOD="mpi://"
    )
    suite = _suite()
    names = [n for n in sorted(dir(suite)) if n.startswith("test_")]
    names = [n for n in names if any(part in n for part in options.match.split(","))]
    counts = {"passed": 0, "skipped": 0, "failed": 0, "failed as expected": 0}
    for name in names:
        start = time.monotonic()
        outcome, reason = _run(suite, name, options.seconds)
        if outcome == "failed" and name in EXPECTED:
            outcome, reason = "failed as expected", f"{EXPECTED[name]} ({reason})"
        counts[outcome] += 1
        if WORLD.rank == 0:
            word = outcome.upper() if outcome == "failed" else outcome
            print(f"{word:8} {name} ({time.monotonic() - start:.1f} s)" + (f": {reason}" if reason else ""), flush=True)
    if WORLD.rank == 0:
        print(f"torch {torch.__version__}, {WORLD.size} ranks:", ", ".join(f"{n} {what}" for what, n in counts.items()))
    return 1 if counts["failed"] else 0


def _suite() -> type:
    """Returns the class of torch's tests, with what they expect of the process around them."""
    from torch.testing._internal import common_distributed, common_utils

    for feature in ("subgroup", "ddp"):
        common_distributed.DistTestCases.backend_feature[feature].add("mpi4py")
    # For torch's MPI backend, of which no wheel has one, torch lifts this, too: the groups are of ranks 1 and 2.
    common_distributed.skip_if_small_worldsize = lambda test: test
    with contextlib.redirect_stderr(io.StringIO()):
        from torch.testing._internal.distributed.distributed_test import DistributedTest

    class Suite(common_utils.TestCase, DistributedTest._DistTestBase):
        rank, world_size, init_method = WORLD.rank, WORLD.size, "mpi://"
        file_name = os.path.join(os.environ["TEMP_DIR"], "file")

        def _barrier(self, *_, **__):
            if dist.is_initialized():
                dist.barrier()  # which ends in time where a rank has failed
            else:
                _meet()

    return Suite


def _meet() -> None:
    """A barrier without torch.distributed, which may be what failed."""
    meeting = WORLD.Ibarrier()
    while not meeting.Test():
        time.sleep(0.001)


def _run(suite: type, name: str, seconds: float) -> tuple[str, str]:
    """Returns the outcome of one test on all ranks, the same on every rank, and its reason."""
    from torch.testing._internal.common_distributed import TEST_SKIPS

    dist.init_process_group("mpi4py", init_method="mpi://", timeout=timedelta(seconds=seconds))
    torch.manual_seed(0)
    outcome, reason = "passed", ""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            case = suite(name)
            case.setUp()
            getattr(case, name)()
            case.doCleanups()
    except unittest.SkipTest as skip:
        outcome, reason = "skipped", str(skip)
    except SystemExit as end:  # how torch's decorators skip in a process of a test's own
        reasons = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
        outcome, reason = ("skipped", reasons[end.code]) if end.code in reasons else ("failed", f"exit {end.code}")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        line = next((f"line {f.lineno}" for f in reversed(place) if f.filename.endswith("distributed_test.py")), "")
        text = " ".join(str(error).partition("To execute this test")[0].split())
        outcome, reason = "failed", f"{type(error).__name__} at {line}: {text[:300]}"
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    _meet()
    outcomes = WORLD.allgather((outcome, reason))
    for kind in ("failed", "passed", "skipped"):
        for rank, (found, why) in enumerate(outcomes):
            if found == kind:
                return kind, f"rank {rank}: {why}" if kind == "failed" else why
    raise AssertionError(outcomes)


if __name__ == "__main__":
    sys.exit(main())
