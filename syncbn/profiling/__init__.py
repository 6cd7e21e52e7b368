"""`profile`: what a model's layers send and compute, how long that takes, and for whom they wait.

| module    | what                                               |
|-----------|----------------------------------------------------|
| recording | one group's messages and kernels, while they run   |
| gathering | the same of all ranks, by one exchange at the end  |
| report    | the figures, as a table and as JSON                |
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..comm.observed import Observer, forget_graphs, observe_graphs
from ..nn import SyncBatchNorm
from ..nn.exchange import exchange, lock, restore
from .gathering import gather
from .recording import Recording
from .report import Report as Report


@contextlib.contextmanager
def profile(model: nn.Module) -> Iterator[Report]:
    """Within it, the training of a model's SyncBatchNorm layers is recorded; afterwards the report tells of all ranks.

        with syncbn.profile(model) as report:
            for images, labels in batches: ...  # some steps, as ever
        print(report)

    For each layer it has messages, their bytes, the time in kernels, the time in messages, which is that of waiting for
    other ranks and of the sum itself, and the rank that came last and how often. Ranks' clocks are not compared: **a
    rank came last in a message if it spent least time there, and another rank more than twice as long.** The least time
    is what the message takes; what the others spent more they waited. Where all spend about as long, nobody is named.

    Kernels are those of the layers, activation and residual included, not what is around them in Python. Accelerators
    measure both by events, on the stream where the work is; what a CUDA graph captures or replays is not seen. While
    torch.profiler records, kernels and messages are ranges of its trace, as "syncbn layer1.0.bn1 forward: message".

    Compiled and exported graphs do not know their layers: what they send over the groups of the model's layers, from
    whichever model, is listed by channels, as "(graphs, 64 channels)". Not seen are layers of DTensors, which send over
    their mesh, evaluation, which sends nothing, and the NumPy layer.

    It costs nothing when off. When on, C++ gives sums in shared memory back to Python, and clocks are read: a layer of
    (32, 64) float32 took 1.2 to 1.5 times as long for forward and backward, alone and in a world of two (23 to 37
    microseconds of a core that other processes shared). Larger layers pay the same microseconds.

    Args:
        model: whose SyncBatchNorm layers are recorded; wrapped, compiled or not.

    Yields:
        the report, which is empty within the context.

    Collective:
        at the end, over each group of several ranks that layers have, two all_reduce: a small one, and one of a float64
        for each message and rank. All ranks must leave the context. None where it ends by an exception: the report then
        tells of this rank alone.

    Raises:
        TypeError: model is no module.
        ValueError: it has no SyncBatchNorm layer.
        RuntimeError: one of its layers is being profiled: within another profile of the model, or on another thread.
            That one goes on.

    Example:
        >>> import torch, syncbn
        >>> model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> with profile(model) as report:
        ...     model(torch.randn(4, 3, 8, 8)).sum().backward()
        >>> [(row.layer, row.direction, row.messages) for row in report.rows]  # in a world of one
        [('1', 'forward', 0), ('1', 'backward', 0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model, a torch.nn.Module; got {type(model).__name__}: profile each by itself")
    recordings: dict[Any, Recording] = {}
    report = Report()
    with _exchanged_groups(model, recordings):
        start = time.perf_counter()
        try:
            yield report
        finally:
            for recording in recordings.values():
                recording.close()
            report.fill(recordings.values(), time.perf_counter() - start)
    for recording in recordings.values():
        gather(recording)
    report.fill(recordings.values(), report.seconds)


@contextlib.contextmanager
def _exchanged_groups(model: nn.Module, recordings: dict[Any, Recording]) -> Iterator[None]:
    """Within it, recordings, which it fills with one a group, see what the layers do."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)}
    groups = []
    graphs: dict[str, Observer] = {}  # by the names that groups have there
    with lock:
        _check(layers)
        for name, layer in layers.items():
            handle = layer._syncbn_group
            if handle.key not in recordings:
                tensor = next((v for v in (*layer.parameters(), *layer.buffers())), None)
                recordings[handle.key] = Recording(handle.communicator(), "cpu" if tensor is None else tensor.device)
            graphs.setdefault(handle.name, recordings[handle.key].of_graphs())
            observer = recordings[handle.key].of_layer(name or type(layer).__name__)
            groups.append((layer, handle.observed(observer, name)))
        exchanged = exchange(groups)
        for group, of_graphs in graphs.items():
            observe_graphs(group, of_graphs)
    try:
        yield
    finally:
        with lock:
            for group, of_graphs in graphs.items():
                forget_graphs(group, of_graphs)
            restore(exchanged)


def _check(layers: dict[str, SyncBatchNorm]) -> None:
    if not layers:
        raise ValueError("expected a model with SyncBatchNorm layers; got none: call syncbn.convert_sync_batchnorm")
    for name, layer in layers.items():
        observer = layer._syncbn_group.observer
        if observer is not None and observer.is_open:
            raise RuntimeError(
                f"expected a model of which no layer is being profiled; got one whose layer {name!r} is recorded by a "
                "profile that has not ended, which goes on: leave that one first"
            )
