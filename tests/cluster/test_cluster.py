"""Over two nodes: every launcher makes one world of them, in which training is that of one process."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from nodes import LAUNCH, OURS, Nodes, absence
from slurm import MISSING, slurm, submit
from support.mpirun import MPIRUN, environment, mpirun, needs_mpi, run
from support.tolerances import TRAINING, UNSYNCHRONISED, difference

TIMEOUT_SECONDS = 250  # of a command, on a machine with other things to do; most take seconds
ABSENCE = absence()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(ABSENCE), reason=ABSENCE),
    pytest.mark.timeout(2 * TIMEOUT_SECONDS),
]
TRAIN = Path(__file__).with_name("train.py")
# Under which name the ranks know what started them.
STARTED_BY = {
    "torchrun_nodes.sh": "torchrun",
    "mpirun_openmpi.sh": "mpirun",
    "slurm_torchrun.sbatch": "torchrun",  # srun's variables are there too
    "slurm_srun.sbatch": "srun",  # without --mpi, to which Open MPI would be two worlds of one
    "slurm_mpirun.sbatch": "mpirun",
}


@pytest.fixture(scope="module")
def nodes():
    with Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def slurm_environment(nodes):
    if MISSING:
        pytest.skip(f"there is no {', '.join(MISSING)}")
    with slurm(nodes) as variables:
        yield OURS | {"NPROC": "1"} | variables


@pytest.fixture(params=STARTED_BY)
def launch(request, nodes, tmp_path):
    """A function that runs Python on two nodes by a file of launch/, and returns what it said; and the file's name."""
    script = request.param
    if "mpirun" in script and (not_here := open_mpi_absence()):
        pytest.skip(not_here)
    environment = request.getfixturevalue("slurm_environment") if script.endswith(".sbatch") else {}

    def start(*arguments):
        if script == "torchrun_nodes.sh":
            answers = nodes.torchrun(*arguments, timeout=TIMEOUT_SECONDS)
        elif script == "mpirun_openmpi.sh":
            answers = [nodes.mpirun(*arguments, timeout=TIMEOUT_SECONDS)]
        else:
            answers = [batch(nodes, environment, tmp_path / "output", script, *arguments)]
        output = "".join(said for _, said in answers)
        assert {code for code, _ in answers} == {0}, output
        return output

    return start, script


def open_mpi_absence():
    if needs_mpi.args[0]:
        return needs_mpi.kwargs["reason"]
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
    return "" if re.search("Open MPI|PRRTE", version) else "mpirun is not Open MPI's"


def batch(nodes, environment, file, script, *arguments):
    """Runs a batch file of launch/, with the variables by which it finds mpirun. See submit."""
    of_mpi = {name: value for name, value in nodes.mpi_environment().items() if name.startswith("MPIRUN")}
    return submit(nodes, file, LAUNCH / script, *arguments, timeout=TIMEOUT_SECONDS, **environment, **of_mpi)


def on_each(nodes, *words, environments):
    """Runs the words on all nodes at once, with a dictionary of variables for each; returns codes and outputs."""
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(run, *node.command(*words), timeout=TIMEOUT_SECONDS, **variables)
            for node, variables in zip(nodes, environments, strict=True)
        ]
        return [each.result() for each in started]


def difference_of_files(file, other):
    return difference(torch.load(file), torch.load(other))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The state after the training script has run by itself."""
    file = tmp_path_factory.mktemp("alone") / "state.pt"
    code, output = run(sys.executable, TRAIN, file, timeout=TIMEOUT_SECONDS)
    assert code == 0, output
    assert "a world of one process" in output
    return file


def test_the_check_passes_under_every_launcher(launch):
    start, script = launch
    output = start("-m", "syncbn", "check")
    assert re.search(r"checks on 2 ranks over \w+, kernels .*: all ok", output), output
    assert re.search(rf"rank 0 of 2, 0 of 1 on node0, cpu, \w+, started by {STARTED_BY[script]}", output), output


def test_one_script_trains_under_every_launcher_as_in_one_process(launch, alone, tmp_path):
    start, script = launch
    output = start(TRAIN, tmp_path / "state.pt")
    for rank in (0, 1):
        place = rf"rank {rank} of 2, 0 of 1 on node{rank}, cpu, \w+, started by {STARTED_BY[script]}"
        assert re.search(place, output), output
    assert difference_of_files(tmp_path / "state.pt", alone) < TRAINING


def test_without_synchronised_statistics_training_is_another(nodes, alone, tmp_path):
    answers = nodes.torchrun(TRAIN, tmp_path / "state.pt", "--apart", timeout=TIMEOUT_SECONDS)
    assert [code for code, _ in answers] == [0, 0], answers
    assert difference_of_files(tmp_path / "state.pt", alone) > UNSYNCHRONISED


NEVER_ALL = """
import os, pathlib, sys, time, syncbn, torch
from datetime import timedelta
folder = pathlib.Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:
    time.sleep(0.01)
syncbn.init_process_group(device="cpu", timeout=timedelta(seconds=2))
"""


def test_a_node_that_never_joins_is_missed_by_name(nodes, tmp_path):
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    environments = [shared | {"RANK": rank} for rank in ("0", "2")]
    answers = on_each(nodes, sys.executable, "-c", NEVER_ALL, tmp_path, environments=environments)
    for rank, (code, output) in zip((0, 2), answers, strict=True):
        assert code != 0
        assert f"LaunchError: [rank {rank}/3] expected 3 ranks to join within 2 s; got 2: 0 on node0; 2 on" in output
        assert "2 on node1; rank 1 did not: see that the launcher started every node" in output


READ = "import sys, syncbn.world\ntry: print(syncbn.world.read_environment())\nexcept RuntimeError as e: print(e)"


def test_variables_that_srun_contradicts_are_refused_on_every_rank(nodes, slurm_environment):
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-c", READ]
    _, said = run(*nodes[0].command(*words), timeout=TIMEOUT_SECONDS, **slurm_environment, WORLD_SIZE="7")
    for rank in (0, 1):
        expected = f"SLURM_PROCID={rank} of SLURM_STEP_NUM_TASKS=2; got WORLD_SIZE=7: unset RANK and WORLD_SIZE"
        assert said.count(expected) == 1, said


def test_a_batch_file_is_no_task_though_it_has_a_tasks_number(nodes, slurm_environment, tmp_path):
    file = tmp_path / "job.sbatch"
    file.write_text(f"#!/bin/sh\necho number $SLURM_PROCID\nexec {sys.executable} -c '{READ}'\n")
    code, said = batch(nodes, slurm_environment, tmp_path / "output", file)
    assert code == 0, said
    assert "number 0\nNone\n" in said, said


KILLED = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from nodes import Nodes
with Nodes() as nodes:
    started = subprocess.Popen(nodes[1].command("sleep", "1000"), start_new_session=True)
    print(*[node.pid for node in nodes], started.pid, flush=True)
    time.sleep(1000)
"""


def test_nothing_runs_on_in_nodes_whose_process_was_killed(tmp_path):
    words = [sys.executable, "-c", KILLED, TRAIN.parent]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(TMPDIR=str(tmp_path))) as process:
        pids = process.stdout.readline().split()
        assert len(pids) == 3
        assert all(Path("/proc", pid).exists() for pid in pids)
        process.kill()
    deadline = time.monotonic() + 60
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_link_with_a_delay_delays(tmp_path):
    for delay_seconds, least in ((0.0, 0.0), (0.1, 0.2)):
        with Nodes(delay_seconds) as nodes:
            ready = tmp_path / f"ready{delay_seconds}"
            with ThreadPoolExecutor(1) as pool:
                words = nodes[0].command(sys.executable, "-c", ANSWER, ready)
                answering = pool.submit(run, *words, timeout=60)
                code, said = run(*nodes[1].command(sys.executable, "-c", ASK, ready), timeout=60)
                assert code == 0, said
                assert answering.result()[0] == 0
            assert float(said) > least
            if not least:
                assert float(said) < 0.2, "the negative control"


ANSWER = """
import pathlib, socket, sys
with socket.create_server(("node0", 5000)) as server:
    pathlib.Path(sys.argv[1]).touch()
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
"""
ASK = """
import pathlib, socket, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
with socket.create_connection(("node0", 5000)) as connection:
    start = time.monotonic()
    connection.sendall(b"?")
    connection.recv(1)
    print(time.monotonic() - start)
"""
DEMO = ["-m", "syncbn", "demo", "--max-steps", "3", "--compare-steps", "3"]


def test_the_demo_runs_over_two_nodes(nodes, tmp_path):
    answers = nodes.torchrun(*DEMO, "--out", tmp_path, timeout=TIMEOUT_SECONDS)
    assert [code for code, _ in answers] == [0, 0], answers
    assert (tmp_path / "demo.png").exists()


@needs_mpi
def test_the_demo_runs_on_four_ranks_of_mpirun(tmp_path):
    code, output = mpirun(4, *DEMO, "--out", tmp_path, timeout=TIMEOUT_SECONDS)
    assert code == 0, output
    assert (tmp_path / "demo.png").exists()
