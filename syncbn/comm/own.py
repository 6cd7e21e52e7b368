"""Process groups of torch.distributed that only layers send over: "own", of all ranks, or "own:8", of 8 ranks each.

Messages of one group run one after the other. Those of layers wait behind the gradients that DistributedDataParallel
sends over the default group, and mix with them where the order of the two differs between ranks. Over a group of their
own they do neither.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

_NAME = re.compile(r"own(?::([1-9]\d*))?")
# For each default group, and each number of ranks, the group that this process is in.
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


def is_own(group: Any) -> bool:
    """Whether a `process_group` argument is such a name."""
    return isinstance(group, str) and _NAME.fullmatch(group) is not None


def own_group(name: str, world: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns the group that "own" or "own:SIZE" stands for, or None for the default group `world` of None.

    Collective:
        at the first call for a size in a default group: all its ranks must make it, in one order of sizes, for it makes
        the groups. Building or converting the model on all ranks does.

    Raises:
        ValueError: a size that does not divide the number of ranks.
    """
    match = _NAME.fullmatch(name)
    assert match
    if world is None:
        return None
    size = int(match[1] or world.size())
    if world.size() % size:
        raise ValueError(
            f'expected SIZE in "own:SIZE" to divide the number of ranks, {world.size()}; got {size}: choose another, '
            "or make groups of different sizes with torch.distributed.new_group"
        )
    made = _groups.setdefault(world, {})
    if size not in made:
        for first in range(0, world.size(), size):
            group: Any = dist.new_group(list(range(first, first + size)), timeout=_timeout(world), group_desc="syncbn")
            if first <= world.rank() < first + size:
                made[size] = group
    return made[size]


def _timeout(world: Any) -> timedelta | None:
    """Returns the default group's timeout, or None for torch's own where its backend tells none."""
    for device in getattr(world, "_device_types", ()):
        backend = world._get_backend(device)
        options = getattr(getattr(backend, "wrapped_pg", backend), "options", None)  # of TORCH_DISTRIBUTED_DEBUG=DETAIL
        timeout: timedelta | None = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None
