"""Masks for the layers inside a model, which nobody calls with one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .recomputation import is_recomputing


class ModelMask:
    """The mask of a model: for each of its layers the valid positions of that layer's input.

    Args:
        mask: of the model's input; see masked.
        is_left: whether this stands for a context that was left: no mask.
    """

    LEFT: ModelMask  # of all models that were in a context

    def __init__(self, mask: Tensor | None, is_left: bool = False) -> None:
        self.mask, self.is_left, self.thread = mask, is_left, 0 if is_left else threading.get_ident()

    def of(self, input: Any) -> Any:
        """Returns the mask for a layer's input, (N, C, *), resized along each axis where it is not as long.

        A mask that does not fit is returned as it is: the layer refuses it, together with the other ranks.
        """
        mask = self.mask
        if self.is_left and not torch.compiler.is_compiling() and is_recomputing():
            raise RuntimeError(
                "expected backward within the `with syncbn.masked(...)` of its forward, for a checkpointed region is "
                "recomputed with a layer that had a mask; got it outside: call backward within the context"
            )
        if not isinstance(mask, Tensor) or not isinstance(input, Tensor) or input.dim() < 2:
            return mask
        if mask.dim() == input.dim() - 1:
            mask = mask.unsqueeze(1)
        if mask.dim() != input.dim() or mask.shape[1] != 1:
            return self.mask
        for axis in range(2, input.dim()):
            mask = _resized(mask, axis, input.shape[axis])
        return mask


ModelMask.LEFT = ModelMask(None, is_left=True)


def _resized(mask: Tensor, axis: int, size: int) -> Tensor:
    """Position i of `size` takes that of i * length // size."""
    length = mask.shape[axis]
    if length in (1, size) or length == 0:
        return mask
    taken = torch.arange(size, device=mask.device) * length // size
    return mask.index_select(axis, taken)


@contextmanager
def masked(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Gives every SyncBatchNorm of a model a mask, for as long as the context lasts: layers in an nn.Sequential, say.

    Each layer resizes the mask to its input, along every axis of which the mask is not as long: position i of T' takes
    that of i * T // T' of the mask's T, the nearest one, as torch.nn.functional.interpolate has it. So a mask of the
    model's input serves the layers behind strided convolutions and pooling, too. Axes of length 1 are for all
    positions: a mask (N, 1, 1, T) is over time for inputs (N, C, F, T). A layer called with a mask of its own takes it.

    Only statistics, results and gradients of the normalisation layers are masked; a convolution before one still reads
    its neighbours, of which those that were normalised are 0 where nothing is valid.

    Contexts may be nested: the inner one holds for the layers of its model, None for no mask, and on leaving, by an
    error too, the outer one is back. In a compiled model the mask may change from call to call; a model is compiled
    once with a mask, and once without. Enter the context outside of what is compiled.

    A model has one mask at a time, whichever thread runs it: to enter on another thread while one is in the context is
    an error. Backward may run after it, but for what is recomputed (torch.utils.checkpoint in eager mode): there call
    backward within the context, for outside the recomputation is an error.

    Args:
        model: a model with SyncBatchNorm layers, and without other batch-normalisation layers, which know no masks.
        mask: bool, True at valid positions of the model's input, on its device: (N, 1, *) or (N, *) with as many axes *
            as the input of each layer, of any lengths. A part of a model may have its own: nest a context for it. None
            for all positions: on a rank without padding, say.

    Raises:
        ValueError: at once, a model without SyncBatchNorm layers or with other batch-normalisation layers; in a layer,
            on all ranks together, a mask with another N or another number of axes than its input.
        TypeError: at once, model is no Module; in a layer, as ValueError, a mask that is no tensor of bool.
        RuntimeError: another thread has given a layer of the model a mask; a layer is recomputed outside the context.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3, stride=2, padding=1), syncbn.SyncBatchNorm(3))
        >>> with syncbn.masked(model, torch.tensor([[True, True, True, True, False, False]])):
        ...     model(torch.randn(1, 2, 6))[0, :, -1].tolist()
        [0.0, 0.0, 0.0]
    """
    layers = _layers(model)
    given, before = ModelMask(mask), [layer.__dict__.get("_syncbn_mask") for layer in layers]
    if any(other is not None and other.thread not in (0, given.thread) for other in before):
        raise RuntimeError(
            "expected a model whose layers have no mask from another thread; got one that another thread uses within "
            "syncbn.masked: give each thread a copy of the model"
        )
    try:
        for layer in layers:
            layer.__dict__["_syncbn_mask"] = given
        yield
    finally:
        for layer, outer in zip(layers, before, strict=True):
            layer.__dict__["_syncbn_mask"] = ModelMask.LEFT if outer is None else outer


def _layers(model: Any) -> list[Any]:
    from .layer import SyncBatchNorm

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, a torch.nn.Module; got {type(model).__name__}")
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    others = {name: m for name, m in found.items() if not isinstance(m, SyncBatchNorm)}
    if others or not found:
        names = ", ".join(f"{name or 'the model itself'} ({type(m).__name__})" for name, m in others.items())
        raise ValueError(
            "expected a model whose batch-normalisation layers are SyncBatchNorm; got "
            f"{names or 'one without such layers'}: convert it by syncbn.convert_sync_batchnorm, in one process, too"
        )
    return list(found.values())
