"""check_collectives: a model whose ranks compare what they are about to send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..comm.checked import checked_graphs
from .exchange import exchange, lock, restore
from .layer import SyncBatchNorm


@contextlib.contextmanager
def check_collectives(model: nn.Module) -> Iterator[None]:
    """Within it ranks compare each message of a model's SyncBatchNorm layers before they send it.

        with syncbn.check_collectives(model):
            train_one_step(model)

    They compare the layer, by its path in the converted model, direction and number of the call, the message's length,
    the input's dtype, eps, the momentum of running statistics that are updated, and whether there are weight and bias.
    Where ranks differ **every rank raises, and says what each was about to send**; nothing is mixed. A layer that is
    evaluated, or left out, on one rank shows when that rank comes to its next message.

    Without it the same is compared, but for the call, beside messages in shared memory, over Gloo and over MPI, at no
    cost: once they have come. Lengths that differ, in a message that is not the first of its length, make Gloo and MPI
    end a rank before that. This is for a program that ends so, or hangs, and for groups of accelerators and
    Communicators of one's own. Graphs do not know their layers: their lengths are compared.

    The environment variable **SYNCBN_CHECK=1**, set for all ranks at their start, does the same for all layers, and for
    functional calls and NumPy's layers, whose lengths are compared.

    Args:
        model: whose layers are checked; wrapped, compiled or not.

    Collective:
        before each message one of 8 float64; all ranks must enter and leave the context at the same place. A device
        waits for the result.

    Raises:
        TypeError: model is no module.
        ValueError: it has no SyncBatchNorm layer.
        RuntimeError: within it, see above.

    Example:
        >>> import torch, syncbn
        >>> model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> with check_collectives(model):
        ...     model(torch.randn(4, 3, 8, 8)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model, a torch.nn.Module; got {type(model).__name__}: check each by itself")
    layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    if not layers:
        raise ValueError("expected a model with SyncBatchNorm layers; got none: call syncbn.convert_sync_batchnorm")
    with lock:
        exchanged = exchange([(layer, layer._syncbn_group.checked()) for layer in layers])
        names = {handle.name for _, _, handle in exchanged}
        checked_graphs.update(names)
    try:
        yield
    finally:
        with lock:
            checked_graphs.subtract(names)
            restore(exchanged)
