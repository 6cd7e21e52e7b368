"""Activation checkpointing: knows a recomputation, and can keep what was sent, so that recomputing sends nothing."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from .. import core
from ..comm import Communicator, Label

# Where torch unpacks what checkpointing saved, and where compiled autograd calls an autograd.Function's backward.
_CALLERS = {
    "unpack_hook": torch.utils.checkpoint.__file__,
    "call_backward": str(Path(torch.__file__).with_name("_dynamo") / "external_utils.py"),
}
_function_backward: Any = BackwardCFunction.apply.__code__
_engine: Any = _engine_run_backward.__code__


def is_recomputing() -> bool:
    """Whether this forward repeats an earlier one, for a backward: it must then update no running statistics.

    It does if it was called to unpack a tensor that torch.utils.checkpoint saved (during a backward or not), or from
    the backward of an autograd.Function, as reentrant checkpointing does in torch and elsewhere. A forward that a hook
    starts during backward is a new one.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    if not in_backward and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return False
    if local.contexts and any(context.replays for context in local.contexts):
        return True
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _function_backward or _CALLERS.get(code.co_name) == code.co_filename:
            return True
        if code is _engine:  # what called backward is of no interest
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Reduced(NamedTuple):
    """What core.reduce returned, and for what."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    moments: Tensor
    center: Tensor | None


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.contexts: list[_Context] = []


local = _Contexts()


class _Context(AbstractContextManager[Any]):
    """Records the reduced moments of a region's forward, in order, or replays them when it is recomputed."""

    def __init__(self, tape: list[_Reduced], replays: bool) -> None:
        self.tape, self.replays, self.next = tape, replays, 0

    def __enter__(self) -> _Context:
        self.next = 0
        local.contexts.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        local.contexts.remove(self)

    def replay(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what the next layer's core.reduce(x, kernels, comm) was."""
        number = self.next
        expected = self.tape[number] if number < len(self.tape) else None
        self.next += 1
        if expected is None:
            found = f"one more after {number}"
        elif (tuple(x.shape), x.dtype) != expected[:2]:
            found = f"{tuple(x.shape)} {x.dtype} for {expected.shape} {expected.dtype} in layer {number}"
        else:
            return expected.moments.clone(), expected.center  # moments are turned into statistics in place
        raise RuntimeError(
            f"expected a checkpointed region to run the same layers when it is recomputed; got {found}: see that it "
            "does the same each time"
        )


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Keeps what layers have sent through a checkpointed region, so that its recomputation sends nothing.

    For torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts). It
    keeps 16 C + 8 bytes a layer. Within a compiled function torch takes contexts of selective checkpointing only
    (create_selective_checkpoint_contexts), which do the same where torch.ops.syncbn.reduce.default is MUST_SAVE.

    Raises:
        RuntimeError: in backward, where the recomputation runs more layers, or batches of another shape or dtype.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> checkpoint = torch.utils.checkpoint.checkpoint
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts).shape
        torch.Size([2, 3])
    """
    tape: list[_Reduced] = []
    return _Context(tape, replays=False), _Context(tape, replays=True)


def reduce(
    x: Tensor, kernels: Any, comm: Communicator, mask: Tensor | None = None, label: Label | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns core.reduce(x, kernels, comm, mask, label), or what that was when the region was recorded."""
    contexts = local.contexts
    source = next((i for i in reversed(range(len(contexts))) if contexts[i].replays), None)
    if source is None:
        moments, center = core.reduce(x, kernels, comm, mask, label)
    else:
        moments, center = contexts[source].replay(x)
    for context in contexts[0 if source is None else source + 1 :]:
        if not context.replays:
            context.tape.append(_Reduced(tuple(x.shape), x.dtype, moments.clone(), center))
    return moments, center
