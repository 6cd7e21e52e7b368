"""Errors of accelerators' counts, raised at a later call: reading a count at once would stall the device.

A count goes to pinned memory of the host by a copy that nobody waits for, with an event behind it. Later calls of
layers on the same device look at the counts whose event has come, and synchronize_errors waits for all. While a graph
is captured nothing is copied, and nothing looked at, for events cannot be asked then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple


class _Count(NamedTuple):
    """A count on its way to the host.

    Attributes:
        memory: (1,) float64, pinned: where it arrives.
        event: comes after it.
        check: raises for a count that tells of an error.
    """

    memory: Any
    event: Any
    check: Callable[[float], None]


class _Device:
    """The counts of one device, in the order of the calls.

    Args:
        device: a torch.device.
        module: torch's module for devices of its type, torch.cuda for one.
    """

    def __init__(self, device: Any, module: Any) -> None:
        self.device, self.module = device, module
        self.waiting: deque[_Count] = deque()
        self._free: list[tuple[Any, Any]] = []  # memory and events, to be used again
        self._lock = threading.Lock()  # backward recomputes checkpointed regions in threads of its own

    def is_capturing(self) -> bool:
        capturing = getattr(self.module, "is_current_stream_capturing", None)
        return capturing is not None and capturing()

    def watch(self, count: Any, check: Callable[[float], None]) -> None:
        with self._lock:
            memory, event = self._free.pop() if self._free else (_pinned(), self.module.Event())
        memory.copy_(count, non_blocking=True)
        event.record(self.module.current_stream(self.device))
        with self._lock:
            self.waiting.append(_Count(memory, event, check))

    def look(self, wait: bool) -> None:
        with self._lock:
            arrived = []
            while self.waiting and (wait or self.waiting[0].event.query()):
                arrived.append(self.waiting.popleft())
        for memory, event, check in arrived:
            if wait:
                event.synchronize()
            try:
                check(float(memory))
            except (RuntimeError, ValueError) as error:
                self.waiting.clear()  # what followed from it
                raise type(error)(
                    f"{error} (of an earlier forward on {self.device}, whose count the host has not waited for; since "
                    "then this rank has computed with NaN, or with what is left of the batch, and ranks may have sent "
                    "different numbers of messages: end the run, and go on from a checkpoint)"
                ) from None
        with self._lock:
            self._free += [(memory, event) for memory, event, _ in arrived]


devices: dict[Any, _Device] = {}  # those of which counts have been watched; empty in processes that use CPUs alone


def watch(count: Any, check: Callable[[float], None]) -> None:
    """Checks a count once it is known. Does nothing during a capture, and on devices without events.

    Args:
        count: (1,) float64, a tensor of an accelerator.
        check: raises a RuntimeError or ValueError for a count that tells of an error.
    """
    device = count.device
    state = devices.get(device)
    if state is None:
        module = _module_of(device)
        if module is None:
            return
        state = devices.setdefault(device, _Device(device, module))
    if not state.is_capturing():
        state.watch(count, check)


def look(device: Any) -> None:
    """Raises the error that a count of an earlier call on this device tells of, if it is known by now."""
    state = devices.get(device)
    if state is not None and state.waiting and not state.is_capturing():
        state.look(wait=False)


def synchronize_errors() -> None:
    """Waits for the work of all layers on accelerators, and raises the error of a forward that has not been raised yet.

    On accelerators a rank learns at a later call of a layer, forward or backward, that another rank refused its input
    in an earlier one, or that a batch had one element a channel over all ranks. After the last of its calls it learns
    of it here: call this at the end of an epoch, and before a checkpoint is written. On CPUs, where each call raises
    its own errors, and for calls that were captured in a CUDA graph, it does nothing.

    Raises:
        RuntimeError, ValueError: as the call would have on a CPU, and that it is of an earlier one.
    """
    for state in tuple(devices.values()):
        state.look(wait=True)


def _module_of(device: Any) -> Any:
    """Returns torch's module for devices of this type, or None for a type without events (meta)."""
    import torch

    module = getattr(torch, device.type, None)
    return module if hasattr(module, "Event") and hasattr(module, "current_stream") else None


def _pinned() -> Any:
    import torch

    return torch.empty(1, dtype=torch.float64, device="cpu", pin_memory=True)
