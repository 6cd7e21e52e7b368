"""Starts tests/mpi under mpirun, and what else needs an MPI world of its own."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.comm.launcher import Job, job

TESTS = Path(__file__).parent
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "PMI_RANK", "PMI_SIZE"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
# Of the environment's own MPI, else of the system's.
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
MISSING = [name for name in ("mpi4py", "pytest_mpi") if importlib.util.find_spec(name) is None]
MISSING += ["mpirun"] * (MPIRUN is None)
needs_mpi = pytest.mark.skipif(bool(MISSING), reason=f"there is no {', '.join(MISSING)}")

# Each version of Open MPI knows some of these, and other MPI libraries need none.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # ranks may outnumber the cores
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl": "^ofi",  # whose search for networks takes a second
    "OMPI_MCA_mtl": "^ofi",
    "OMP_NUM_THREADS": "1",
}


def mpirun(ranks, *arguments, cwd=TESTS.parent, timeout=100):
    """Runs `python -m mpi4py *arguments` on so many ranks; returns the exit code and what all of them said.

    Raises:
        subprocess.TimeoutExpired: after the ranks have been ended.
    """
    command = [MPIRUN, "-n", str(ranks), sys.executable, "-m", "mpi4py", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | ENVIRONMENT
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=cwd, stdin=subprocess.DEVNULL
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun then ends its ranks; killed, it would leave them behind
        output, _ = process.communicate(timeout=20)
        print(output.decode(errors="replace"))
        raise
    return process.returncode, output.decode(errors="replace").replace("\0", "")


PYTEST = ("-m", "pytest", "--with-mpi", "-x", "-q", "--color=no", "-p", "no:cacheprovider")


@needs_mpi
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layers_over_mpi(ranks):
    code, output = mpirun(ranks, *PYTEST, "--timeout", "100", TESTS / "mpi", timeout=250)
    passed = [int(number) for number in re.findall(r"(\d+) passed", output)]
    assert code == 0, output
    assert len(passed) == ranks, output
    assert min(passed) > 40, output


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
check._CASE_TIMEOUT = timedelta(seconds=1)
check.all_cases = lambda ranks: [check.Case("even", "torch", dtype, "contiguous") for dtype in ("float32", "float16")]
for kernels in (aten, cpu):
    def stats(x, center, real=kernels.stats):
        if x.itemsize == 2 and os.environ["rank"] == "1":
            raise KeyError("mine alone")
        return real(x, center)
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


def in_a_process(script, **environment):
    variables = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | ENVIRONMENT | environment
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=variables, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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
attempt(MPI.COMM_WORLD, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="3")
attempt(MPI.COMM_SELF, PMI_RANK="0", PMI_SIZE="3")
attempt(MPI.COMM_WORLD, PMI_RANK="0", PMI_SIZE="1")
assert "torch" not in sys.modules
"""
    ).splitlines()
    assert [output[0], *output[4:]] == ["accepted"] * 3
    for line, variable in zip(output[1:4], ("PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), strict=True):
        assert f"expected MPI.COMM_WORLD of 3 processes, for the launcher set {variable}; got 1: the launcher " in line
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
    assert re.search(r"mpi +available: .*, not initialised; mpi4py will ask for thread level 'multiple'", output)
    assert "started: False rc: True" in output


SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, Job("slurm", 0, 2, *SLURM)),
        (SLURM | OPEN_MPI, Job("mpi", 1, 4, *OPEN_MPI)),
        (SLURM | OPEN_MPI | TORCHRUN, Job("torch", 5, 8, *TORCHRUN)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, Job("mpi", 2, 3, "PMI_RANK", "PMI_SIZE")),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "1"}, Job("mpi", 0, 1, *LAUNCHER_VARIABLES[-2:])),
        ({"WORLD_SIZE": "8"}, None),
        ({"RANK": "", "WORLD_SIZE": "8"} | SLURM, Job("slurm", 0, 2, *SLURM)),
    ],
    ids=["none", "srun", "mpirun_in_slurm", "torchrun_in_all", "mpich", "mvapich", "half", "empty"],
)
def test_the_innermost_launcher_counts(environment, expected, monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job() == expected
