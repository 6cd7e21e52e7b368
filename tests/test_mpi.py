"""Starts tests/mpi under mpirun, and what else needs an MPI world of its own."""

import re
import sys
from pathlib import Path

import pytest
from support.mpirun import PYTEST, mpirun, needs_mpi, passed_on_ranks, run

TESTS = Path(__file__).parent


@needs_mpi
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layers_over_mpi(ranks, tmp_path):
    assert min(passed_on_ranks(ranks, TESTS / "mpi", tmp_path)) > 40


@needs_mpi
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("raise KeyError('mine alone')", "KeyError: 'mine alone'"), ("time.sleep(3600)", "Timeout")],
    ids=["raises", "hangs"],
)
def test_trap_37_a_rank_that_fails_alone_ends_the_run(behaviour, said, tmp_path):
    (tmp_path / "test_it.py").write_text(
        f"""import time
from mpi4py import MPI
def test_it():
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.Get_rank() == 1:
        {behaviour}
    MPI.COMM_WORLD.Barrier()
"""
    )
    timeout = "3" if said == "Timeout" else "300"
    code, output = mpirun(2, *PYTEST, "--timeout", timeout, "--timeout-method", "thread", "test_it.py", cwd=tmp_path)
    assert code != 0
    assert said in output


@needs_mpi
def test_check_ends_when_a_rank_raises_alone(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(
        """import os, sys
from datetime import timedelta
from syncbn.cli import check, main
from syncbn.kernels import aten, cpu
from syncbn.nn import fused
fused._fused = None
check._CASE_TIMEOUT = timedelta(seconds=1)
check.all_cases = lambda ranks: [check.Case("even", "torch", dtype, "contiguous") for dtype in ("float32", "float16")]
for kernels in (aten, cpu):
    def stats(x, *arguments, real=kernels.stats):
        if x.itemsize == 2 and os.environ["rank"] == "1":
            raise KeyError("mine alone")
        return real(x, *arguments)
    kernels.stats = stats
from mpi4py import MPI
os.environ["rank"] = str(MPI.COMM_WORLD.Get_rank())
sys.exit(main(["check"]))
"""
    )
    code, output = mpirun(2, script)
    assert code != 0
    assert re.search(r"ok +even, torch, float32", output), output
    assert re.search(r"FAIL +even, torch, float16.*\[rank 1/2\] KeyError: 'mine alone'; the check ends here", output)


def in_a_process(script):
    code, output = run(sys.executable, "-W", "ignore", "-c", script)
    assert code == 0, output
    return output


@needs_mpi
def test_a_world_smaller_than_the_launcher_says_is_refused():
    output = in_a_process(
        """import os, sys
from mpi4py import MPI
import syncbn.numpy
def attempt(comm, **launcher):
    os.environ.update(launcher)
    try:
        syncbn.numpy.SyncBatchNorm(2, comm=comm)
        print("accepted")
    except RuntimeError as error:
        print(error)
    for name in launcher:
        del os.environ[name]
attempt(MPI.COMM_WORLD)
attempt(MPI.COMM_WORLD, PMI_RANK="0", PMI_SIZE="3")
attempt(MPI.COMM_WORLD.Dup(), RANK="0", WORLD_SIZE="3")
attempt(MPI.COMM_WORLD, SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="3")
attempt(MPI.COMM_SELF, PMI_RANK="0", PMI_SIZE="3")
attempt(MPI.COMM_WORLD, PMI_RANK="0", PMI_SIZE="1")
assert "torch" not in sys.modules
"""
    ).splitlines()
    assert [output[0], *output[4:]] == ["accepted"] * 3
    for line, variable in zip(output[1:4], ("PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), strict=True):
        assert "[rank 0/3] expected MPI.COMM_WORLD to have the rank and size that the launcher set in " in line
        assert f" and {variable}; got rank 0 of 1: the launcher and " in line
        assert "start with the mpirun that was installed with that library" in line


@needs_mpi
def test_a_communicator_outside_the_time_of_mpi_is_refused():
    output = in_a_process(
        """import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import syncbn.numpy
def attempt():
    try:
        syncbn.numpy.SyncBatchNorm(2, comm=MPI.COMM_WORLD)
        print("accepted")
    except RuntimeError as error:
        print(error)
attempt()
MPI.Init()
attempt()
MPI.Finalize()
attempt()
"""
    ).splitlines()
    assert "expected an MPI communicator while MPI is initialised; got one before MPI.Init()" in output[0]
    assert output[1] == "accepted"
    assert "got one after MPI.Finalize()" in output[2]


@needs_mpi
def test_info_does_not_start_mpi():
    output = in_a_process(
        """import sys
sys.modules["torch"] = None
import syncbn.cli, mpi4py
syncbn.cli.main(["info"])
from mpi4py import MPI
print("started:", MPI.Is_initialized(), "rc:", mpi4py.rc.initialize)
"""
    )
    will = "mpi4py will ask for thread level 'multiple'; whether it is GPU-aware shows under mpirun"
    assert re.search(f"mpi +available: .*, not initialised; {will}", output)
    assert "started: False rc: True" in output


LATE = {
    "sleeps": "time.sleep(60)",
    "evaluates": "model.eval()",  # and then waits for the others at the end of MPI
    "has left": "sys.exit(0)",
}


@needs_mpi
@pytest.mark.parametrize(("fault", "way"), [*((fault, "communicator") for fault in LATE), ("sleeps", "group")])
def test_trap_14_a_missing_rank_ends_the_run_and_the_waiting_layer_is_named(fault, way, tmp_path):
    script = tmp_path / "train.py"
    group = "MPI.COMM_WORLD" if way == "communicator" else "None"
    script.write_text(
        f"""import sys, time
from datetime import timedelta
import torch
from mpi4py import MPI
import syncbn
if {way == "group"}:
    syncbn.init_process_group("mpi4py", timeout=timedelta(seconds=2))
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
syncbn.convert_sync_batchnorm(model, {group})
for step in range(2):
    if step and MPI.COMM_WORLD.Get_rank() == 1:
        {LATE[fault]}
    model(torch.randn(4, 3)).sum().backward()
time.sleep(60 * (MPI.COMM_WORLD.Get_rank() == 0))
"""
    )
    seconds = {"SYNCBN_STALL_SECONDS": "0.5"} | ({"SYNCBN_TIMEOUT_SECONDS": "2"} if way == "communicator" else {})
    code, output = mpirun(2, "-m", "mpi4py", script, timeout=50, **seconds)
    assert code != 0
    # Who is through with all else waits in MPI's end, and answers no more.
    where = "does not answer" if fault != "sleeps" else "is in no sum, and whose last was backward of 1, call 0"
    waits = rf"\[rank 0/2\] has waited \d s in a sum over MPI, forward of 1, call 1, for rank 1, which {where}"
    assert re.search(f"{waits}.*; it ends after 2 s", output)
    assert re.search(rf"{waits}.*\. That is the timeout.*all ranks end", output)
    assert "[rank 1/2] has waited" not in output
