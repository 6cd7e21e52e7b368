"""A communicator that lets an observer run what a layer sends and computes, to tell how long that takes.

It stands in place of another one only while somebody observes: see syncbn.profile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .labels import Label

if TYPE_CHECKING:
    from . import Communicator


class Observer(Protocol):
    """Runs a layer's messages and kernels.

    Attributes:
        is_open: whether it still observes.
    """

    @property
    def is_open(self) -> bool: ...

    def run(self, direction: str, is_message: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns function(*arguments), of which the first is a tensor: the message, or the kernels' input."""


class ObservedCommunicator:
    """The same ranks; kernels that work for it must be given by observed_kernels.

    Args:
        comm: the communicator; its all_reduce takes a label.
        observer: runs its messages, and the kernels.
    """

    def __init__(self, comm: Communicator, observer: Observer) -> None:
        self.comm, self.observer = comm, observer
        self.rank, self.world_size = comm.rank, comm.world_size
        self._direction = "derivatives"  # of the last kernel, for messages without a label: those of graphs
        self._kernels: dict[Any, _ObservedKernels] = {}

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:
        """Sums as comm does. In a world of one there is no message to observe."""
        if self.world_size == 1:
            return
        direction = self._direction if label is None else label.direction
        self.observer.run(direction, True, self._send, buffer, label)

    def _send(self, buffer: Any, label: Label | None) -> None:
        self.comm.all_reduce(buffer, label=label)

    def run(self, direction: str, kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Returns kernel(*arguments), observed."""
        self._direction = direction
        return self.observer.run(direction, False, kernel, *arguments)

    def observed(self, kernels: Any) -> Any:
        """Returns kernels that the observer runs."""
        found = self._kernels.get(kernels)
        if found is None:
            found = self._kernels[kernels] = _ObservedKernels(kernels, self)
        return found


class _ObservedKernels:
    """Kernels that an ObservedCommunicator's observer runs."""

    def __init__(self, kernels: Any, comm: ObservedCommunicator) -> None:
        self._kernels, self._comm = kernels, comm

    def __getattr__(self, name: str) -> Any:
        kernel, run = getattr(self._kernels, name), self._comm.run
        direction = "backward" if name.startswith("backward") else "forward"

        def observed(*arguments: Any, **options: Any) -> Any:
            return run(direction, partial(kernel, **options) if options else kernel, *arguments)

        setattr(self, name, observed)  # found at once next time
        return observed


def observed_kernels(kernels: Any, comm: Any) -> Any:
    """Returns kernels, which comm's observer, if it has one, runs."""
    return comm.observed(kernels) if type(comm) is ObservedCommunicator else kernels


# Those of what graphs send, by the group's name in a graph; the last one observes.
_of_graphs: dict[str, list[Observer]] = {}


def observe_graphs(name: str, observer: Observer) -> None:
    """Lets an observer run the messages and kernels of graphs over the group of that name."""
    _of_graphs.setdefault(name, []).append(observer)


def forget_graphs(name: str, observer: Observer) -> None:
    """Undoes observe_graphs."""
    observers = [other for other in _of_graphs.pop(name) if other is not observer]
    if observers:
        _of_graphs[name] = observers


def observed_in_graphs(name: str, comm: Communicator) -> Communicator:
    """Returns comm, the group of that name, with the observer that it has in graphs."""
    observers = _of_graphs.get(name) if _of_graphs else None
    return ObservedCommunicator(comm, observers[-1]) if observers else comm
