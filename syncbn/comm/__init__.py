"""The messages of batch normalisation: one collective, behind one protocol.

| module | what it sends over                                           |
|--------|--------------------------------------------------------------|
| local  | nothing: a world of one                                      |
| torch  | any torch.distributed ProcessGroup                           |
"""

from __future__ import annotations

import sys
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
            ProcessGroup, a one-dimensional DeviceMesh, or a Communicator.

    Raises:
        TypeError: anything else.
        ValueError: a group this process is not in, or a mesh of more than one dimension.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available():
        from .torch import communicator_of

        communicator = communicator_of(group)
        if communicator is not None:
            return communicator
    elif group is None:
        return LocalCommunicator()
    if isinstance(group, Communicator) and not isinstance(group, type):
        return group
    raise TypeError(
        "expected process_group to be None, a ProcessGroup, a one-dimensional DeviceMesh or a Communicator; got "
        f"{type(group).__name__}: see syncbn.comm.Communicator for what an object of your own must have"
    )
