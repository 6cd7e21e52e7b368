"""A Slurm of one's own on the nodes, for as long as a context: no munge, no cgroups, no service of the system's."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nodes import Nodes
from support.mpirun import environment, run

MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
START_SECONDS, END_SECONDS = 30, 10
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node0({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort=26817
SlurmdPort=26818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1000
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=2
MailProg=/bin/true
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(nodes: Nodes) -> Iterator[dict[str, str]]:
    """Starts Slurm, and yields the variables with which its commands find it; they run in node 0.

    Raises:
        RuntimeError: not all nodes are ready after START_SECONDS; with what the daemons have written.
    """
    folder = nodes.folder / "slurm"
    lines = [f"NodeName={node.name} NodeAddr={node.address} CPUs=4 State=UNKNOWN" for node in nodes]
    for name in ("state", *(node.name for node in nodes)):
        (folder / name).mkdir(parents=True)
    file = folder / "slurm.conf"
    file.write_text(CONFIGURATION.format(folder=folder, address=nodes[0].address) + "\n".join(lines) + "\n")
    with ExitStack() as stack:
        daemons = [nodes[0].command("slurmctld", "-D", "-c", "-f", file)]
        daemons += [node.command("slurmd", "-D", "-N", node.name, "-f", file) for node in nodes]
        for words in daemons:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            stack.callback(_end, subprocess.Popen(words, env=environment(), start_new_session=True, **quiet))
        variables = {"SLURM_CONF": str(file)}
        _wait(nodes, folder, environment(**variables))
        yield variables


def submit(nodes: Nodes, output: Path, *words: object, timeout: float, **variables: str) -> tuple[int, str]:
    """Runs sbatch with these words and a task on each node; returns the job's exit code and what it said.

    Raises:
        TimeoutError: the job has not ended; with what it said.
    """
    options = ["--parsable", "--output", output, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    code, said = run(*nodes[0].command("sbatch", *options, *words), **variables)
    if code:
        return code, said
    show = nodes[0].command("scontrol", "--oneliner", "show", "job", said.split()[-1])
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:  # sbatch --wait looks after 2, 6, 12, 20, 30, 42, ... seconds
        _, job = run(*show, **variables)
        if ended := re.search(r"JobState=(?!PENDING|CONFIGURING|RUNNING|COMPLETING).* ExitCode=(\d+):(\d+)", job):
            return int(ended[1]) or int(ended[2]), output.read_text() if output.exists() else job
        time.sleep(0.1)
    raise TimeoutError(f"expected the job to end within {timeout} s; got {output.read_text()}")


def _wait(nodes: Nodes, folder: Path, environ: dict[str, str]) -> None:
    words = nodes[0].command("sinfo", "--noheader", "--states", "idle", "--format", "%D")
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(words, env=environ, capture_output=True, text=True).stdout.strip() != str(len(list(nodes))):
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in folder.glob("*.log"))
            raise RuntimeError(f"expected Slurm to be ready within {START_SECONDS} s; got\n{logs}")
        time.sleep(0.05)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
