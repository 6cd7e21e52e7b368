"""The files in launch/ that users copy: they explain themselves, agree with each other, and start ranks."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launch_files import FOLDER, MANIFESTS, SCRIPTS, name_of, settings_of
from support.mpirun import MPIRUN, SETTINGS, needs_mpi

BASH = shutil.which("bash")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash on this machine")


def run(path, *arguments, **environment):
    """Runs a script with this Python, and none of the variables that it, or a launcher around the tests, sets."""
    own = r"OMP_NUM_THREADS|NP|NPROC|PPN|NODES|HOSTS|BIND|MALLOC_.*"
    names = own + r"|NODE_RANK|RANK|WORLD_SIZE|MASTER_.*|SLURM_.*|OMPI_COMM_.*|PMI.*"
    inherited = {name: value for name, value in os.environ.items() if not re.fullmatch(names, name)}
    return subprocess.run(
        [BASH, str(path), *arguments],
        env=inherited | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_help_explains_every_variable_that_has_a_default(path):
    result = run(path, "--help")
    assert result.returncode == 0, result.stderr
    assert f"launch/{path.name} -m syncbn check" in result.stdout or "NODE_RANK=0" in result.stdout
    source = path.read_text()
    before_settings = source.partition("# What makes training fast")[0]
    defaults = set(re.findall(r"\$\{([A-Z_]+):[-?]", before_settings + source.partition("NCCL_DEBUG:-WARN")[2]))
    for variable in {name for name in defaults if not name.startswith(("SLURM_", "I_MPI_"))} | {"OMP_NUM_THREADS"}:
        assert re.search(rf"^ .*\b{variable}\b", result.stdout, re.MULTILINE), variable
    assert run(path).returncode == 2, "without arguments there is nothing to run"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_valid_and_pass_all_arguments_on(path):
    assert subprocess.run([BASH, "-n", path], capture_output=True, text=True).stderr == ""
    assert os.access(path, os.X_OK)
    *_, print_it, end_line, last = path.read_text().splitlines()
    assert (print_it, end_line, last) == ("printf '%q ' \"${command[@]}\" >&2", "echo >&2", 'exec "${command[@]}"')
    assert path.read_text().count('"$@"') >= 1


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck on this machine")
def test_shellcheck_has_nothing_to_say():
    result = subprocess.run([SHELLCHECK, "--shell=bash", *SCRIPTS], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_all_files_set_the_same():
    first, *others = map(settings_of, SCRIPTS)
    assert set(first) >= {"OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    assert set(first) >= {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_FR_BUFFER_SIZE", "NCCL_DEBUG"}
    assert others == [first] * len(others)
    for path in MANIFESTS:
        found = dict(re.findall(r'- \{name: (\w+), value: "?([^"}]+)"?\}', path.read_text()))
        assert {name: found.get(name) for name in first if name != "OMP_NUM_THREADS"} == {
            name: value for name, value in first.items() if name != "OMP_NUM_THREADS"
        }, path.name


def test_the_table_of_the_readme_is_complete():
    readme = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"^\| `([\w./]+)` \|", readme, re.MULTILINE))
    assert named == {str(path.relative_to(FOLDER)) for path in [*SCRIPTS, *MANIFESTS]}


def assert_two_ranks_checked(result, launcher):
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"checks on 2 ranks over (mpi4py|gloo, sums in shared memory), kernels .*: all ok", result.stdout)
    assert re.search(rf"rank 0 of 2, 0 of 2 on \S+, cpu, \w+, started by {launcher}", result.stdout)
    assert "-m syncbn check" in result.stderr + result.stdout  # the command, printed


def test_torchrun_on_one_machine():
    result = run(FOLDER / "torchrun_one_node.sh", "-m", "syncbn", "check", NPROC="2", CUDA_VISIBLE_DEVICES="")
    assert_two_ranks_checked(result, "torchrun")


@needs_mpi
def test_mpirun_on_one_machine():
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
    script = "mpirun_openmpi.sh" if "Open MPI" in version or "PRRTE" in version else "mpirun_mpich.sh"
    settings = SETTINGS | {"MPIRUN": MPIRUN, "MPIEXEC": MPIRUN, "CUDA_VISIBLE_DEVICES": ""}
    result = run(FOLDER / script, "-m", "syncbn", "check", NP="2", BIND="0", **settings)
    assert_two_ranks_checked(result, "mpi")


# In python's place: in that of torchrun starts its ranks one after the other, and says with which options.
STAND_IN = f"""#!{BASH}
if [[ "$1 $2" != "-m torch.distributed.run" ]]; then exec {sys.executable} "$@"; fi
until [[ $1 == --no-python ]]; do echo "option $1"; shift; done
shift
for LOCAL_RANK in 0 1; do export LOCAL_RANK; "$@"; done
"""
PRINT_PLACE = 'import os; print("cores", *os.sched_getaffinity(0), "threads", os.environ["OMP_NUM_THREADS"])'


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset on this machine")
def test_ranks_have_cores_of_their_own(stand_in):
    if len(physical_cores()) < 2:
        pytest.skip("one physical core")
    script, threads = FOLDER / "torchrun_one_node.sh", len(physical_cores()) // 2
    result = run(script, "-c", PRINT_PLACE, NPROC="2", BIND="1", PYTHON=stand_in)
    assert result.returncode == 0, result.stderr
    first, second = (set(cores.split()) for cores in re.findall(rf"cores ([\d ]+) threads {threads}\n", result.stdout))
    assert len(first) == len(second) == threads
    assert not first & second
    shared = run(script, "-c", PRINT_PLACE, NPROC="2", BIND="0", PYTHON=stand_in)
    assert len(set(re.findall(r"cores ([\d ]+) threads", shared.stdout))) == 1
    too_many = run(script, "-c", PRINT_PLACE, NPROC="999", BIND="1", PYTHON=stand_in)
    assert re.findall(r"cores ([\d ]+ threads \d+)", too_many.stdout)[0].endswith("threads 1")
    assert "taskset" not in too_many.stderr


def test_torchrun_on_several_machines_is_told_where_they_are(stand_in):
    given = {"NODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC": "4", "BIND": "0"}
    result = run(FOLDER / "torchrun_nodes.sh", "-c", "print('ran')", PYTHON=stand_in, **given)
    options = re.findall(r"option (\S+)", result.stdout)
    assert " ".join(options) == (
        "-m torch.distributed.run --nnodes 3 --node-rank 1 --master-addr node0 --master-port 29400 --nproc-per-node 4"
    )
    assert result.stdout.splitlines().count("ran") == 2


def physical_cores():
    files = (f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in os.sched_getaffinity(0))
    return {Path(file).read_text() if Path(file).exists() else file for file in files}


def refusals(path):
    """The lines of a script that refuse what cannot be."""
    return (
        path.read_text()
        .partition("# What cannot be is refused")[2]
        .partition('set it to a name on PATH, or to a path"\ndone\n')[0]
    )


def test_all_files_refuse_by_the_same_lines():
    assert len({refusals(path) for path in SCRIPTS}) == 1
    assert refusals(SCRIPTS[0])


JOB = {  # what some must be given
    "NODES": "2",
    "NODE_RANK": "0",
    "MASTER_ADDR": "node0",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
}
GIVEN = {
    "torchrun_nodes.sh": ("NODES", "NODE_RANK", "MASTER_ADDR"),
    "slurm_torchrun.sbatch": ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"),
    "slurm_srun.sbatch": ("SLURM_JOB_ID",),
    "slurm_mpirun.sbatch": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
}
NUMBERS = {
    "mpirun_openmpi.sh": ("NP",),
    "mpirun_mpich.sh": ("NP", "PPN"),
    "torchrun_one_node.sh": ("NPROC",),
    "torchrun_nodes.sh": ("NPROC", "NODES", "MASTER_PORT"),
    "slurm_torchrun.sbatch": ("NPROC", "MASTER_PORT", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID"),
    "slurm_srun.sbatch": ("SLURM_CPUS_PER_TASK",),
    "slurm_mpirun.sbatch": ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
}
COMMANDS = {"mpirun_openmpi.sh": "MPIRUN", "slurm_mpirun.sbatch": "MPIRUN", "mpirun_mpich.sh": "MPIEXEC"}
TWO = "set it to one of them, or leave it out"
OTHERS = {
    "torchrun_nodes.sh": [
        *(
            ("NODE_RANK", v, "a whole number below NODES=2", "number the machines from 0")
            for v in ("2", "x", "-1", "01")
        ),
        ("MASTER_PORT", "99999", "at most 65535", "choose one from 1024 on"),
        ("MASTER_ADDR", "a b", "a name or an address", "give one of machine 0"),
    ],
    "mpirun_openmpi.sh": [
        ("HOSTS", v, "name:ranks,...", "set whole numbers from 1")
        for v in ("node0:x,node1:2", "node0:2,node1:y", "node0:0", "node0 node1", "node0,,node1")
    ],
    "mpirun_mpich.sh": [("HOSTS", v, "name,...", "separate names by commas") for v in ("a b", "a,", "localhost:0")],
}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_what_cannot_be_is_refused_before_anything_is_started(path, tmp_path):
    cases = [
        (name, value, "a whole number from 1", "set it to such a number")
        for name in (*NUMBERS[path.name], "OMP_NUM_THREADS")
        for value in ("0", "abc", "-1", "08", "2 3", "1234567890")
    ]
    commands = ("PYTHON", COMMANDS[path.name]) if path.name in COMMANDS else ("PYTHON",)
    for name, value in itertools.product(commands, (str(tmp_path / "missing"), "if")):
        cases.append((name, value, "a program", "set it to a name on PATH, or to a path"))
    if "BIND" in path.read_text():
        cases += [("BIND", value, "0 or 1", TWO) for value in ("abc", "2")]
    programs = dict.fromkeys(commands, sys.executable)
    for name, value, expected, remedy in cases + OTHERS.get(path.name, []):
        result = run(path, "train.py", **(JOB | programs | {name: value}))
        assert (result.returncode, result.stdout) == (2, ""), (name, value)
        assert result.stderr == f"expected {name} to be {expected}; got '{value}': {remedy}\n"


@pytest.mark.parametrize(("script", "missing"), [(script, name) for script, names in GIVEN.items() for name in names])
def test_a_missing_variable_is_named(script, missing):
    result = run(FOLDER / script, "train.py", **{name: value for name, value in JOB.items() if name != missing})
    remedy = "start this file with sbatch" if missing.startswith("SLURM") else f"see {script} --help"
    assert result.returncode == 2
    assert result.stderr == f"expected {missing} to be set; got '': {remedy}\n"


@needs_mpi
@pytest.mark.skipif(os.geteuid() != 0, reason="Open MPI refuses root alone")
def test_open_mpi_tells_root_what_to_do():
    refused = {"OMPI_ALLOW_RUN_AS_ROOT": "0", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "0"}
    result = run(FOLDER / "mpirun_openmpi.sh", "-c", "print('ran')", MPIRUN=str(MPIRUN), **refused)
    assert result.returncode
    assert "ran\n" not in result.stdout
    assert "attempt to run as root" in result.stdout + result.stderr
    help_text = run(FOLDER / "mpirun_openmpi.sh", "--help").stdout
    assert "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in help_text


@pytest.mark.parametrize(
    ("script", "variable", "says", "remedy"),
    [
        ("mpirun_mpich.sh", "MPIEXEC", "mpiexec (Open MPI) 5.0.11", "use mpirun_openmpi.sh"),
        ("mpirun_openmpi.sh", "MPIRUN", "HYDRA build details:", "use mpirun_mpich.sh"),
        ("mpirun_openmpi.sh", "MPIRUN", "Intel(R) MPI Library for Linux* OS", "use mpirun_mpich.sh"),
    ],
)
def test_another_mpis_program_is_refused(script, variable, says, remedy, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    result = run(FOLDER / script, "train.py", **{variable: str(program)})
    assert result.returncode == 2
    assert re.fullmatch(rf"expected {variable} to be .*; got '{program}, .*': {remedy}\n", result.stderr)


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_are_yaml_that_starts_ranks(path):
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    documents = list(yaml.safe_load_all(path.read_text()))
    assert [document["metadata"]["name"] for document in documents] == ["syncbn"] * len(documents)
    assert all(document["apiVersion"] and document["kind"] for document in documents)
    assert re.search(r"-m,? syncbn,? check", path.read_text())
