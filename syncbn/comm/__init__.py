"""The messages of batch normalisation: one collective, behind one protocol.

| module        | what it sends over                                      |
|---------------|---------------------------------------------------------|
| local         | nothing: a world of one                                 |
| torch         | any torch.distributed ProcessGroup                      |
| shared_memory | memory that the ranks of a Gloo group on one host share |
| mpi           | an mpi4py communicator                                  |
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from .local import LocalCommunicator as LocalCommunicator


@runtime_checkable
class Communicator(Protocol):
    """Ranks that normalise together. Any object with these members can be passed as `process_group`.

    Attributes:
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, buffer: Any) -> None:
        """Replaces buffer by its sum over all ranks, in place, with the same bits on every rank.

        Args:
            buffer: contiguous, one-dimensional, float64, of the same length on every rank. The torch layers pass a
                tensor on the input's device, the NumPy layer an ndarray. The return value is ignored.

        Collective:
            every rank must call, in the same order.
        """


def as_communicator(group: Any, argument: str = "process_group") -> Communicator:
    """Returns the communicator for a `process_group` argument.

    Args:
        group: None (torch.distributed's default group if initialised, else this process alone), a ProcessGroup, a
            one-dimensional DeviceMesh, an mpi4py communicator, or a Communicator.
        argument: the argument's name, for the error message.

    Raises:
        TypeError: any other group.
        ValueError: a group that this process is not in, a mesh of more than one dimension, or an intercommunicator.
        LaunchError: an MPI world of one process where a launcher started several.
        RuntimeError: MPI is not initialised.
    """
    for communicator_of in _communicator_functions():
        communicator = communicator_of(group)
        if communicator is not None:
            return communicator
    if group is None:
        return LocalCommunicator()
    if isinstance(group, Communicator) and not isinstance(group, type):
        return group
    raise TypeError(
        f"expected {argument} to be None, a ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator or a "
        f"Communicator; got {type(group).__name__}: see syncbn.comm.Communicator for what one of your own must have"
    )


class GroupHandle:
    """Holds a layer's group. Copies share the group; pickles drop it, for it holds open connections.

    Args:
        group: any argument of as_communicator; as_communicator checks it at the first use.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._communicator: Communicator | None = None

    def communicator(self, argument: str = "process_group") -> Communicator:
        """Returns as_communicator(group, argument), cached unless the group is None."""
        if self.group is None:
            return as_communicator(None)
        if self._communicator is None:
            self._communicator = as_communicator(self.group, argument)
        return self._communicator

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupHandle, (None if self.group is None else _UnpickledGroup(),)


class _UnpickledGroup:
    """Replaces the group of an unpickled layer, and raises: the default group may be the wrong one."""

    rank = 0
    world_size = 1

    def all_reduce(self, _: Any) -> None:
        raise RuntimeError(
            "expected a process group; got a layer that was pickled with one, which no pickle can hold: set "
            "layer.process_group (None for the default group; of a NumPy layer, layer.comm) before training it"
        )


# Libraries with groups, the cheapest to ask first, and the module here whose communicator_of(group) returns a
# communicator, or None for a group of another library.
_LIBRARIES = {"mpi4py.MPI": "mpi", "torch.distributed": "torch"}
_functions: dict[str, Callable[[Any], Communicator | None]] = {}


def _communicator_functions() -> Iterable[Callable[[Any], Communicator | None]]:
    """Returns communicator_of for each library imported so far; groups of other libraries cannot exist."""
    global _functions
    if len(_functions) < len(_LIBRARIES):
        for library, module in _LIBRARIES.items():
            loaded = sys.modules.get(library)
            if library in _functions or loaded is None or not getattr(loaded, "is_available", lambda: True)():
                continue
            found = _functions | {library: importlib.import_module(f".{module}", __name__).communicator_of}
            _functions = {name: found[name] for name in _LIBRARIES if name in found}  # atomic, for threads
    return _functions.values()
