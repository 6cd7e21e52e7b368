"""Counts the memory that a layer and its activation take in training: `python -m benchmarks.memory`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import syncbn

from .cases import Case
from .implementations import (
    BASE,
    FUSED,
    OURS,
    Implementation,
    Layer,
    Problem,
    batch_norm,
    composed,
    fused,
)
from .ranks import World, launch
from .report import Arguments, Report

ABOUT = """Counts the bytes that a layer and its activation keep from forward to backward, and the most they hold
within forward and within forward and backward, beside their input."""
COLUMNS = {
    "case": 19,
    "layout": 13,
    "dtype": 8,
    "activation": 10,
    "implementation": 34,
    "input_bytes": 12,
    "keeps_input": 11,
    "saved_inputs": 12,
    "alive_inputs": 12,
    "forward_peak_inputs": 19,
    "both_peak_inputs": 16,
}


def _unfused(name: str, norm: Callable[..., nn.Module], synchronised: bool) -> tuple[Implementation, ...]:
    return tuple(
        Implementation(f"{name} + act{mark}", composed(norm, inplace), synchronised)
        for inplace, mark in ((False, ""), (True, " inplace"))
    )


_UNFUSED = (*_unfused(BASE, batch_norm, False), *_unfused(OURS, syncbn.SyncBatchNorm, True))
_FUSED = Implementation(FUSED, fused(), True)
# By activation.
IMPLEMENTATIONS = {
    "relu": (*_UNFUSED, _FUSED),
    "leaky_relu": (*_UNFUSED, _FUSED, Implementation(f"{FUSED} inplace", fused(inplace=True), True)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = Arguments("memory", ABOUT, ("float32",), seconds=None)
    parser.several("--activation", IMPLEMENTATIONS, "what follows the layer")
    launch(run, 0, parser.parse_args(arguments))


def run(world: World, arguments: argparse.Namespace) -> None:
    """Counts for all that the arguments select."""
    groups = [
        (case, layout, dtype, activation)
        for case in arguments.case
        for layout in case.layouts(tuple(arguments.layout))
        for dtype, activation in product(arguments.dtype, arguments.activation)
    ]
    with Report("memory", COLUMNS, arguments, world, len(groups)) as report:
        for group in groups:
            report.group(" ".join(str(getattr(part, "name", part)) for part in group))
            report.add(_rows(world, *group))


def _rows(world: World, case: Case, layout: str, dtype: str, activation: str) -> list[dict[str, Any]]:
    problem = Problem(case, layout, getattr(torch, dtype), "bn", activation, world)
    rows = []
    for implementation in IMPLEMENTATIONS[activation]:
        rows.append(
            {
                "case": case.name,
                "shape": case.shape,
                "layout": layout,
                "dtype": dtype,
                "activation": activation,
                "implementation": implementation.name,
                **_counts(problem, implementation),
                "skipped": None,
            }
        )
    return rows


def _counts(problem: Problem, implementation: Implementation) -> dict[str, Any]:
    input_bytes = problem.x.untyped_storage().nbytes()
    layer = problem.layer(implementation)
    problem.check(implementation, layer)
    saved, keeps_input = saved_bytes(problem, layer)
    alive, forward_peak, both_peak = measured_bytes(problem, layer)
    row: dict[str, Any] = {"input_bytes": input_bytes, "keeps_input": keeps_input}
    counts = {"saved": saved, "alive": alive, "forward_peak": forward_peak, "both_peak": both_peak}
    for name, count in counts.items():
        row[f"{name}_bytes"] = count
        row[f"{name}_inputs"] = count / input_bytes
    return row


def saved_bytes(problem: Problem, layer: Layer) -> tuple[int, bool]:
    """Returns what autograd saves and the output, and whether the input is among it.

    Returns:
        the bytes of the different storages, without the input's, the parameters' and the running statistics'; and
        whether the input is saved, its values as they were or overwritten.
    """
    found: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        found[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    x = _fresh_input(problem)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        y = layer.call(x)
    pack(y)
    keeps_input = x.untyped_storage().data_ptr() in found
    for v in (x, *layer.norm.parameters(), *layer.norm.buffers()):
        found.pop(v.untyped_storage().data_ptr(), None)
    return sum(found.values()), keeps_input


def measured_bytes(problem: Problem, layer: Layer) -> tuple[int, int, int]:
    """Returns what torch's allocator gave out, above what there was before: after forward, and the two peaks."""
    kept: list[Any] = []

    def forward() -> None:
        kept.append(layer.call(x))

    def both() -> None:
        forward()
        kept.append(torch.autograd.grad(kept[-1], [x, layer.norm.weight, layer.norm.bias], problem.dy))

    x = _fresh_input(problem)
    after, forward_peak = allocated_bytes(forward)
    kept.clear()
    x = _fresh_input(problem)
    _, both_peak = allocated_bytes(both)
    return after, forward_peak, both_peak


def allocated_bytes(call: Callable[[], None]) -> tuple[int, int]:
    """Returns the bytes that call leaves allocated, and the most that were at any time within it.

    It counts what torch's CPU allocator reports to torch's profiler: the exact bytes of tensors, and nothing that a
    library allocates for itself.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    result: Any = profiled.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    totals = list(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))
    return totals[-1], max(totals)


def _fresh_input(problem: Problem) -> Tensor:
    """Returns a copy of x that is no leaf: a layer may overwrite it, and autograd keeps nothing else for it."""
    return problem.x.detach().requires_grad_().clone()


if __name__ == "__main__":
    main()
