"""Groups of a world's ranks by what they are to be: "own", "node", or a number of ranks.

They are made once a process, and only layers send over them. Messages of one group run one after the other: those of
layers would wait behind the gradients that DistributedDataParallel sends over the default group, and mix with them
where the order of the two differs between ranks.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeGuard

from ..environment import rank_prefix

_NAMES = ("own", "node")


def is_own(group: Any) -> TypeGuard[str | int]:
    """Whether a `process_group` argument is such a name, or a number of ranks."""
    if isinstance(group, int):
        return group > 0 and not isinstance(group, bool)
    return isinstance(group, str) and group in _NAMES


def named(name: str) -> str | int | None:
    """Returns what has that name in a graph, str(group), or None where no such group has it."""
    if name.isdecimal():
        return int(name)
    return name if name in _NAMES else None


def host() -> str:
    """Returns what tells this host from others: "node" groups ranks that have it in common."""
    return socket.gethostname()


def parts(
    group: str | int, rank: int, world_size: int, gather_hosts: Callable[[], list[str]]
) -> tuple[tuple[int, ...], ...]:
    """Returns the ranks of each group, the same on all ranks: by host in the order of their first ranks, else in order.

    Args:
        group: is_own.
        rank, world_size: this process's rank, and the number of ranks, of the world that is divided.
        gather_hosts: returns host() of each rank. All ranks call it, for "node".

    Raises:
        ValueError: a number of ranks that does not divide world_size. It is raised on every rank.
    """
    if group == "node":
        ranks_by_host: dict[str, list[int]] = {}
        for other, its_host in enumerate(gather_hosts()):
            ranks_by_host.setdefault(its_host, []).append(other)
        return tuple(map(tuple, ranks_by_host.values()))
    size = world_size if group == "own" else int(group)
    if world_size % size:
        raise ValueError(
            f"{rank_prefix(rank, world_size)}expected a number of ranks in each group that divides that of all, "
            f"{world_size}; got {size}: choose another, or make groups of different sizes with "
            "torch.distributed.new_group or MPI's Split"
        )
    return tuple(tuple(range(first, first + size)) for first in range(0, world_size, size))
