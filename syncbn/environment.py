"""Reads a process's rank and world size from the launcher's environment variables. No torch, no MPI, no messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

MPI_LAUNCHERS = ("openmpi", "mvapich2", "hydra")
_LOOPBACK = "127.0.0.1"
_TOO_MANY_DIGITS = 19  # no rank, job or port has a number this long
# Below the range from which Linux takes ports for outgoing connections.
_FIRST_PORT, _PORTS, _STEPS_PER_JOB = 20000, 12768, 16


def rank_prefix(rank: int, world_size: int) -> str:
    """Returns how error messages start: with the rank, or with nothing in a world of one.

    >>> rank_prefix(3, 8), rank_prefix(0, 1)
    ('[rank 3/8] ', '')
    """
    return f"[rank {rank}/{world_size}] " if world_size > 1 else ""


class LaunchError(RuntimeError):
    """The ranks cannot form a world. The message says why and what to do; no traceback is needed."""


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process and its launch.

    Attributes:
        launcher: torchrun, openmpi, mvapich2, hydra (MPICH's or Intel MPI's mpirun), slurm (srun) or environment
            (RANK and WORLD_SIZE, from any other).
        rank, world_size: this process's rank and the number of ranks.
        local_rank, local_world_size: the same among the processes of this node, or None.
        master_addr, master_port: rank 0's address, given or derived from the Slurm job, or None.
        job: identifies this job, or "".
        source: names of the variables that gave rank and world_size, for messages.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    master_addr: str | None
    master_port: int | None
    job: str
    source: str

    @property
    def is_mpi(self) -> bool:
        """Whether an MPI launcher started this process, so that MPI can broadcast rank 0's address."""
        return self.launcher in MPI_LAUNCHERS

    @property
    def prefix(self) -> str:
        """The rank_prefix of this process's error messages."""
        return rank_prefix(self.rank, self.world_size)


class _Variables(NamedTuple):
    """Names of a launcher's variables. Only rank and world_size must be set."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    job: tuple[str, ...] = ()


_TORCHRUN = _Variables(
    "torchrun",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)
_OPENMPI = _Variables(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    ("PMIX_NAMESPACE",),
)
_MVAPICH2 = _Variables(
    "mvapich2",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _Variables("hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# Not SLURM_NTASKS: in an interactive step, of one task, that is the job's number of tasks.
_SLURM = _Variables(
    "slurm",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "",
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
_ENVIRONMENT = _Variables("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def read_environment(environ: Mapping[str, str] | None = None) -> Launch | None:
    """Returns this process's rank, world size and so on, or None where no launcher started it.

    Launchers nest, and the variables of outer ones stay visible, so that the innermost is looked for first:

    1. torchrun, by TORCHELASTIC_RUN_ID: it runs inside srun, mpirun or a Kubernetes job, never around them. Inside
       mpirun with several ranks, torchrun must span several nodes.
    2. Open MPI, by OMPI_COMM_WORLD_*; MVAPICH2, by MV2_COMM_WORLD_*; MPICH and Intel MPI, by PMI_RANK. In a Slurm
       allocation their ranks inherit SLURM_PROCID from MPI's daemons. PMI_RANK without MPI_LOCALRANKID in a Slurm step
       is srun --mpi=pmi2.
    3. srun, by SLURM_STEP_ID and SLURM_PROCID. A batch script, which is no task, has only SLURM_PROCID.
    4. RANK and WORLD_SIZE, which a PyTorchJob or a user's script sets.

    In 2 and 3 RANK and WORLD_SIZE may also be set, to the same numbers.

    MASTER_ADDR and MASTER_PORT are used where set. In a Slurm step without them, rank 0 is on the first node of the
    step's list, and the port is computed from the numbers of job and step.

    Args:
        environ: the environment variables; os.environ if None.

    Raises:
        LaunchError: variables that are incomplete, not numbers, out of range or contradictory.

    >>> launch = read_environment({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"})
    >>> launch.launcher, launch.rank, launch.world_size, launch.local_rank
    ('environment', 3, 4, None)
    >>> read_environment({}) is None
    True
    """
    environ = os.environ if environ is None else environ
    variables = _innermost_launcher(environ)
    if variables is None:
        return None
    if variables is _TORCHRUN:
        _refuse_torchrun_in_mpi_rank(environ)
    if variables is _SLURM and not environ.get(variables.world_size):
        variables = variables._replace(world_size="SLURM_NTASKS")
    rank, world_size = _rank_and_world_size(environ, variables)
    if variables.launcher not in ("torchrun", "environment"):
        _check_agreement(environ, variables, rank, world_size)
    local_rank = _int_variable(environ, variables.local_rank)
    local_world_size = _int_variable(environ, variables.local_world_size)
    addr, port = environ.get("MASTER_ADDR") or None, _int_variable(environ, "MASTER_PORT")
    if variables.launcher == "slurm":
        local_world_size = _tasks_on_this_node(environ)
        addr = addr or (_LOOPBACK if local_world_size == world_size else _first_node(environ))
        port = port or _slurm_port(environ)
    if addr is not None and len(addr.split()) != 1:
        raise LaunchError(f"expected MASTER_ADDR to be a host's name or address; got {addr!r}: set one, or unset it")
    if port is not None and not 0 < port < 2**16:
        raise LaunchError(f"expected MASTER_PORT from 1 to 65535; got {port}: set another, the same on every rank")
    _check_local(variables, rank, world_size, local_rank, local_world_size)
    return Launch(
        variables.launcher,
        rank,
        world_size,
        local_rank,
        local_world_size,
        addr,
        port,
        job=".".join(filter(None, (environ.get(name) for name in variables.job))),
        source=f"{variables.rank} and {variables.world_size}",
    )


def under_launcher() -> bool:
    """Returns whether a launcher (torchrun, mpirun, srun or another) started this process as a rank.

    A Slurm step of one task does not count: it may be an interactive shell, whose commands are no ranks.

    Raises:
        LaunchError: see read_environment.
    """
    launch = read_environment()
    return launch is not None and (launch.launcher != "slurm" or launch.world_size > 1)


def _innermost_launcher(environ: Mapping[str, str]) -> _Variables | None:
    """Returns the variables of the launcher that started this process. See read_environment for the order."""
    return _TORCHRUN if "TORCHELASTIC_RUN_ID" in environ else _launcher_around_torchrun(environ)


def _launcher_around_torchrun(environ: Mapping[str, str]) -> _Variables | None:
    """Returns the variables of the innermost launcher other than torchrun."""
    slurm_task = "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ
    for variables in (_OPENMPI, _MVAPICH2):
        if variables.rank in environ or variables.world_size in environ:
            return variables
    if "PMI_RANK" in environ and ("MPI_LOCALRANKID" in environ or not slurm_task):
        return _HYDRA
    if slurm_task:
        return _SLURM
    return _ENVIRONMENT if "RANK" in environ or "WORLD_SIZE" in environ else None


def _refuse_torchrun_in_mpi_rank(environ: Mapping[str, str]) -> None:
    """Refuses a one-node torchrun inside one of several MPI ranks: each rank would start a world of its own.

    srun is not checked: its tasks may be independent jobs. A torchrun over several nodes is one world, with one agent
    per MPI rank.
    """
    around = _launcher_around_torchrun(environ)
    if around is None or around.launcher not in MPI_LAUNCHERS or _int_variable(environ, "GROUP_WORLD_SIZE") != 1:
        return
    ranks = _int_variable(environ, around.world_size) or 1
    if ranks > 1:
        raise LaunchError(
            f"expected one world; got a torchrun of one node (GROUP_WORLD_SIZE=1) in one of {ranks} ranks of MPI "
            f"({around.world_size}), with a world of its own: start the script with mpirun alone, or with torchrun "
            "alone, or give each node's torchrun --nnodes and the address of the first; where many worlds are meant, "
            f"start each torchrun without {around.rank} and {around.world_size} (env -u)"
        )


def _rank_and_world_size(environ: Mapping[str, str], variables: _Variables) -> tuple[int, int]:
    """Returns rank and world size; both must be set."""
    names = (variables.rank, variables.world_size)
    rank, world_size = (_int_variable(environ, name) for name in names)
    if rank is None or world_size is None:
        values = {name: environ[name].strip() for name in names if name in environ}
        got = [f"{name}={values[name]!r}" if values.get(name) else f"an empty {name}" for name in values]
        got += [f"no {name}" for name in names if name not in values]
        raise LaunchError(
            f"expected {' and '.join(names)}, both or neither; got {' and '.join(got)}: set both, or start the ranks "
            f"with a launcher, such as torchrun, or unset {' and '.join(values)} to run one process"
        )
    if rank >= world_size:
        raise LaunchError(
            f"expected {variables.rank} below {variables.world_size}; got {rank} of {world_size}: ranks count from 0, "
            "and a world has 1 at least"
        )
    return rank, world_size


def _int_variable(environ: Mapping[str, str], name: str) -> int | None:
    """Returns the variable's value, or None where it is unset or empty."""
    value = environ.get(name, "").strip()
    if value and not (value.isdecimal() and len(value) < _TOO_MANY_DIGITS):
        shown = value if len(value) < _TOO_MANY_DIGITS else f"{value[:_TOO_MANY_DIGITS]}..."
        raise LaunchError(f"expected {name} to be a whole number; got {shown!r}: set a number, or unset it")
    return int(value) if value else None


def _check_agreement(environ: Mapping[str, str], variables: _Variables, rank: int, world_size: int) -> None:
    """Refuses a stale RANK or WORLD_SIZE that contradicts the launcher's own variables."""
    given = {name: _int_variable(environ, name) for name in ("RANK", "WORLD_SIZE")}
    expected = {"RANK": rank, "WORLD_SIZE": world_size}
    wrong = [f"{name}={value}" for name, value in given.items() if value not in (None, expected[name])]
    if wrong:
        raise LaunchError(
            f"expected RANK and WORLD_SIZE to be unset or those of the launcher, {variables.rank}={rank} of "
            f"{variables.world_size}={world_size}; got {' and '.join(wrong)}: unset RANK and WORLD_SIZE; "
            "where each process of an outer launcher starts several ranks, start them with torchrun"
        )


def _check_local(
    variables: _Variables, rank: int, world_size: int, local_rank: int | None, local_world_size: int | None
) -> None:
    prefix = rank_prefix(rank, world_size)
    if local_world_size is not None and not (local_rank or 0) < local_world_size <= world_size:
        raise LaunchError(
            f"{prefix}expected {variables.local_rank} below the number of ranks on this node, and that to be at most "
            f"{world_size}; got {local_rank} of {local_world_size}: unset what the launcher did not set"
        )
    if local_rank is not None and local_rank >= world_size:
        raise LaunchError(
            f"{prefix}expected {variables.local_rank} below {variables.world_size}; got {local_rank} of {world_size}: "
            "unset what the launcher did not set"
        )


def _tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """Returns the number of the Slurm step's tasks on this node: with "2(x2),3", 3 on node 2."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _int_variable(environ, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


def _first_node(environ: Mapping[str, str]) -> str | None:
    """Returns the first host in the Slurm step's list: gpu007 in "gpu[007-009,12],cpu1"."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first and first.group() else None


def _slurm_port(environ: Mapping[str, str]) -> int | None:
    """Returns a port, the same on every rank, that differs between steps of a job and between recent jobs."""
    job, step = _int_variable(environ, "SLURM_JOB_ID"), _int_variable(environ, "SLURM_STEP_ID")
    if job is None or step is None:
        return None
    return _FIRST_PORT + (job * _STEPS_PER_JOB + step % _STEPS_PER_JOB) % _PORTS
