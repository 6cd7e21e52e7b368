"""The messages of batch normalisation: one collective, behind one protocol.

| module        | what it sends over                                      |
|---------------|---------------------------------------------------------|
| local         | nothing: a world of one                                 |
| torch         | any torch.distributed ProcessGroup                      |
| own           | groups that only layers use, of all ranks, by host or k |
| shared_memory | memory that the ranks of a Gloo group on one host share |
| mpi           | an mpi4py communicator                                  |
| observed      | what another one does, timed                            |
| checked       | what another one does, compared between ranks before    |

What messages say of themselves: labels, and how ranks compare that where memory is not shared: agreement. Sums that
take too long: stalls, and how ranks ask each other where they are: asking.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

from .checked import IS_ALWAYS_CHECKED, checked, checked_in_graphs
from .labels import AGREEMENT as AGREEMENT
from .labels import Label as Label
from .labels import Labels as Labels
from .labels import counted as counted
from .labels import know as know
from .labels import taking_labels
from .local import LocalCommunicator as LocalCommunicator
from .observed import ObservedCommunicator as ObservedCommunicator
from .observed import Observer, observed_in_graphs
from .observed import observed_kernels as observed_kernels
from .own import is_own, named


@runtime_checkable
class Communicator(Protocol):
    """Ranks that normalise together. Any object with these members can be passed as `process_group`.

    Its all_reduce may lack `label`: a label is passed only to one that has a parameter of that name.

    Attributes:
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:
        """Replaces buffer by its sum over all ranks, in place, with the same bits on every rank.

        Args:
            buffer: contiguous, one-dimensional, float64, of the same length on every rank. The torch layers pass a
                tensor on the input's device, the NumPy layer an ndarray. The return value is ignored.
            label: which layer's message this is, for reports, or None.

        Collective:
            every rank must call, in the same order.
        """


def as_communicator(group: Any, argument: str = "process_group") -> Communicator:
    """Returns the communicator for a `process_group` argument.

    Args:
        group: None (torch.distributed's default group if initialised, else this process alone), a ProcessGroup, a
            one-dimensional DeviceMesh, an mpi4py communicator, a Communicator, or for a group that only layers send
            over "own" (all ranks), "node" (those of this rank's host), or a number k (k consecutive ranks).
        argument: the argument's name, for the error message.

    Collective:
        at the first call for each of the last three: all ranks must call, in the same order, for it makes the groups.
        Building or converting the model on all ranks does. They are of torch.distributed's default group; while that
        is not initialised of MPI.COMM_WORLD, if mpi4py.MPI is loaded; else this process alone.

    Raises:
        TypeError: any other group.
        ValueError: a group that this process is not in, a mesh of more than one dimension, an intercommunicator, or a
            number that is not at least 1 or does not divide the number of ranks.
        LaunchError: an MPI world of one process where a launcher started several.
        RuntimeError: MPI is not initialised.
    """
    comm = _as_communicator(group, argument)
    return checked(comm) if IS_ALWAYS_CHECKED else comm


def _as_communicator(group: Any, argument: str) -> Communicator:
    for communicator_of in _communicator_functions():
        communicator = communicator_of(group)
        if communicator is not None:
            return communicator
    if is_own(group):  # nothing is initialised
        return _as_communicator(None, argument)
    if group is None:
        return LocalCommunicator()
    if isinstance(group, int) and not isinstance(group, bool):
        raise ValueError(
            f"expected {argument}, where it is a number of ranks, to be at least 1; got {group}: choose one that "
            "divides the number of all ranks"
        )
    if isinstance(group, Communicator) and not isinstance(group, type):
        return group
    raise TypeError(
        f"expected {argument} to be None, a ProcessGroup, a one-dimensional DeviceMesh, an mpi4py communicator, a "
        f'Communicator, "own", "node", or a number of ranks; got {_kind(group)}: see syncbn.comm.Communicator for what '
        "one of your own must have"
    )


def _kind(group: Any) -> str:
    return repr(group) if isinstance(group, str) else type(group).__name__


def direct_sums_of(comm: Communicator) -> Any:
    """Returns what sums CPU tensors of a communicator from within C++: SharedMemory, or the MPICommunicator; or None.

    Collective:
        at the first sum of a group, as all_reduce.
    """
    direct_sums = getattr(comm, "direct_sums", None)
    return None if direct_sums is None else direct_sums()


class Group(Protocol):
    """A group, by object and by name.

    Attributes:
        name: what stands for it in a graph, where there can be no objects; see communicator_named.
        labels: of the layer's messages, or None for none.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Labels | None: ...

    def communicator(self) -> Communicator:
        """Returns its communicator; see as_communicator for the errors."""


class GroupHandle:
    """Holds a layer's group. Copies share it; pickles keep names and numbers, and drop what holds open connections.

    Args:
        group: any argument of as_communicator; as_communicator checks it at the first use.
        layer: the layer's name, for labels.

    Attributes:
        name: stands for the group in a graph, which cannot hold objects; see communicator_named.
        labels: of the layer's messages. Not for graphs: equal layers have equal ones.
    """

    def __init__(self, group: Any, layer: str = "") -> None:
        self.group = group
        self.labels = Labels.of(layer)
        self._original: GroupHandle | None = None  # the handle in whose place this one stands
        self._communicator: Communicator | None = None
        self._is_lasting = group is None or is_own(group)  # it outlives the process, and depends on what is initialised
        if self._is_lasting:
            self.name = "" if group is None else str(group)
        else:
            self.name = f"group-{next(_numbers)}"
            _handles[self.name] = self

    def communicator(self, argument: str = "process_group") -> Communicator:
        """Returns as_communicator(group, argument), cached unless the group depends on what is initialised."""
        if self._communicator is not None:
            return self._communicator
        if self._is_lasting:
            of_torch = _functions.get("torch.distributed")  # the shortest way, for every call of a layer comes here
            found = None if of_torch is None or IS_ALWAYS_CHECKED else of_torch(self.group)
            return found or as_communicator(self.group, argument)
        self._communicator = taking_labels(as_communicator(self.group, argument))
        return self._communicator

    @property
    def key(self) -> Any:
        """What tells whether two handles are of one group."""
        return self.name if self._is_lasting else id(self.group)

    @property
    def observer(self) -> Observer | None:
        """The observer of the communicator, or None."""
        comm = self._communicator
        return comm.observer if type(comm) is ObservedCommunicator else None

    def observed(self, observer: Observer, layer: str) -> GroupHandle:
        """Returns one of the same group and name, of which an observer sees what is sent and computed.

        Graphs go on to use this one, and so do copies and pickles. The group is the one that there is now.
        """
        return self._standing(ObservedCommunicator(self._unobserved(), observer), layer)

    def checked(self) -> GroupHandle:
        """Returns one of the same group and name, which checks what is sent, and counts calls from 0. See observed."""
        comm, observer = checked(self._unobserved()), self.observer
        layer = self.labels.forward.layer
        return self._standing(comm if observer is None else ObservedCommunicator(comm, observer), layer)

    def _unobserved(self) -> Communicator:
        comm = self.communicator()  # observed in a layer that was copied within an earlier profile
        return comm.comm if type(comm) is ObservedCommunicator else comm

    def _standing(self, comm: Communicator, layer: str) -> GroupHandle:
        handle = GroupHandle.__new__(GroupHandle)  # of the same class, name and attributes, so that graphs stay valid
        original = self._original or self
        handle.__dict__.update(self.__dict__, _original=original, _communicator=comm, labels=Labels.of(layer))
        return handle

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self._original or self

    def __reduce__(self) -> tuple[Any, ...]:
        name = (self._original or self).labels.forward.layer
        return GroupHandle, (self.group if self._is_lasting else _UnpickledGroup(), name)


_numbers = itertools.count()
_DEFAULT = GroupHandle(None)
_handles: WeakValueDictionary[str, GroupHandle] = WeakValueDictionary()
LOCAL = "local"


def named_group(group: Any) -> str:
    """Returns a name for a `process_group` argument that communicator_named resolves, for a graph."""
    if group is None or is_own(group):
        return "" if group is None else str(group)
    if isinstance(group, LocalCommunicator):
        return LOCAL
    if hasattr(group, "group_name"):  # a ProcessGroup
        return f"pg:{group.group_name}"
    handle = next((handle for handle in _kept if handle.group is group), None)
    if handle is None:
        handle = GroupHandle(group)
        _kept.append(handle)
    return handle.name


_kept: list[GroupHandle] = []  # of graphs that have no layer which keeps the group


def communicator_named(name: str) -> Communicator:
    """Returns the communicator that a name in a graph stands for.

    Args:
        name: "" for the default group at the time of the call, LOCAL for this process alone, a GroupHandle's name,
            the name or number of an own group, or "pg:" and the name that torch.distributed gave a ProcessGroup.

    Raises:
        RuntimeError: the group is gone: the last layer that had it, or torch.distributed's group, was deleted.
    """
    return observed_in_graphs(name, checked_in_graphs(name, _communicator_named(name)))


def _communicator_named(name: str) -> Communicator:
    if not name:
        return _DEFAULT.communicator()
    if name == LOCAL:
        return LocalCommunicator()
    if name.startswith("pg:"):
        return as_communicator(_named_by_torch(name))
    if (own := named(name)) is not None:
        return as_communicator(own)
    handle = _handles.get(name)
    if handle is None:
        raise RuntimeError(
            f"expected the process group {name!r} that a graph was traced with; got none, for the layers that had it "
            "are gone: keep the model that was compiled or exported, or trace it again"
        )
    return handle.communicator()


def _named_by_torch(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    try:
        return _resolve_process_group(name.removeprefix("pg:"))  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"expected the process group {name!r} that a graph was traced with; got none, for torch.distributed has "
            "destroyed it: trace again with a group that is there"
        ) from error


class _UnpickledGroup:
    """Replaces the group of an unpickled layer, and raises: the default group may be the wrong one."""

    rank = 0
    world_size = 1

    def all_reduce(self, _: Any, label: Label | None = None) -> None:  # noqa: ARG002
        raise RuntimeError(
            "expected a process group; got a layer that was pickled with one, which no pickle can hold: set "
            "layer.process_group (None for the default group; of a NumPy layer, layer.comm) before training it"
        )


# Libraries with groups, and the module here whose communicator_of(group) returns a communicator, or None for a group
# of another library. Names are of the first one's ranks that is initialised.
_LIBRARIES = {"torch.distributed": "torch", "mpi4py.MPI": "mpi"}
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
