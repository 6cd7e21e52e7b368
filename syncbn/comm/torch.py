"""Communication over torch.distributed."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..environment import LaunchError, rank_prefix, read_environment
from .agreement import check, said
from .asking import StoreAsking
from .labels import Label
from .local import LocalCommunicator
from .own import host, is_own, parts
from .shared_memory import HANDSHAKE_BYTES, SharedMemory, join
from .stalls import Watched, watch
from .structures import Tag

if TYPE_CHECKING:
    from . import Communicator


# The shared memory, or None, of each group that has summed CPU tensors; freed with the group.
_shared_memories: WeakKeyDictionary[dist.ProcessGroup, SharedMemory | None] = WeakKeyDictionary()
_UNKNOWN: Any = object()
_joining = threading.RLock()
# Of each group that sums over Gloo its sums, and the lengths of messages that ranks have compared, the same on all.
_sums: WeakKeyDictionary[dist.ProcessGroup, tuple[Watched, set[int]]] = WeakKeyDictionary()
# For each default group, by name and by the ranks of all groups, the group that this process is in.
_own_groups: WeakKeyDictionary[dist.ProcessGroup, dict[Any, dist.ProcessGroup]] = WeakKeyDictionary()

_SUM = dist.AllreduceOptions()  # whose reduction is a sum
if hasattr(_SUM, "asyncOp"):  # newer torch's: on the current stream
    _SUM.asyncOp = False


class TorchCommunicator:
    """The ranks of a ProcessGroup: NCCL, Gloo, or any other backend.

    Args:
        group: the process group; this process must be in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def world_size(self) -> int:
        return self.group.size()

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:
        """Sums buffer, a tensor or an ndarray, over the group, in place. See Communicator.

        Ranks of a Gloo group that are all on one machine sum in shared memory instead; see SharedMemory for its
        errors. The first sum creates that memory, with three extra messages.

        Tensors of accelerators are summed by the group's backend, on the current stream and without waiting for it.
        NCCL gives the same bits on all ranks, and, for the same ranks and machines, every time.

        Raises:
            TypeError: buffer is not of float64.
        """
        tensor = buffer if isinstance(buffer, torch.Tensor) else torch.from_numpy(buffer)
        if tensor.dtype != torch.float64:
            raise TypeError(
                f"{rank_prefix(self.rank, self.world_size)}expected a buffer of float64 to sum; got {tensor.dtype}: "
                "convert it first"
            )
        if not tensor.is_cpu:
            self._sum_on_device(tensor)
        elif not tensor.is_contiguous():
            dense = tensor.contiguous()
            self.all_reduce(dense, label)
            tensor.copy_(dense)
        elif memory := self.shared_memory():
            memory.all_reduce(tensor.data_ptr(), tensor.numel(), label)
        elif _sends_over_gloo(self.group):
            self._sum_gathered(tensor, label)
        else:
            dist.all_reduce(tensor, group=self.group)

    def _sum_on_device(self, tensor: torch.Tensor) -> None:
        # Not dist.all_reduce, which a caller's coalescing manager would put off until after the layer has read the sum.
        work = self.group.allreduce([tensor], _SUM)
        if work is not None:
            work.wait()  # of NCCL: the current stream waits, not the host

    @property
    def shares_memory(self) -> bool:
        """Whether CPU tensors are summed in shared memory; False before the first sum."""
        return _shared_memories.get(self.group) is not None

    def shared_memory(self) -> SharedMemory | None:
        """Returns the memory in which CPU tensors are summed, or None; made at the first call, by all ranks."""
        memory: SharedMemory | None = _shared_memories.get(self.group, _UNKNOWN)
        if memory is _UNKNOWN:
            with _joining:  # threads that make their first sum at once
                memory = _shared_memories.get(self.group, _UNKNOWN)
                if memory is _UNKNOWN:
                    memory = self._join_shared_memory() if _sends_over_gloo(self.group) else None
                    _shared_memories[self.group] = memory
        return memory

    direct_sums = shared_memory  # in which C++ can sum

    def _join_shared_memory(self) -> SharedMemory | None:
        gloo = self.group._get_backend(torch.device("cpu"))
        timeout = getattr(gloo, "wrapped_pg", gloo).options._timeout  # wrapped if TORCH_DISTRIBUTED_DEBUG=DETAIL

        def exchange(message: bytes) -> list[bytes]:
            # On the CPU, whatever the default device is.
            gathered = torch.empty((self.world_size, HANDSHAKE_BYTES), dtype=torch.uint8, device="cpu")
            own = torch.tensor(list(message), dtype=torch.uint8, device="cpu")
            self._send(dist.all_gather, list(gathered), own, text="the group's first")
            return [bytes(other.numpy()) for other in gathered]

        watched, _ = _sums.get(self.group) or self._watch()
        with watched.sum(None, -1):
            memory = join(self.rank, self.world_size, timeout, exchange)
        if memory is not None:
            watch(_Membership(self.group, memory))
        return memory

    def _sum_gathered(self, tensor: torch.Tensor, label: Label | None) -> None:
        """Sums over Gloo by all_gather: Gloo's all_reduce takes twice as many messages, one after the other.

        For messages this small latency dominates: between two nodes 1 ms apart, 3.2 ms instead of 5.1 ms. Adding in
        rank order gives the same bits on every rank.

        Each message starts with a number that says whose it is. Where lengths differ Gloo ends a rank: so before the
        first message of a length ranks compare what they are about to send.
        """
        watched, lengths = _sums.get(self.group) or self._watch()
        with watched.sum(label, -1 if label is None else label.call):
            if len(tensor) not in lengths:
                self._check(tensor, label)
                lengths.add(len(tensor))
            self._sum_labelled(tensor, label)

    def _sum_labelled(self, tensor: torch.Tensor, label: Label | None) -> None:
        number = 0 if label is None else Tag.from_address(label.address or label.tag()).number
        message = torch.cat([tensor.new_tensor([number]), tensor])
        gathered = tensor.new_empty((self.world_size, *message.shape))
        self._send(dist.all_gather, list(gathered), message, text=said(len(tensor), label))
        if not bool((gathered[:, 0] == number).all()):
            self._check(tensor, label)
        tensor.copy_(gathered[0, 1:])
        for other in gathered[1:]:
            tensor += other[1:]

    def _watch(self) -> tuple[Watched, set[int]]:
        """Lets sums over Gloo be watched, from the first on."""
        try:
            store = dist.distributed_c10d._get_default_store()
        except ValueError:  # there is no default group
            asking = None
        else:
            asking = StoreAsking(store, self.group.group_name, self.rank, self.world_size)
        gloo = self.group._get_backend(torch.device("cpu"))
        seconds = getattr(gloo, "wrapped_pg", gloo).options._timeout.total_seconds()
        _sums[self.group] = Watched(self.rank, self.world_size, "Gloo", seconds, asking, None), set()
        return _sums[self.group]

    def _check(self, tensor: torch.Tensor, label: Label | None) -> None:
        """Raises on all ranks where they are about to send different messages."""
        text = said(len(tensor), label)

        def sums(numbers: list[float]) -> list[float]:
            total = tensor.new_tensor(numbers)
            self._send(dist.all_reduce, total, text=text)
            return total.tolist()

        check(text, self.rank, self.world_size, sums)

    def _send(self, collective: Callable[..., Any], *arguments: Any, text: str) -> None:
        """Calls a collective of the group, and explains its errors, by the text that says what is sent."""
        try:
            collective(*arguments, group=self.group)
        except RuntimeError as error:  # Gloo's have no class of their own
            watched, _ = _sums[self.group]
            raise RuntimeError(
                f"{rank_prefix(self.rank, self.world_size)}expected every rank to take part in a sum over Gloo, "
                f"{text}; got {str(error).strip()}, while waiting for {watched.missing()}: see what the other ranks "
                "say; one has ended, has not come within the timeout, or sends a message of another length, which "
                "syncbn.check_collectives names"
            ) from error


class _Membership:
    """Leaves the shared memory of a group that torch.distributed has destroyed: layers and graphs may keep both."""

    horizon = math.inf

    def __init__(self, group: dist.ProcessGroup, memory: SharedMemory) -> None:
        self._group, self._memory = weakref.ref(group), weakref.ref(memory)
        memory.membership = self  # for as long as the memory is there

    def look(self, now: float, reports_at: float) -> None:  # noqa: ARG002  # see stalls.Looking
        """Leaves the memory once the group is no more."""
        group, memory = self._group(), self._memory()
        if group is not None and memory is not None and group not in dist.distributed_c10d._world.pg_map:
            memory.leave()


def leave_shared_memory() -> None:
    """Leaves the memory of all groups, before they are destroyed: others learn it at once."""
    for memory in list(_shared_memories.values()):
        if memory is not None:
            memory.leave()


def _sends_over_gloo(group: dist.ProcessGroup) -> bool:
    """Returns whether CPU tensors go over Gloo; False for a group that torch.distributed does not know."""
    try:
        return "cpu:gloo" in dist.get_backend_config(group)
    except (TypeError, ValueError, RuntimeError):  # which one depends on the version of torch
        return False


def _own_group(group: str | int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Returns the group of the ranks of `world`, the default group, that "own", "node" or a number stands for.

    Collective:
        at the first call for a group: all ranks must make the same ones in the same order, for it makes them.

    Raises:
        ValueError: a number that does not divide the number of ranks, on every rank.
    """
    made = _own_groups.setdefault(world, {})
    if group not in made:
        rank = world.rank()
        all_ranks = parts(group, rank, world.size(), lambda: _hosts(rank, world.size()))
        if all_ranks not in made:  # under another name
            for ranks in all_ranks:
                new: Any = dist.new_group(list(ranks), timeout=_timeout(world), group_desc="syncbn")
                if rank in ranks:
                    made[all_ranks] = new
        made[group] = made[all_ranks]
    return made[group]


def _hosts(rank: int, world_size: int) -> list[str]:
    """Returns the host of each rank, by the store: messages may need an accelerator that is not set yet."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"syncbn/host/{rank}", host())
    return [store.get(f"syncbn/host/{other}").decode() for other in range(world_size)]


def _timeout(world: Any) -> timedelta | None:
    """Returns the default group's timeout, or None for torch's own where its backend tells none."""
    for device in getattr(world, "_device_types", ()):
        backend = world._get_backend(device)
        options = getattr(getattr(backend, "wrapped_pg", backend), "options", None)  # of TORCH_DISTRIBUTED_DEBUG=DETAIL
        timeout: timedelta | None = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def communicator_of(group: Any) -> Communicator | None:
    """Returns the communicator for None, a torch group, or with torch.distributed initialised a name or number.

    None for anything else. See as_communicator.
    """
    if is_own(group):
        if dist.group.WORLD is None:
            return None
        group = _own_group(group, dist.group.WORLD)
    elif group is None:
        group = dist.group.WORLD
        if group is None:  # torch.distributed is not initialised
            _warn_if_launched()
            return LocalCommunicator()
    elif isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"expected a DeviceMesh of 1 dimension; got {group.ndim}, {group}: "
                'pass one of its dimensions, mesh["name"]'
            )
        group = dist.GroupMember.NON_GROUP_MEMBER if group.get_coordinate() is None else group.get_group()
    if isinstance(group, dist.ProcessGroup):
        if group.size() == 1:
            return LocalCommunicator()
        # A group of syncbn.mpi has a communicator that calls MPI directly.
        return getattr(group, "communicator", None) or TorchCommunicator(group)
    # torch.distributed.new_group returns this to processes outside the group; its type varies between versions.
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if type(group) is type(outside) and group == outside:
        raise ValueError(
            "expected a process group that this process is in; got a group or mesh of other processes: give every rank "
            "the group that it belongs to"
        )
    return None


_looked_for_a_launcher = False


def _warn_if_launched() -> None:
    """Warns once if a launcher started this process as one of several, but torch.distributed is not initialised."""
    global _looked_for_a_launcher
    if _looked_for_a_launcher:
        return
    _looked_for_a_launcher = True
    remedy = "call syncbn.init_process_group (or torch.distributed's)"
    try:
        launch = read_environment()
    except LaunchError as error:
        state = f"launched in an environment that contradicts itself ({error})"
    else:
        # srun also starts independent processes.
        if launch is None or launch.launcher == "slurm" or launch.world_size == 1:
            return
        state = f"launched as one of {launch.world_size} processes"
        if launch.is_mpi:
            remedy = f"pass process_group=mpi4py.MPI.COMM_WORLD, or {remedy}"
    warnings.warn(
        f"{state}, but torch.distributed is not initialised: statistics are this process's alone; {remedy}, or pass "
        "process_group=syncbn.comm.LocalCommunicator() if that is meant",
        RuntimeWarning,
        stacklevel=2,
    )
