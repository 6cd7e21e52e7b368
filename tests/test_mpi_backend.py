"""The backend "mpi4py" of torch.distributed: runs tests/mpi_backend under mpirun, and jobs that end in errors.

One job per number of ranks runs all functions test_* of tests/mpi_backend, and says which have passed on all ranks.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent / "mpi_backend"
CASES = [
    pytest.param(name, id=f"{module}-{name.removeprefix('test_')}")
    for module in ("collectives", "works", "groups", "training")
    for name in re.findall(r"^def (test_\w+)", (HERE / f"{module}.py").read_text(), re.MULTILINE)
]
# The mpirun of the running environment's MPI library comes first; both spellings, for Open MPI 4 and 5.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_pml": "ob1",  # starts in a tenth of the time: no search for networks
    "OMPI_MCA_btl": "self,sm",
    "OMP_NUM_THREADS": "1",
}
TIMEOUT_SECONDS = 240
# Of a launcher around pytest itself, which a job inside would take for its own.
_LAUNCHERS = ("OMPI_COMM", "PMIX", "PMI_", "PRTE", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed"),
    pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun"),
    pytest.mark.timeout(300),  # the first test of a job waits for all of it
]


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)} | SETTINGS


def job(ranks, *command):
    """Runs Python with command on so many ranks, and returns its exit status and output."""
    return run(MPIRUN, "-n", str(ranks), sys.executable, "-m", "mpi4py", *command)


def run(*command):
    """Returns the exit status and output of a command; one that hangs is ended, by SIGTERM, for mpirun ends its ranks."""
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            output += f"\nended after {TIMEOUT_SECONDS} s"
    return process.returncode, output


@functools.cache
def outcome(ranks):
    status, output = job(ranks, str(HERE / "run.py"))
    passed = [json.loads(line)["passed"] for line in output.splitlines() if line.startswith('{"passed"')]
    return status, passed, output


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_on_ranks(name, ranks):
    status, passed, output = outcome(ranks)
    if name not in passed:
        pytest.fail(f"{name} has not passed on {ranks} ranks; the job ended with status {status}:\n{output[-6000:]}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_job_ends_well_and_runs_nothing_else(ranks):
    status, passed, output = outcome(ranks)
    assert status == 0, output[-6000:]
    assert passed == [case.values[0] for case in CASES]


def test_an_error_on_one_rank_ends_all():
    code = (
        "import syncbn.mpi, torch, torch.distributed as dist; syncbn.mpi.init_process_group(); "
        "assert dist.get_rank() != 1, 'rank 1 has had enough'; dist.all_reduce(torch.ones(1)); print('went on')"
    )
    status, output = job(2, "-c", code)
    assert status != 0
    assert "rank 1 has had enough" in output
    assert "went on" not in output


def test_without_mpirun_it_is_a_world_of_one_and_an_mpirun_of_another_installation_is_an_error():
    code = (
        "import os, pytest, syncbn.mpi, syncbn.comm, torch, torch.distributed as dist\n"
        "os.environ['PMI_SIZE'] = '3'\n"
        "with pytest.raises(RuntimeError, match='expected MPI.COMM_WORLD of 3 processes'):\n"
        "    syncbn.mpi.init_process_group()\n"
        "del os.environ['PMI_SIZE']\n"
        "syncbn.mpi.init_process_group(); "
        "t = torch.ones(2); dist.all_reduce(t); dist.barrier(); assert t.tolist() == [1, 1]; "
        "assert type(syncbn.comm.as_communicator(None)) is syncbn.comm.LocalCommunicator; "
        "dist.destroy_process_group(); print('as one')"
    )
    status, output = run(sys.executable, "-c", code)
    assert (status, output.strip()) == (0, "as one")


def test_the_package_alone_registers_nothing():
    assert "mpi4py" not in dist.Backend.backend_list
