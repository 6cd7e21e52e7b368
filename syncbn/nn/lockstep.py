"""Batches on several ranks at once: ranks that have no more go on with empty ones, while another rank has any."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import io
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .. import core
from ..comm import Communicator, as_communicator

_END: Any = object()
_SQUARABLE = 65521  # sums of squares of smaller numbers, over a million ranks, are exact in float64
_WITHOUT_DATA = (
    *(type(None), bool, int, float, complex, str, bytes, np.generic),
    *(enum.Enum, PurePath, range, slice, torch.device, torch.dtype),
)
_TELLING_SECONDS = 5.0


def communicator_of(process_group: Any, numbers: Callable[[int], int]) -> Communicator:
    """Returns as_communicator(process_group); what is no group is an error on the ranks of the default group, too.

    They are told where they wait over it, as they do if their process_group was left out. If they wait over another
    group, which is not known here, this rank raises after _TELLING_SECONDS.

    Args:
        process_group: as of as_communicator.
        numbers: returns how many float64 the other ranks send first, for their world_size.

    Raises:
        TypeError, ValueError: as as_communicator.
    """
    try:
        return as_communicator(process_group)
    except Exception as error:
        others = as_communicator(None)
        refusal = torch.full(
            (numbers(others.world_size),), math.nan, dtype=torch.float64, device=message_device(others)
        )
        # A thread, which can be left behind.
        telling = threading.Thread(target=_tell, args=(refusal, others), daemon=True)
        telling.start()
        telling.join(_TELLING_SECONDS)
        if type(error) in (TypeError, ValueError):
            raise type(error)(f"{core.rank_prefix(others)}{error}") from None
        raise


def _tell(refusal: Tensor, others: Communicator) -> None:
    with contextlib.suppress(RuntimeError):  # another rank has failed as well: the error that is raised is this rank's
        others.all_reduce(refusal)


def message_device(comm: Communicator) -> torch.device:
    """Returns the CPU, or where the group sends from accelerators alone, the current one."""
    types = {torch.device(device).type for device in getattr(getattr(comm, "group", None), "_device_types", ())}
    return torch.device("cpu" if not types or "cpu" in types else types.pop())


def message(comm: Communicator, device: torch.device) -> Tensor:
    """Returns what every rank sends before each step, of zeros; core.refuse can send it, too."""
    return torch.zeros(message_length(comm.world_size), dtype=torch.float64, device=device)


def message_length(world_size: int) -> int:
    """Returns how many float64 that is."""
    return 2 + world_size


def in_lockstep(
    batches: Iterable[Any],
    signature: int,
    comm: Communicator,
    device: torch.device,
    empty: Callable[[Any], Any] | None = None,
) -> Iterator[tuple[Any, bool]]:
    """Yields (batch, True) for each of this rank's batches, then (an empty batch, False) while another rank has any.

    A rank that had no batch gets an empty one that is like the first of another rank.

    Args:
        batches: of this rank.
        signature: a whole number of at least 0 that must be the same on all ranks; compared modulo a prime.
        comm, device: over which, and from where, messages are sent.
        empty: returns a batch without samples that is like the given one; by default emptied.

    Collective:
        one all_reduce of 2 + world_size float64 a step and one at the end; where some ranks have no batch at all, two
        more.

    Raises:
        RuntimeError: another rank raised an error where it should have sent, or has another signature.
        TypeError: a batch with objects that cannot be emptied, on a rank that has to.
        Exception: what `batches` raises.
    """
    signature %= _SQUARABLE
    empty = empty or emptied
    iterator: Iterator[Any] | None = None
    batch: Any = _END
    has_more = is_first = True
    while True:
        sent = message(comm, device)
        try:
            iterator = iter(batches) if iterator is None else iterator
            if has_more:
                previous, batch = batch, next(iterator, _END)
                has_more = batch is not _END
                if not has_more and previous is not _END:
                    batch = empty(previous)
        except Exception as error:
            core.refuse(error, sent, comm)
        sent[0], sent[1], sent[2 + comm.rank] = signature, signature**2, has_more
        comm.all_reduce(sent)
        total, squares, *there = sent.tolist()
        _check_others(total, comm)
        # The ranks' signatures are all this one exactly if their mean is, and the mean of their squares its square.
        if (total, squares) != (comm.world_size * signature, comm.world_size * signature**2):
            raise RuntimeError(
                f"{core.rank_prefix(comm)}expected the same layers in training mode on all ranks; got others on some: "
                "build the model, and freeze its layers, alike on all"
            )
        if not any(there):
            return
        if is_first and not all(there):
            example = _from_rank(there.index(1.0), batch, comm, device, empty)
            batch = batch if has_more else example
        is_first = False
        yield batch, has_more


def _from_rank(source: int, batch: Any, comm: Communicator, device: torch.device, empty: Callable[[Any], Any]) -> Any:
    """Returns a batch without samples that is like that of rank `source`, with its tensors on `device`."""
    length, data = torch.zeros(1, dtype=torch.float64, device=device), b""
    if comm.rank == source:
        try:
            file = io.BytesIO()
            torch.save(empty(batch), file)
            data = file.getvalue()
        except Exception as error:
            core.refuse(error, length, comm)
        length[0] = len(data)
    comm.all_reduce(length)
    _check_others(length.item(), comm)
    content = torch.zeros(int(length.item()), dtype=torch.float64, device=device)
    if comm.rank == source:
        content.copy_(torch.tensor(list(data), dtype=torch.float64))
    comm.all_reduce(content)  # the bytes, one a number
    received = io.BytesIO(bytes(content.to("cpu", torch.uint8).numpy()))
    # Of a rank of this program, with whatever containers its batches have.
    return torch.load(received, map_location=device, weights_only=False)


def _check_others(sent: float, comm: Communicator) -> None:
    if math.isnan(sent):
        raise RuntimeError(
            f"{core.rank_prefix(comm)}expected every rank to go on; another rank raised an error instead: see that "
            "rank's message"
        )


def emptied(batch: Any) -> Any:
    """Returns a batch without samples that is otherwise like this one: its tensors and arrays are cut along axis 0.

    They may be in lists, tuples, named tuples, dicts and other mappings, dataclasses, and what is registered with
    torch.utils._pytree, within each other. Numbers, strings and other things without samples, 0-d tensors too, stay as
    they are.

    Raises:
        TypeError: another object, which might have samples.
    """
    return pytree.tree_map(_cut, batch)


def _cut(v: Any) -> Any:
    if isinstance(v, Tensor) and not v.is_nested and v.layout in (torch.strided, torch.sparse_coo):
        if not v.dim():
            return v
        # No view, which would keep, and be sent with, all of it.
        kept = v.detach()[:0].clone() if v.layout == torch.strided else _no_rows(v.detach())
        return kept.requires_grad_(v.requires_grad)
    if isinstance(v, np.ndarray):
        return v[:0].copy() if v.ndim else v
    if isinstance(v, _WITHOUT_DATA):
        return v
    if dataclasses.is_dataclass(v) and not isinstance(v, type):
        fresh: Any = copy.copy(v)
        for field in dataclasses.fields(v):
            object.__setattr__(fresh, field.name, emptied(getattr(v, field.name)))  # frozen ones, too
        return fresh
    if isinstance(v, MutableMapping):
        fresh = copy.copy(v)
        for key, value in v.items():
            fresh[key] = emptied(value)
        return fresh
    kind = type(v).__name__
    if isinstance(v, Tensor):
        kind = "a nested tensor" if v.is_nested else f"a {v.layout} tensor"
    raise TypeError(
        f"expected batches of tensors, for ranks that run out of them go on with empty ones; got {kind}: pass batches "
        "of tensors, the same number of them on all ranks, or to syncbn.even a function that empties them, empty="
    )


def _no_rows(v: Tensor) -> Tensor:
    """Returns no rows of a sparse tensor."""
    return v.index_select(0, torch.empty(0, dtype=torch.int64, device=v.device))


def device_of(model: Any) -> torch.device:
    """Returns the device of the model's first parameter or buffer; raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model, a torch.nn.Module; got {type(model).__name__}: pass the model first")
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device


def run(model: nn.Module, batch: Any) -> None:
    """Runs the model on a batch, or on the first entry of a tuple or list, on the model's device."""
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    model(x.to(device_of(model)) if isinstance(x, Tensor) else x)


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Lets compiled models run as they are written: hooks that are added later are not in their graphs."""
    parts = list(model.modules())
    if any("_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
