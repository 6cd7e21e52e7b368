"""Errors of accelerators' counts, raised at a later call: reading a count at once would stall the device.

A count goes to pinned memory of the host by a copy that nobody waits for, with an event behind it. Later calls of
layers on the same device look at the counts whose event has come, and synchronize_errors waits for all. While a graph
is captured nothing is copied, and nothing looked at, for events cannot be asked then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

# A count on its way to the host: (1,) float64 of pinned memory, where it arrives; the event that comes after it; and
# what raises for a count that tells of an error.
_Count = tuple[Any, Any, Callable[[float], None]]


class _Device:
    """The counts of one device, in the order of the calls.

    Args:
        device: a torch.device.
        module: torch's module for devices of its type, torch.cuda for one.
    """

    def __init__(self, device: Any, module: Any) -> None:
        self.device, self.module = device, module
        # Each operation on these is atomic: backward recomputes checkpointed regions in threads of its own.
        self.waiting: deque[_Count] = deque()
        self._free: deque[tuple[Any, Any]] = deque()  # memory and events, to be used again
        self.is_capturing: Callable[[], bool] = getattr(module, "is_current_stream_capturing", lambda: False)

    def watch(self, count: Any, check: Callable[[float], None]) -> None:
        try:
            memory, event = self._free.pop()
        except IndexError:
            memory, event = _pinned(), self.module.Event()
        memory.copy_(count, non_blocking=True)
        event.record(self.module.current_stream(self.device))
        self.waiting.append((memory, event, check))

    def look(self, wait: bool) -> None:
        while True:
            try:
                entry = self.waiting.popleft()
            except IndexError:
                return
            memory, event, check = entry
            if wait:
                event.synchronize()
            elif not event.query():
                self.waiting.appendleft(entry)
                return
            count = float(memory)
            self._free.append((memory, event))
            try:
                check(count)
            except (RuntimeError, ValueError) as error:
                self.waiting.clear()  # what followed from it
                raise type(error)(
                    f"{error} (of an earlier forward on {self.device}, whose count the host has not waited for; since "
                    "then this rank has computed with NaN, or with what is left of the batch, and ranks may have sent "
                    "different numbers of messages: end the run, and go on from a checkpoint)"
                ) from None


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
        module = module_of(device)
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
        if not state.is_capturing():
            state.look(wait=True)


def module_of(device: Any) -> Any:
    """Returns torch's module for devices of this type, or None for a type without events (meta)."""
    import torch

    module = getattr(torch, device.type, None)
    return module if hasattr(module, "Event") and hasattr(module, "current_stream") else None


def _pinned() -> Any:
    import torch

    with torch.inference_mode(False):  # what is made in inference mode cannot be written outside it
        return torch.empty(1, dtype=torch.float64, device="cpu", pin_memory=True)
