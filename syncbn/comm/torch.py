"""Communication over torch.distributed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..environment import LaunchError, rank_prefix, read_environment
from .labels import Label
from .local import LocalCommunicator
from .shared_memory import NOTE_BYTES, SharedMemory, join

if TYPE_CHECKING:
    from . import Communicator


# What the groups that have summed CPU tensors share, if they do; gone with the group.
_shared: WeakKeyDictionary[dist.ProcessGroup, SharedMemory | None] = WeakKeyDictionary()
_UNKNOWN: Any = object()


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

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:  # noqa: ARG002
        """Sums buffer, a tensor or an ndarray, over the group, in place. See Communicator.

        Between the processes of one machine that would send over Gloo in memory that they share; see SharedMemory for
        the errors. They make it at their first sum, by three more messages.

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
            dist.all_reduce(tensor, group=self.group)
        elif not tensor.is_contiguous():
            dense = tensor.contiguous()
            self.all_reduce(dense)
            tensor.copy_(dense)
        elif memory := self.shared_memory():
            memory.all_reduce(tensor.data_ptr(), tensor.numel())
        elif _sends_over_gloo(self.group):
            self._sum_gathered(tensor)
        else:
            dist.all_reduce(tensor, group=self.group)

    @property
    def shares_memory(self) -> bool:
        """Whether the last sums of CPU tensors were made in shared memory."""
        return _shared.get(self.group) is not None

    def shared_memory(self) -> SharedMemory | None:
        """Returns the memory in which CPU tensors are summed, or None; made at the first call, by all ranks."""
        memory: SharedMemory | None = _shared.get(self.group, _UNKNOWN)
        if memory is _UNKNOWN:
            memory = _shared[self.group] = self._join() if _sends_over_gloo(self.group) else None
        return memory

    def _join(self) -> SharedMemory | None:
        gloo = self.group._get_backend(torch.device("cpu"))
        timeout = getattr(gloo, "wrapped_pg", gloo).options._timeout  # wrapped: TORCH_DISTRIBUTED_DEBUG=DETAIL

        def exchange(note: bytes) -> list[bytes]:
            # On the CPU, whatever the default device is.
            notes = torch.empty((self.world_size, NOTE_BYTES), dtype=torch.uint8, device="cpu")
            own = torch.tensor(list(note), dtype=torch.uint8, device="cpu")
            dist.all_gather(list(notes), own, group=self.group)
            return [bytes(other.numpy()) for other in notes]

        return join(self.rank, self.world_size, timeout, exchange)

    def _sum_gathered(self, tensor: torch.Tensor) -> None:
        """Sums over Gloo, whose all_reduce sends twice as often, one after the other, as its all_gather.

        Of messages as small as these it is their number that counts: two nodes 1 ms apart take 3.2 ms in place of 5.1.
        Added in the order of ranks, sums have the same bits on every rank.
        """
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        dist.all_gather(list(gathered), tensor, group=self.group)
        tensor.copy_(gathered[0])
        for other in gathered[1:]:
            tensor += other


def _sends_over_gloo(group: dist.ProcessGroup) -> bool:
    """Whether tensors of the CPU go over Gloo. Of a group made past torch.distributed it is not known."""
    try:
        return "cpu:gloo" in dist.get_backend_config(group)
    except (TypeError, ValueError, RuntimeError):  # what versions of torch raise for such a group
        return False


def communicator_of(group: Any) -> Communicator | None:
    """Returns the communicator of None or of a group of torch's, and None for anything else. See as_communicator."""
    if group is None:
        group = dist.group.WORLD
        if group is None:  # torch.distributed is not initialised
            _warn_of_a_launcher()
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
        # A group of syncbn.mpi has one that calls MPI with nothing in between.
        return getattr(group, "communicator", None) or TorchCommunicator(group)
    # What torch.distributed.new_group returns to a process outside the group differs between versions of torch.
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if type(group) is type(outside) and group == outside:
        raise ValueError(
            "expected a process group that this process is in; got a group or mesh of other processes: give every rank "
            "the group that it belongs to"
        )
    return None


_looked_for_a_launcher = False


def _warn_of_a_launcher() -> None:
    """Warns, once, in a process that a launcher made one of many but that has not joined the others."""
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
        # srun starts processes that are jobs of their own, too.
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
