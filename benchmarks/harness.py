"""How the benchmarks time: results checked first, then interleaved repeats of all that is compared, and quantiles."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ranks import World

WARM_UP_ROUNDS = 3
MOST_REPEATS = 10_000


class WrongResultError(RuntimeError):
    """An implementation computed something else than the oracle; it is not timed."""


@dataclass(frozen=True)
class Contender:
    """One of the implementations that a measurement compares.

    Attributes:
        name: of the implementation.
        call: what is timed; it gets what prepare returned.
        prepare: makes what a call needs, before the clock starts.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Times:
    """The quantiles of the repeats of one contender, in microseconds."""

    p20_microseconds: float
    p50_microseconds: float
    p80_microseconds: float
    p95_microseconds: float
    repeats: int


def measure(contenders: Sequence[Contender], world: World, seconds: float, minimum_repeats: int) -> dict[str, Times]:
    """Times contenders against each other.

    A round is one fresh call of each contender; the order rotates from round to round, and every other round runs
    backwards. A call's result is freed, and the next call prepared, while the clock stands. With several ranks all
    wait for each other before the clock starts, and the slowest rank's time counts. On GPUs the clock is the device's:
    of events before and after the call.

    Args:
        contenders: of different names.
        world: the ranks that measure together; they all must call.
        seconds: how long the rounds may take together, preparations included.
        minimum_repeats: the number of rounds, however long they take.

    Returns:
        for each name, the quantiles over rounds.
    """
    microseconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    collecting = gc.isenabled()
    gc.collect(1)  # the young: a full collection takes 0.1 s
    gc.disable()
    try:
        for _ in range(WARM_UP_ROUNDS):
            start = time.perf_counter()
            for contender in contenders:
                _timed(contender, world)
            round_seconds = world.slowest([time.perf_counter() - start])[0]
        for i in range(min(max(int(seconds / round_seconds), minimum_repeats), MOST_REPEATS)):
            turn = i // 2 % len(contenders)
            for contender in [*contenders[turn:], *contenders[:turn]][:: -1 if i % 2 else 1]:
                microseconds[contender.name].append(_timed(contender, world))
    finally:
        if collecting:
            gc.enable()
    return {name: _quantiles(world.slowest(samples)) for name, samples in microseconds.items()}


def _timed(contender: Contender, world: World) -> float:
    """Returns the microseconds of one call."""
    prepared = contender.prepare()
    world.barrier()
    if world.device.type != "cpu":
        return _timed_on_device(contender, prepared, world.device)
    start = time.perf_counter_ns()
    result = contender.call(prepared)
    elapsed = (time.perf_counter_ns() - start) / 1e3
    del result  # here at the latest, so that it is not freed within the next contender's time
    return elapsed


def _timed_on_device(contender: Contender, prepared: Any, device: torch.device) -> float:
    """Returns the microseconds from when the device comes to the call until it has done what the call asked for.

    The device has nothing else to do, so of a call that asks for little this is the host's time.
    """
    make: Any = torch.cuda.Event
    start, end = (make(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = contender.call(prepared)
    end.record()
    end.synchronize()
    del result
    elapsed: float = start.elapsed_time(end) * 1e3
    return elapsed


def _quantiles(samples: list[float]) -> Times:
    p20, p50, p80, p95 = np.quantile(samples, (0.2, 0.5, 0.8, 0.95)).tolist()
    return Times(p20, p50, p80, p95, len(samples))


def tolerance(dtype: torch.dtype, count: int) -> float:
    """Returns how far a right result may be from the oracle, relative to the largest element of the oracle's.

    8 * (eps + eps_sum * sqrt(count)): an element is rounded a few times to its dtype, and errors of a sum of count
    elements, in float32 or float64, grow like a random walk.
    """
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * (torch.finfo(dtype).eps + torch.finfo(accumulate).eps * math.sqrt(count))


def check(label: str, got: Tensor | None, expected: Tensor, relative: float) -> None:
    """Compares a result with the oracle's.

    Args:
        label: what it is and whose.
        got: of any dtype.
        expected: the oracle's, float64.
        relative: the tolerance, relative to the largest element expected.

    Raises:
        WrongResultError: it is absent, of another shape, or not within the tolerance.
    """
    if got is None or got.shape != expected.shape:
        shape = None if got is None else tuple(got.shape)
        raise WrongResultError(
            f"{label}: expected shape {tuple(expected.shape)}; got {shape}: a wrong result is not timed"
        )
    scale = float(expected.abs().max()) or 1.0
    error = float((got.detach().to(expected.device).double() - expected).abs().max()) / scale
    if not error <= relative:  # NaN is an error as well
        raise WrongResultError(
            f"{label}: expected the float64 oracle's to {relative:.1e} of the largest element; got an error of "
            f"{error:.1e}: a wrong result is not timed, mend the implementation"
        )
