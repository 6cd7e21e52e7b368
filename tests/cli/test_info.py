"""`syncbn info` says what is here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.cli import main
from syncbn.comm import shared_memory
from syncbn.kernels import selection


def test_info_names_versions_kernels_communicators_and_choice(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for pattern in (
        rf"torch +{re.escape(torch.__version__.split('+')[0])}",
        r"mpi4py +(not installed|\d)",
        r"reference +available",
        r"aten +available",
        r"cpu +available: .*, instruction set (avx512|avx2|baseline)",
        r"kernels +cpu for torch tensors on the CPU and NumPy arrays, aten for torch tensors on other devices: the",
        r"local +available",
        r"torch +available.*gloo yes",
        r"shared_memory +available: ranks of one machine",
        # Another test of this process may have started MPI.
        r"mpi +(available: .*, (not initialised; mpi4py will ask for|.*MPI_THREAD_)|not available: mpi4py )",
        r"world +1 process: RANK and WORLD_SIZE are not set",
        r"communicator +local",
        r"device +",
    ):
        assert re.search(pattern, output), pattern


@pytest.mark.usefixtures("without_cpu_kernels")
def test_info_says_when_the_cpu_kernels_are_missing(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"cpu +not available: (installed without a C\+\+ compiler|imported from a source folder)", output)
    assert re.search(
        r"kernels +aten for torch tensors on the CPU and torch tensors on other devices, reference for NumPy arrays:",
        output,
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aten", "aten for torch tensors on the CPU and torch tensors on other devices, none for NumPy arrays: as "),
        ("cpu", "cpu for torch tensors on the CPU and NumPy arrays, none for torch tensors on other devices: as "),
        (
            "fast",
            "none: expected the environment variable SYNCBN_KERNELS to be one of cpu, reference, gpu, aten; got 'fast'",
        ),
    ],
)
def test_info_says_which_kernels_the_environment_asks_for(name, said, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(selection, "_FORCED", name)
    assert main(["info"]) == 0
    assert re.search(f"kernels +{re.escape(said)}", capsys.readouterr().out)


def test_info_says_when_no_memory_can_be_shared(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(shared_memory, "_FOLDER", Path("/nonexistent"))
    assert main(["info"]) == 0
    assert re.search(r"shared_memory +not available: /nonexistent is not there", capsys.readouterr().out)


def test_info_says_which_rank_a_launcher_made_this(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "rank 0 of 3" in output
    assert re.search(r"communicator +torch, once", output)
    monkeypatch.setenv("RANK", "1")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == ""


def test_info_names_the_variables_of_other_launchers(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert main(["info"]) == 0
    assert "rank 0 of 3, by the launcher's OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE" in capsys.readouterr().out


def test_an_environment_that_cannot_be_is_one_line_of_check_and_demo_and_shown_by_info(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "expected RANK below WORLD_SIZE; got 3 of 3: ranks count from 0, and a world has 1 at least"
    for command in ("check", "demo"):
        assert main([command]) == 1
        assert capsys.readouterr().err == f"syncbn {command}: error: {message}\n"
    assert main(["info"]) == 0
    assert re.search(rf"world +unclear: {message}", capsys.readouterr().out)


def test_info_works_without_torch():
    code = "import sys; sys.modules['torch'] = None; from syncbn.cli import main; sys.exit(main(['info']))"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in done.stdout
    assert re.search(r"aten +not available: it cannot be imported \(ModuleNotFoundError: ", done.stdout)
    assert re.search(r"kernels +cpu for NumPy arrays: ", done.stdout)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD", "PMI"])
def test_under_mpirun_mpi4py_is_needed(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(f"{name}_RANK", "0")
    monkeypatch.setenv(f"{name}_SIZE", "3")
    assert main(["check"]) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"syncbn check: error: \[rank 0/3\] expected mpi4py, through which ranks of mpirun .*: pip install", error
    )
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"mpi +not available: mpi4py is not installed", output)
    assert f"rank 0 of 3, by the launcher's {name}_RANK and {name}_SIZE" in output
    monkeypatch.setenv(f"{name}_RANK", "1")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == ""


def test_help_and_info_load_no_torch_before_they_need_it():
    code = "import sys, syncbn.cli; syncbn.cli._parser(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=60).returncode == 0
