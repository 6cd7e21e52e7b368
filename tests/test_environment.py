"""`syncbn.world.read_environment`: every launcher's variables are read right, and what cannot be is refused."""

import subprocess
import sys

import pytest

from syncbn.world import LaunchError, read_environment

SLURM_STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_JOB_NODELIST": "n[0-1]",
}
SLURM_BATCH = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
SLURM_PORT = 20000 + 1234 * 16 % 12768
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job7",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
}
ONE_NODE = {"GROUP_WORLD_SIZE": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-node0-99@1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "PMI_FD": "9"}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}

# name: (environment, launcher, rank, world_size, local_rank, local_world_size, master_addr, master_port, job)
ENVIRONMENTS = {
    "torchrun, one node": (
        TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"},
        ("torchrun", 1, 4, 1, 4, "localhost", 29400, "job7.1"),
    ),
    "torchrun, two nodes": (TORCHRUN, ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1")),
    "torchrun in srun": (
        SLURM_STEP | {"SLURM_PROCID": "0"} | TORCHRUN,
        ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1"),
    ),
    "torchrun in mpirun": (OPENMPI | TORCHRUN, ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1")),
    "torchrun on each node, in mpirun": (
        OPENMPI | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"} | TORCHRUN | {"GROUP_WORLD_SIZE": "2"},
        ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1"),
    ),
    "torchrun in mpirun of one rank": (
        OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"} | TORCHRUN | ONE_NODE,
        ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1"),
    ),
    "torchrun in each task of srun --mpi=pmi2, which may be jobs of their own": (
        SLURM_STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "9"} | TORCHRUN | ONE_NODE,
        ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1"),
    ),
    "torchrun in a PyTorchJob's pod": (PLAIN | TORCHRUN, ("torchrun", 5, 8, 1, 4, "node0", 29400, "job7.1")),
    "Open MPI, one node": (
        OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        ("openmpi", 3, 4, 3, 4, None, None, "prterun-node0-99@1"),
    ),
    "Open MPI, two nodes": (OPENMPI, ("openmpi", 3, 4, 1, 2, None, None, "prterun-node0-99@1")),
    "Open MPI, address given": (
        OPENMPI | {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"},
        ("openmpi", 3, 4, 1, 2, "node0", 29501, "prterun-node0-99@1"),
    ),
    "Open MPI in sbatch, first node": (
        SLURM_BATCH | OPENMPI,
        ("openmpi", 3, 4, 1, 2, None, None, "prterun-node0-99@1"),
    ),
    "Open MPI in sbatch, second node": (
        SLURM_STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"} | OPENMPI,
        ("openmpi", 3, 4, 1, 2, None, None, "prterun-node0-99@1"),
    ),
    "Open MPI with RANK set to the same": (
        OPENMPI | {"RANK": "3", "WORLD_SIZE": "4"},
        ("openmpi", 3, 4, 1, 2, None, None, "prterun-node0-99@1"),
    ),
    "MPICH": (MPICH, ("hydra", 2, 3, 0, 1, None, None, "")),
    "MPICH without local ranks": ({"PMI_RANK": "2", "PMI_SIZE": "3"}, ("hydra", 2, 3, None, None, None, None, "")),
    "MPICH in sbatch": (
        SLURM_STEP | {"SLURM_PROCID": "1"} | MPICH,
        ("hydra", 2, 3, 0, 1, None, None, ""),
    ),
    "Intel MPI": (MPICH | {"I_MPI_HYDRA_TOPOLIB": "hwloc"}, ("hydra", 2, 3, 0, 1, None, None, "")),
    "MVAPICH2": (MVAPICH2, ("mvapich2", 1, 2, 1, 2, None, None, "")),
    "srun, two nodes": (SLURM_STEP, ("slurm", 3, 4, 1, 2, "n0", SLURM_PORT, "1234.0")),
    "srun, one node": (
        SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"},
        ("slurm", 3, 4, 3, 4, "127.0.0.1", SLURM_PORT, "1234.0"),
    ),
    "srun, address given": (
        SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        ("slurm", 3, 4, 1, 2, "10.0.0.1", 29500, "1234.0"),
    ),
    "srun, second step of the job": (
        SLURM_STEP | {"SLURM_STEP_ID": "1"},
        ("slurm", 3, 4, 1, 2, "n0", SLURM_PORT + 1, "1234.1"),
    ),
    "srun --mpi=pmix": (
        SLURM_STEP | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1234.0"},
        ("slurm", 3, 4, 1, 2, "n0", SLURM_PORT, "1234.0"),
    ),
    "srun --mpi=pmi2": (
        SLURM_STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "9"},
        ("slurm", 3, 4, 1, 2, "n0", SLURM_PORT, "1234.0"),
    ),
    "srun with RANK set to the same": (
        SLURM_STEP | {"RANK": "3", "WORLD_SIZE": "4"},
        ("slurm", 3, 4, 1, 2, "n0", SLURM_PORT, "1234.0"),
    ),
    "a shell of srun in a larger job": (
        SLURM_STEP
        | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
        | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n0"},
        ("slurm", 0, 1, 0, 1, "127.0.0.1", SLURM_PORT, "1234.0"),
    ),
    "a batch script alone": (SLURM_BATCH, None),
    "ranks of a script's own in a batch script": (
        SLURM_BATCH | PLAIN,
        ("environment", 1, 2, None, None, "job-master-0", 23456, ""),
    ),
    "PyTorchJob": (PLAIN, ("environment", 1, 2, None, None, "job-master-0", 23456, "")),
    "no launcher": ({"PATH": "/bin", "LOCAL_RANK": "0"}, None),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_variables_of_every_launcher_are_read(name):
    environ, expected = ENVIRONMENTS[name]
    launch = read_environment(environ)
    fields = ("launcher", "rank", "world_size", "local_rank", "local_world_size", "master_addr", "master_port", "job")
    assert launch == expected or tuple(getattr(launch, field) for field in fields) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "expected RANK and WORLD_SIZE, both or neither; got RANK='0' and no WORLD_SIZE: set both, or"),
        ({"WORLD_SIZE": "4"}, "got WORLD_SIZE='4' and no RANK: set both, .* or unset WORLD_SIZE to run one process"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "got OMPI_COMM_WORLD_SIZE='4' and no OMPI_COMM_WORLD_RANK: "),
        ({"RANK": ""}, "got an empty RANK and no WORLD_SIZE: .* or unset RANK to run one process"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "got an empty RANK and WORLD_SIZE='4': .* or unset RANK and WORLD_SIZE to"),
        ({"RANK": "0", "WORLD_SIZE": " "}, "got RANK='0' and an empty WORLD_SIZE: "),
        (OPENMPI | TORCHRUN | ONE_NODE, r"torchrun of one node \(GROUP_.*\) in one of 4 ranks of MPI \(OMPI_COMM"),
        (MPICH | TORCHRUN | ONE_NODE, "expected one world; got .* in one of 3 .*without PMI_RANK and PMI_SIZE"),
        (MVAPICH2 | TORCHRUN | ONE_NODE, "in one of 2 ranks of MPI .*: start the script with mpirun alone, or with"),
        (SLURM_BATCH | OPENMPI | TORCHRUN | ONE_NODE, "in one of 4 ranks of MPI"),
        (PLAIN | {"RANK": "2"}, "expected RANK below WORLD_SIZE; got 2 of 2: ranks count from 0"),
        (PLAIN | {"RANK": "one"}, "expected RANK to be a whole number; got 'one'"),
        (PLAIN | {"RANK": "-1"}, "expected RANK to be a whole number; got '-1'"),
        (PLAIN | {"RANK": "9" * 5000}, "expected RANK to be a whole number; got '9999999999999999999...': set"),
        (PLAIN | {"MASTER_ADDR": "node 0"}, "expected MASTER_ADDR to be a host's name or address; got 'node 0'"),
        (PLAIN | {"MASTER_ADDR": " "}, "expected MASTER_ADDR to be a host's name or address; got ' '"),
        (PLAIN | {"LOCAL_RANK": "7"}, "expected LOCAL_RANK below WORLD_SIZE; got 7 of 2: unset"),
        (PLAIN | {"MASTER_PORT": "http"}, "expected MASTER_PORT to be a whole number; got 'http'"),
        (PLAIN | {"MASTER_PORT": "70000"}, "expected MASTER_PORT from 1 to 65535; got 70000"),
        (PLAIN | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "expected LOCAL_RANK below .*; got 2 of 2"),
        (PLAIN | {"LOCAL_WORLD_SIZE": "3"}, "that to be at most 2; got None of 3"),
        (OPENMPI | {"WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=4; got WORLD_SIZE=8: unset RANK and WORLD_SIZE"),
        (OPENMPI | {"RANK": "0"}, "got RANK=0: unset RANK"),
        (MPICH | {"RANK": "0", "WORLD_SIZE": "1"}, "got RANK=0 and WORLD_SIZE=1: unset"),
        (SLURM_STEP | PLAIN, "the launcher, SLURM_PROCID=3 of SLURM_STEP_NUM_TASKS=4; got RANK=1 and WORLD_SIZE=2"),
    ],
)
def test_variables_that_cannot_be_are_refused(environ, message):
    with pytest.raises(LaunchError, match=message):
        read_environment(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n[0-1]", "n0"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("login", "login"),
        ("a,b", "a"),
        ("r[1-2]n[3,5]-ib", "r1n3-ib"),
        ("n[3,5]", "n3"),
    ],
)
def test_rank_0_is_on_the_first_node_of_slurms_list(nodes, first):
    assert read_environment(SLURM_STEP | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


def test_reading_the_environment_loads_no_torch_and_no_mpi():
    code = "import sys, syncbn.world as w; w.read_environment(); sys.exit(bool({'torch', 'mpi4py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
