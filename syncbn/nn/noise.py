"""The noise of a NoisySyncBatchNorm's forward: its number, the seed that ranks agree on, and the operator for graphs.

A forward that repeats an earlier one for a backward (activation checkpointing) must draw what that drew, while later
forwards may have gone by. Where a forward may be repeated, it takes a random number, a ticket, of torch's generator on
the CPU, whose state checkpointing restores before it repeats a region: so the ticket is the same again, and tells which
number the forward had.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from .. import core
from ..comm import AGREEMENT, Communicator, communicator_named
from ..noise import agreed, goes_on, normal, proposal
from .operators import CUT, below_autograd, in_order, library
from .recomputation import is_recomputing

_C: Any = torch._C
_TICKETS = 2048  # the latest forwards of a layer that may be repeated


class NoiseStream:
    """What a layer's noise needs beside its seed and its count, which are buffers.

    Args:
        is_given: whether the seed was chosen, so that it must be the same on all ranks; else rank 0's serves.
    """

    def __init__(self, is_given: bool) -> None:
        self.is_given = is_given
        self.name = f"noise-{next(_numbers)}"
        self._agreed: tuple[str, int] | None = None
        self._before: tuple[int, int] | None = None  # seed and count at the latest forward
        # For each ticket the number of its forward, and whether several forwards that were not repeated had it.
        self._tickets: OrderedDict[int, tuple[int | Tensor, bool]] = OrderedDict()
        self._repeated: set[int] = set()
        _streams[self.name] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseStream:
        return NoiseStream(self.is_given)

    def __reduce__(self) -> tuple[Any, ...]:
        return NoiseStream, (self.is_given,)

    def draw(self, seed: Tensor, count: Tensor, num_features: int, name: str, comm: Communicator) -> Any:
        """Returns this forward's unit normal numbers, (2, C) float64, its seed, and the count after it, () int64.

        Args:
            seed, count: () int64; they are left as they are.
            num_features: C.
            name, comm: of the group.

        Collective:
            see agree.

        Raises:
            ValueError: as agree.
            RuntimeError: a forward is repeated, and it cannot be known which.
        """
        seed = self.agree(seed, count, name, comm)
        if is_recomputing():
            number, after = self._recall(), count
        else:
            number, after = int(count) if _is_plain(count) else count.clone(), count + 1
            if not torch.is_grad_enabled() or _C._autograd._top_saved_tensors_default_hooks(True) is not None:
                self._remember(number)
        return _normal(seed, number, num_features), seed, after

    def agree(self, seed: Tensor, count: Tensor, name: str, comm: Communicator) -> Tensor:
        """Returns the seed that this rank shares with the others of the group, () int64: seed itself, or a new one.

        Collective:
            at the first call for a group of several ranks one all_reduce of 22 float64; every rank must call. On CPUs
            another one where seed or count are not what the forward before left, as after load_state_dict: so a change
            on some ranks only is an error, in shared memory one that names the ranks.

        Raises:
            ValueError: the ranks' seeds or counts differ, on all ranks together.
        """
        key = name, comm.world_size
        if comm.world_size > 1:
            is_known = _is_plain(seed) and _is_plain(count)  # on accelerators reading them would stall the device
            is_changed = is_known and not goes_on(self._before, int(seed), int(count)) and not is_recomputing()
            if self._agreed != key or is_changed:
                seed = self._compare(seed, count, comm)
            self._before = (int(seed), int(count)) if is_known else None
        self._agreed = key
        return seed

    def _compare(self, seed: Tensor, count: Tensor, comm: Communicator) -> Tensor:
        own = int(seed), int(count)
        sent = proposal(*own, self.is_given, comm.rank)
        message = torch.tensor(sent, dtype=torch.float64, device=seed.device)
        core.all_reduce(message, AGREEMENT, comm)
        sums = message.tolist()
        if math.isnan(sums[0]):
            core.check_count(math.nan, comm)
        try:
            found = agreed(sums, *own, comm.world_size)
        except ValueError as error:
            raise ValueError(f"{core.rank_prefix(comm)}{error}") from None
        return seed if found == own[0] else torch.full_like(seed, found)

    def _remember(self, number: int | Tensor) -> None:
        ticket = _ticket()
        waiting = self._tickets.pop(ticket, None)
        self._tickets[ticket] = number, waiting is not None and ticket not in self._repeated
        self._repeated.discard(ticket)
        if len(self._tickets) > _TICKETS:
            self._repeated.discard(self._tickets.popitem(last=False)[0])

    def _recall(self) -> int | Tensor:
        ticket = _ticket()
        number, is_ambiguous = self._tickets.get(ticket, (None, False))
        if number is None or is_ambiguous:
            found = "several forwards with it: seed torch once, not before each forward" if is_ambiguous else (
                "another: checkpoint with preserve_rng_state=True, the default, and run all of the region again"
            )  # fmt: skip
            raise RuntimeError(
                "expected a repeated forward of a NoisySyncBatchNorm to find the state that torch's random numbers had "
                f"before, by which it knows its noise; got {found}"
            )
        self._repeated.add(ticket)
        return number


def adopt(stream: NoiseStream, seed: Tensor, count: Tensor, name: str, comm: Communicator) -> None:
    """Makes a layer's seed the one that its ranks agree on; see NoiseStream.agree."""
    found = stream.agree(seed, count, name, comm)
    if found is not seed:
        seed.copy_(found)


def _ticket() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def _is_plain(v: Tensor) -> bool:
    return v.is_cpu and not _C._functorch.is_functorch_wrapped_tensor(v)


def _normal(seed: Tensor, number: int | Tensor, num_features: int) -> Tensor:
    if isinstance(number, int) and _is_plain(seed):  # NumPy's calls take a third of the time
        numbers = seed.view(1).numpy(), np.array([number]), np.arange(1, num_features + 1)
        return torch.from_numpy(np.stack(normal(*numbers, np)))
    channels = torch.arange(1, num_features + 1, device=seed.device)
    return torch.stack(normal(seed.view(1), torch.as_tensor(number, device=seed.device).view(1), channels, torch))


_numbers = itertools.count()
_streams: WeakValueDictionary[str, NoiseStream] = WeakValueDictionary()
_kept: list[NoiseStream] = []  # of graphs that outlived their layers, or were loaded


def _stream_named(name: str) -> NoiseStream:
    found = _streams.get(name)
    if found is None:
        found = NoiseStream(True)
        found.name, _streams[name] = name, found
        _kept.append(found)
    return found


_VECTORS = "Tensor seed, Tensor count"
_NAMES = "SymInt num_features, str stream, str group"
for _schema in (
    f"noise({_VECTORS}, {_NAMES}, int cut) -> (Tensor, Tensor, Tensor)",
    f"draw_noise({_VECTORS}, Tensor? after, {_NAMES}) -> (Tensor, Tensor, Tensor)",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def traced(seed: Tensor, count: Tensor, num_features: int, stream: NoiseStream, group: str) -> Any:
    """Returns what stream.draw does, by an operator that graphs can hold."""
    return torch.ops.syncbn.noise.default(seed, count, num_features, stream.name, group, CUT)


def _noise(seed: Tensor, count: Tensor, num_features: int, stream: str, group: str, cut: int) -> Any:  # noqa: ARG001
    found = in_order(lambda after: torch.ops.syncbn.draw_noise.default(seed, count, after, num_features, stream, group))
    recorder = _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY)
    if recorder is not None:
        # A graph that recomputes activations keeps these: their count goes on.
        target = torch.ops.syncbn.draw_noise.default
        node = next((n for n in reversed(recorder.tracer.graph.nodes) if n.target is target), None)
        for user in () if node is None else (node, *node.users):
            user.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return found


def _draw_noise(
    seed: Tensor,
    count: Tensor,
    after: Tensor | None,  # noqa: ARG001
    num_features: int,
    stream: str,
    group: str,
) -> Any:
    # An operator's results are no arguments.
    found = _stream_named(stream).draw(seed.clone(), count.clone(), num_features, group, communicator_named(group))
    return tuple(found)


def _fake_noise(seed: Tensor, count: Tensor, after: Tensor | None, num_features: int, *_: Any) -> Any:  # noqa: ARG001
    noise = seed.new_empty((2, num_features), dtype=torch.float64)
    return noise, torch.empty_like(seed), torch.empty_like(count)


library.impl("noise", _noise, "CompositeImplicitAutograd")
library.impl("draw_noise", below_autograd(_draw_noise), "CompositeExplicitAutograd")
torch.library.register_fake("syncbn::draw_noise", _fake_noise, lib=library)
