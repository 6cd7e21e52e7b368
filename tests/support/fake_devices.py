"""CUDA tensors without CUDA: fakes that compute nothing, and what the operations on them would cost on a GPU.

`with fake_cuda(), ranks_of_fakes(8), costs() as found:` counts what runs in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import deferred

# Numbers of c10::DeviceType.
_CUDA, _META = 1, 14
# What launches nothing: allocations, and what looks at a tensor's description.
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "is_pinned", "detach"}
# What waits for the device, for its result is on the host or its size depends on the data.
_WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "is_nonzero"}
# Reductions that convert all of their input first where they are asked for another dtype.
_CONVERTING = {"sum", "mean", "prod", "linalg_vector_norm"}


class Message(NamedTuple):
    """What one collective sends."""

    name: str
    dtype: torch.dtype
    bytes: int


@dataclass
class Costs:
    """What operations on CUDA tensors would cost.

    Attributes:
        launches: kernels, by the operator's name; copies between host and device are none.
        messages: the collectives.
        uploads: copies from pageable memory of the host, which wait for the device, and fail under graph capture.
        waits: other operators that make the host wait, by name.
        downloads: copies to pinned memory of the host that do not wait.
        moved_bytes: read and written by all launches.
        largest_wide: elements of the largest float64 tensor that was made.
    """

    launches: Counter[str] = field(default_factory=Counter)
    messages: list[Message] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    downloads: int = 0
    moved_bytes: int = 0
    largest_wide: int = 0

    @property
    def launched(self) -> int:
        """The number of launches."""
        return self.launches.total()


class _Counting(TorchDispatchMode):
    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.costs, self._pinned = costs, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if _waits(name, _tensors(args)):  # before the call, which fakes may refuse
            self.costs.waits[name] += 1
        out = func(*args, **kwargs)
        self._count(func, name, args, kwargs, out)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        costs = self.costs
        read = _tensors([*args, *(v for name, v in kwargs.items() if name != "out")])
        written = _tensors([out])
        if kwargs.get("pin_memory") and written:
            self._pinned.add(_memory(written[0]))
        if func.namespace == "c10d":
            costs.messages.append(Message(name, read[0].dtype, read[0].nbytes))
        elif func.namespace != "prim" and not func.is_view and name not in _FREE:
            self._count_work(name, args, kwargs, read, written)

    def _count_work(self, name: str, args: Any, kwargs: Any, read: list[Tensor], written: list[Tensor]) -> None:
        costs = self.costs
        if not any(v.is_cuda and v.numel() for v in (*read, *written)):
            return
        if _waits(name, read):
            return
        if name in ("copy_", "_to_copy"):
            target, source = (read[0], read[1]) if name == "copy_" else (written[0], read[0])
            if target.is_cuda != source.is_cuda:
                self._count_copy(name, target, source, bool(kwargs.get("non_blocking") or args[2:3] == (True,)))
                return
            read = [source]
        elif any(v.is_cpu for v in read) and not _takes_scalars_of_the_host(name, read):
            costs.uploads.append(name)
        costs.launches[name] += 1
        costs.moved_bytes += sum(map(_bytes, (*(v for v in read if v.is_cuda), *written)))
        dtype = kwargs.get("dtype")
        if name in _CONVERTING and dtype is not None and dtype != read[0].dtype:
            costs.launches[f"{name}: conversion"] += 1
            costs.moved_bytes += 2 * read[0].numel() * dtype.itemsize
            costs.largest_wide = max(costs.largest_wide, read[0].numel())
        costs.largest_wide = max(costs.largest_wide, *(v.numel() for v in written if v.dtype == torch.float64), 0, 0)

    def _count_copy(self, name: str, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        is_pinned = _memory(source if target.is_cuda else target) in self._pinned
        if is_pinned and non_blocking:
            self.costs.downloads += 0 if target.is_cuda else 1
        elif target.is_cuda:
            self.costs.uploads.append(name)
        else:
            self.costs.waits[f"{name} to the host"] += 1


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (list, tuple)):
            found += _tensors(v)
    return found


def _waits(name: str, read: list[Tensor]) -> bool:
    if not any(v.is_cuda for v in read):
        return False
    return name in _WAITING or (name == "index" and any(v.dtype in (torch.bool, torch.uint8) for v in read[1:]))


def _memory(v: Tensor) -> int:
    return v.untyped_storage()._cdata


def _bytes(v: Tensor) -> int:
    """The bytes that a pass over v reads: of an expanded axis one element."""
    sizes = (size for size, stride in zip(v.shape, v.stride(), strict=True) if stride)
    return math.prod(sizes) * v.element_size() if v.numel() else 0


def _takes_scalars_of_the_host(name: str, read: list[Tensor]) -> bool:
    """Whether an operator passes 0-d tensors of the host on to the kernel as arguments, as arithmetic does."""
    return name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_") and all(
        v.is_cuda or v.dim() == 0 for v in read
    )


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors on "cuda" are fakes, which have shapes and devices and no memory, in any build of torch.

    A build without CUDA has no guard of the current CUDA device, which indexing asks for: that of the meta device,
    which does nothing, takes its place. So `to` needs the index of a device, "cuda:0"; and autograd's engine stays out
    of reach: call a result's grad_fn.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_META]
    before_deferred = dict(deferred.devices)
    deferred.devices.clear()
    try:
        with (
            unittest.mock.patch.object(deferred, "module_of", return_value=_Module),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        guards[_CUDA] = before
        deferred.devices.clear()
        deferred.devices.update(before_deferred)


class _Module:
    """In place of torch.cuda, whose events a build without CUDA has not: nothing that was asked for ever arrives."""

    class Event:
        def record(self, stream: Any) -> None:
            """Nothing."""

        def query(self) -> bool:
            return False

    @staticmethod
    def current_stream(device: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def ranks_of_fakes(world_size: int) -> Iterator[None]:
    """This process is rank 0 of that many in torch.distributed's default group; messages go nowhere."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def costs() -> Iterator[Costs]:
    """Counts what runs in it."""
    found = Costs()
    with _Counting(found):
        yield found
