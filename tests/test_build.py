"""What is built for others: the sdist is complete, the wheel has the compiled library and works on its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import ROOT
from support.environment import clean, install

# What CMake looks for.
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.timeout(600)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, made from the checkout, and the wheel, made from the unpacked sdist, both in isolation.

    The library has the instruction set of any processor alone: each takes half a minute of one core, and the
    checkout's own installation compiles them all.
    """
    folder = tmp_path_factory.mktemp("built")
    baseline = "--config-setting=cmake.define.SYNCBN_INSTRUCTION_SETS="
    quickly = "--config-setting=cmake.build-type=Debug"  # its speed is not what is tested
    command = [sys.executable, "-m", "build", baseline, quickly, "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean())
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def source_files(*folders):
    """Files of the checkout, without what Python or an editable build has left beside them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(p.relative_to(ROOT)) for p in paths if "__pycache__" not in p.parts and p.suffix != ".so"}


def run(python, *arguments):
    """Runs that Python outside of the checkout, and returns what it prints."""
    command = [str(python), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=python.parent, env=clean(), timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_is_in(environment, python):
    """That this Python imports the syncbn of that environment."""
    file = Path(run(python, "-c", "import syncbn; print(syncbn.__file__)").strip())
    assert environment in file.parents
    assert ROOT not in file.parents


def test_the_sdist_is_complete(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert source_files("syncbn", "tests", "launch", "benchmarks", "docker", ".ci") <= names
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}


@needs_compiler
def test_the_wheel_is_the_package_and_its_compiled_library(built):
    _, wheel = built
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "the library is called through ctypes: any Python 3"
    assert wheel.stem.split("-")[4].startswith(("linux_", "manylinux_", "macosx_"))
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {name for name in source_files("syncbn") if not name.startswith("syncbn/csrc/")}
    libraries = {"syncbn/kernels/_cpu.so", "syncbn/comm/_shared_memory.so", "syncbn/comm/_mpi_sum.so"}
    assert names == sources | libraries


@needs_compiler
def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    python, _ = install(tmp_path / "environment", built[1])
    assert_is_in(tmp_path / "environment", python)
    command = str(python.parent / "syncbn")
    information = squeezed(run(python, command, "info"))
    assert "cpu available: CPU tensors and NumPy arrays" in information
    assert "shared_memory available: ranks of one machine" in information
    assert "all ok" in run(python, command, "check")
    library = run(python, "-c", "from syncbn.kernels import cpu; print(cpu._library._name)").strip()
    assert tmp_path / "environment" in Path(library).parents


def test_without_a_compiler_the_sdist_installs_without_the_library_and_says_so(built, tmp_path):
    python, output = install(tmp_path / "environment", built[0], CXX="/nonexistent/c++")
    assert "no C++ compiler: installing without the CPU kernels" in output
    assert_is_in(tmp_path / "environment", python)
    command = str(python.parent / "syncbn")
    information = squeezed(run(python, command, "info"))
    for name in ("cpu", "shared_memory"):
        assert f"{name} not available: installed without a C++ compiler" in information
    assert "all ok" in run(python, command, "check")


def squeezed(text):
    return " ".join(text.split())
