"""Starts Python as ranks of mpirun, if there is one."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Of the environment's own MPI library, else of the system's.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
_MISSING = [name for name in ("mpi4py", "pytest_mpi") if importlib.util.find_spec(name) is None]
_MISSING += ["mpirun"] * (MPIRUN is None)
needs_mpi = pytest.mark.skipif(bool(_MISSING), reason=f"there is no {', '.join(_MISSING)}")

PYTEST = ("-m", "mpi4py", "-m", "pytest", "--with-mpi", "-x", "-q", "--color=no", "-p", "no:cacheprovider")

# Ranks on any machine, by whoever runs the tests. Each version of Open MPI knows some of these, other libraries none.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # ranks may outnumber the cores
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl": "^ofi",  # whose search for networks takes a second
    "OMPI_MCA_mtl": "^ofi",
    "OMP_NUM_THREADS": "1",
}
# Of a launcher around the tests, which what they start would take for its own.
_LAUNCHERS = ("OMPI_", "PMIX", "PMI_", "PRTE", "MV2_", "MPI_LOCAL", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "SLURM_")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what launchers set, with SETTINGS and those variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)} | SETTINGS | variables


def run(*command: object, timeout: float = 100, cwd: Path | None = None, **variables: str) -> tuple[int, str]:
    """Runs a command, and returns its exit code and what it said on both streams.

    Raises:
        subprocess.TimeoutExpired: after it has been ended by SIGTERM, at which mpirun ends its ranks.
    """
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**variables),
        cwd=cwd,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate(timeout=20)
            print(output.decode(errors="replace"))
            raise
    return process.returncode, output.decode(errors="replace").replace("\0", "")


def mpirun(
    ranks: int, *arguments: object, timeout: float = 100, cwd: Path | None = None, **variables: str
) -> tuple[int, str]:
    """Runs `python *arguments` on so many ranks. See run."""
    return run(MPIRUN, "-n", ranks, sys.executable, *arguments, timeout=timeout, cwd=cwd, **variables)


def passed_on_ranks(ranks: int, folder: Path, tmp_path: Path) -> list[int]:
    """Runs the tests of a folder on so many ranks, each of which must end well; returns how many passed on each."""
    options = ("--timeout", "100", "--basetemp", tmp_path / "rank")
    code, output = mpirun(ranks, *PYTEST, *options, folder, timeout=250)
    assert code == 0, output
    passed = [int(number) for number in re.findall(r"(\d+) passed", output)]
    assert len(passed) == ranks, output
    return passed
