"""What the layers of one group send and compute, recorded while it runs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.autograd.profiler
from torch import Tensor

from .. import deferred
from ..comm import Communicator

_clock = time.perf_counter
_MOST_EVENTS = 1000  # that wait for the device


@dataclass
class Message:
    """One message.

    Attributes:
        row: layer and direction.
        bytes: of this rank's part.
        seconds: from its start, on this rank, to the sum.
    """

    row: tuple[str, str]
    bytes: int
    seconds: float = math.nan


@dataclass
class Recording:
    """The messages and kernels of the layers that have one group.

    Args:
        comm: the communicator of the group.
        device: from which tensors are sent.

    Attributes:
        kernel_seconds: by layer and direction, in the order in which they came up.
        messages: in the order in which they were sent.
        of_ranks: what gathering makes of all ranks, or None.
    """

    comm: Communicator
    device: Any
    is_open: bool = True
    kernel_seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    of_ranks: tuple[list[list[float]], list[list[float]]] | None = None
    _waiting: deque[tuple[Callable[[float], None], Any, Any]] = field(default_factory=deque)

    def of_layer(self, name: str) -> _Observer:
        """Returns what records a layer of that name."""
        for direction in ("forward", "backward"):
            self.kernel_seconds[name, direction] = 0.0
        return _Observer(self, name)

    def of_graphs(self) -> _Observer:
        """Returns what records calls of graphs, which do not know their layers."""
        return _Observer(self, "")

    def run(self, row: tuple[str, str], is_message: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns function(*arguments), timed where the first of them is."""
        device = None if arguments[0].is_cpu else arguments[0].device
        start = _clock() if device is None else _event(device)
        if torch.autograd.profiler._is_profiler_enabled:
            kind = "message" if is_message else "kernels"
            with torch.autograd.profiler.record_function(f"syncbn {' '.join(row)}: {kind}"):
                result = function(*arguments)
        else:
            result = function(*arguments)
        if device is None:
            self._add(row, self._message(row, arguments[0]) if is_message else None, _clock() - start)
        elif start is not None:  # None: a graph is being captured
            end = _event(device)
            message = self._message(row, arguments[0]) if is_message else None
            self._waiting.append((partial(self._add, row, message), start, end))
            if len(self._waiting) > _MOST_EVENTS:
                self._settle(wait=False)
        return result

    def _message(self, row: tuple[str, str], buffer: Tensor) -> Message:
        message = Message(row, buffer.nbytes)
        self.messages.append(message)
        self.device = buffer.device
        return message

    def _add(self, row: tuple[str, str], message: Message | None, seconds: float) -> None:
        self.kernel_seconds[row] = self.kernel_seconds.get(row, 0.0) + (seconds if message is None else 0.0)
        if message is not None:
            message.seconds = seconds

    def _settle(self, wait: bool) -> None:
        while self._waiting:
            add, start, end = self._waiting[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self._waiting.popleft()
            add(start.elapsed_time(end) / 1e3)

    def close(self) -> None:
        """Ends the recording, and waits for the device's times."""
        self.is_open = False
        self._settle(wait=True)


class _Observer:
    """See comm.observed.Observer. layer: its name, or "" for what graphs do."""

    def __init__(self, recording: Recording, layer: str) -> None:
        self._recording, self._layer = recording, layer

    @property
    def is_open(self) -> bool:
        return self._recording.is_open

    def run(self, direction: str, is_message: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns function(*arguments), recorded."""
        if not self._recording.is_open:
            return function(*arguments)
        layer = self._layer or f"(graphs, {_channels(arguments[0])} channels)"
        return self._recording.run((layer, direction), is_message, function, *arguments)


def _channels(v: Tensor) -> int:
    """The channels of a batch, or of a message."""
    return v.shape[1] if v.dim() > 1 else v.numel() // 2


def _event(device: Any) -> Any:
    """Returns an event of an accelerator that comes now, or None while a graph is captured."""
    module = deferred.module_of(device)
    if module is None or getattr(module, "is_current_stream_capturing", lambda: False)():
        return None
    event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event
