"""Times layers, forward, backward and both: `python -m benchmarks.layer`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch

from .cases import Case
from .harness import Contender, Times, WrongResultError, measure
from .implementations import BASE, OPERATIONS, Implementation, Layer, Problem
from .ranks import World, launch, launch_over_mpi
from .report import Arguments, Report, positive

ABOUT = """Times syncbn.SyncBatchNorm and SyncBatchNormAct against nn.BatchNorm, torch.compile'd nn.BatchNorm,
nn.SyncBatchNorm and a naive SyncBatchNorm, in training mode."""
MODES = ("forward", "backward", "both")
COPY = "device copy"  # of the input: on GPUs beside the layers
# How often arrays of the input's size must pass through memory: x for the statistics, and x and y; dy and x for the
# sums, and dy, x and dx; and what a residual and its gradient add.
PASSES = {
    "bn": {"forward": 3, "backward": 5, "both": 8},
    "bn+relu": {"forward": 3, "backward": 5, "both": 8},
    "bn+add+relu": {"forward": 4, "backward": 7, "both": 11},
}
COLUMNS = {
    "case": 19,
    "layout": 13,
    "dtype": 8,
    "operation": 11,
    "mode": 8,
    "implementation": 27,
    "p20_microseconds": 16,
    "p50_microseconds": 16,
    "p80_microseconds": 16,
    "speedup": 7,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = Arguments("layer", ABOUT, ("float32",), seconds=1.0, on_gpus=True)
    parser.several("--mode", MODES, "what is timed")
    parser.several("--operation", OPERATIONS, "the layer, and what follows it")
    parser.add_argument(
        "--implementation",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help=f"names or globs, beside {BASE}; default: all",
    )
    parser.add_argument(
        "--ranks",
        type=positive(int),
        default=0,
        metavar="P",
        help="processes, over Gloo on this host, of GPUs over NCCL; default: one, without a process group",
    )
    parser.add_argument(
        "--comm",
        choices=("gloo", "mpi"),
        default="gloo",
        help="mpi: run over MPI, on the processes of mpirun; default: %(default)s, for --ranks",
    )
    parsed = parser.parse_args(arguments)
    names = {implementation.name for group in OPERATIONS.values() for implementation in group}
    for pattern in parsed.implementation:
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(
                f"expected --implementation to name one, or a glob of names; got {pattern!r}: choose from "
                f"{', '.join(sorted(names))}"
            )
    if parsed.comm == "mpi" and parsed.device != "cpu":
        parser.error("expected --comm mpi on the CPU; got --device cuda: use --ranks, which sends over NCCL there")
    if parsed.comm == "mpi" and parsed.ranks:
        parser.error("expected --ranks or --comm mpi; got both: mpirun -n says how many processes there are")
    if parsed.comm == "mpi":
        launch_over_mpi(run, parsed)
    else:
        launch(run, parsed.ranks, parsed)


def run(world: World, arguments: argparse.Namespace) -> None:
    """Measures all groups: what the arguments select, of which each is compared within itself."""
    groups = [
        (case, layout, dtype, operation)
        for case in arguments.case
        for layout in case.layouts(tuple(arguments.layout))
        for dtype, operation in product(arguments.dtype, arguments.operation)
    ]
    columns = COLUMNS if world.device.type == "cpu" else {**COLUMNS, "gbytes_per_s": 12}
    with Report("layer", columns, arguments, world, len(groups)) as report:
        for case, layout, dtype, operation in groups:
            report.group(f"{case.name} {layout} {dtype} {operation}")
            report.add(_rows(world, arguments, case, layout, dtype, operation))


def _rows(
    world: World, arguments: argparse.Namespace, case: Case, layout: str, dtype: str, operation: str
) -> list[dict[str, Any]]:
    activation = "relu" if operation.endswith("relu") else "none"
    problem = Problem(case, layout, getattr(torch, dtype), operation, activation, world)
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    for implementation in OPERATIONS[operation]:
        name = implementation.name
        if name != BASE and not any(fnmatchcase(name, pattern) for pattern in arguments.implementation):
            continue
        made = checked(problem, implementation, world)
        if isinstance(made, str):
            reasons[name] = made
        else:
            layers[name] = made
    rows = []
    for mode in arguments.mode:
        contenders = [_contender(name, problem, layer, mode) for name, layer in layers.items()]
        if world.device.type != "cpu":
            contenders.append(_copy(problem))
        times = measure(contenders, world, arguments.seconds, arguments.minimum_repeats)
        rows += [
            {
                "case": case.name,
                "shape": case.shape,
                "layout": layout,
                "dtype": dtype,
                "operation": operation,
                "mode": mode,
                "implementation": name,
                **_columns(times.get(name), times[BASE]),
                **(_bandwidth(problem, operation, mode, name, times.get(name)) if world.device.type != "cpu" else {}),
                "skipped": reasons.get(name),
            }
            for name in [*(i.name for i in OPERATIONS[operation]), COPY]
            if name in times or name in reasons
        ]
    return rows


def _copy(problem: Problem) -> Contender:
    """Returns a copy of the input on its device."""
    y = torch.empty_like(problem.x)
    return Contender(COPY, lambda _: y.copy_(problem.x))


def _bandwidth(problem: Problem, operation: str, mode: str, name: str, times: Times | None) -> dict[str, Any]:
    """Returns the bytes that must pass through memory, and how many do in a second."""
    passes = 2 if name == COPY else PASSES[operation][mode]
    moved_bytes = passes * problem.x.nbytes
    speed = None if times is None else moved_bytes / times.p50_microseconds / 1e3
    return {"moved_bytes": moved_bytes, "gbytes_per_s": speed}


def checked(problem: Problem, implementation: Implementation, world: World) -> Layer | str:
    """Returns a layer whose results are right, or why there is none.

    Raises:
        WrongResultError: its results are wrong.
    """
    if reason := implementation.refusal(world):
        return reason
    layer = problem.layer(implementation)
    try:
        problem.check(implementation, layer)
    except WrongResultError:
        raise
    except Exception as error:
        if not implementation.may_refuse:
            raise
        return f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"
    return layer


def _contender(name: str, problem: Problem, layer: Layer, mode: str) -> Contender:
    x, residual = (None if v is None else v.detach().requires_grad_() for v in (problem.x, problem.residual))
    assert x is not None
    inputs = [v for v in (x, residual, layer.norm.weight, layer.norm.bias) if v is not None]

    def forward(_: Any = None) -> torch.Tensor:
        return problem.run(layer, x, residual)

    def backward(y: torch.Tensor) -> Any:
        # The gradients are returned: none is accumulated, and all are freed while the clock stands.
        return torch.autograd.grad(y, inputs, problem.dy)

    if mode == "forward":
        return Contender(name, forward)
    if mode == "backward":
        return Contender(name, backward, prepare=forward)
    return Contender(name, lambda _: backward(forward()))


def _columns(times: Times | None, base: Times) -> dict[str, Any]:
    if times is None:
        return {**dict.fromkeys(Times.__dataclass_fields__), "speedup": None}
    return {**asdict(times), "speedup": base.p50_microseconds / times.p50_microseconds}


if __name__ == "__main__":
    main()
