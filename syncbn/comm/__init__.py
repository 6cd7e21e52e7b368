"""The messages of batch normalisation: one collective, behind one protocol.

| module | what it sends over                                           |
|--------|--------------------------------------------------------------|
| local  | nothing: a world of one                                      |
| torch  | any torch.distributed ProcessGroup                           |
| mpi    | an MPI communicator of mpi4py's                              |
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from .local import LocalCommunicator as LocalCommunicator


@runtime_checkable
class Communicator(Protocol):
    """Ranks that normalise together. An object of one's own with these members serves as `process_group`.

    Attributes:
        rank: this process's number in the group, from 0.
        world_size: the number of ranks in the group.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, buffer: Any) -> None:
        """Replaces buffer by its sum over all ranks, in place, with the same bits on every rank.

        Args:
            buffer: contiguous, one-dimensional, float64, of the same length on every rank: a torch tensor on the
                input's device from the torch layers, an ndarray from the NumPy layer. What is returned is ignored.

        Collective:
            every rank must call, in the same order.
        """


def as_communicator(group: Any) -> Communicator:
    """Returns the communicator that a `process_group` argument stands for.

    Args:
        group: None (torch.distributed's default group where it is initialised, else this process alone), a
            ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator, or a Communicator.

    Raises:
        TypeError: anything else.
        ValueError: a group this process is not in, a mesh of more than one dimension, or an intercommunicator.
        RuntimeError: an MPI world that is smaller than the launcher says.
    """
    for communicator_of in _loaded():
        communicator = communicator_of(group)
        if communicator is not None:
            return communicator
    if group is None:
        return LocalCommunicator()
    if isinstance(group, Communicator) and not isinstance(group, type):
        return group
    raise TypeError(
        "expected process_group to be None, a ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator or a "
        f"Communicator; got {type(group).__name__}: see syncbn.comm.Communicator for what one of your own must have"
    )


# By the library whose groups they know: functions that return the communicator of a group, or None.
_LIBRARIES = {"torch.distributed": "torch", "mpi4py.MPI": "mpi"}
_functions: dict[str, Callable[[Any], Communicator | None]] = {}


def _loaded() -> Iterable[Callable[[Any], Communicator | None]]:
    """Returns the functions for the libraries that have been imported; of others there can be no groups."""
    if len(_functions) < len(_LIBRARIES):
        for library, module in _LIBRARIES.items():
            loaded = sys.modules.get(library)
            if library in _functions or loaded is None or not getattr(loaded, "is_available", lambda: True)():
                continue
            _functions[library] = importlib.import_module(f".{module}", __name__).communicator_of
    return _functions.values()
