"""Times the kernels against the memory traffic that they cannot do without: `python -m benchmarks.kernels`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count as counter
from itertools import product
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import Running, available

from . import oracle
from .cases import Case
from .harness import Contender, check, measure, tolerance
from .machine import last_cache_bytes, residence
from .ranks import World, launch
from .report import Arguments, Report

ABOUT = """Times each kernel of each implementation against a copy or a read, by torch, of the same bytes in the same
run."""
COLUMNS = {
    "case": 19,
    "layout": 13,
    "dtype": 8,
    "buffers": 7,
    "residence": 9,
    "kernel": 15,
    "implementation": 14,
    "p20_microseconds": 16,
    "p50_microseconds": 16,
    "p80_microseconds": 16,
    "gbytes_per_s": 12,
    "bound_fraction": 14,
}
BOUND = "bound"
BUFFERS = ("kept", "rotated")
_DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Rotated buffers take this many times the largest cache, so that none is still there when its turn comes again.
CACHES_OF_ROTATION = 4

# Those that take tensors, of the CPU or of a GPU if there is one.
IMPLEMENTATIONS: dict[str, Any] = {
    i.name: i for i in available() if i.absence() or any(i.serves(torch.empty(0, device=device)) for device in _DEVICES)
}


@dataclass(frozen=True)
class Vectors:
    """What kernels get beside the large arrays, right for them: weight and bias (c,), and what other kernels return."""

    weight: Tensor
    bias: Tensor
    moments: Tensor
    statistics: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Kernel:
    """One kernel of the contract.

    Attributes:
        arrays: the large arrays that it reads or writes, each of which it passes over once.
        call: calls it, from (implementation, arrays, vectors); it returns what the kernel is for.
        expected: which of the oracle's results that is.
        bound: moves the same bytes: reads with sum, writes with copy_ or add, on the arrays seen as int64.
        updated: small arrays that it works on in place, of the oracle's names.
    """

    arrays: tuple[str, ...]
    call: Callable[[Any, dict[str, Tensor], Vectors], Tensor]
    expected: str
    bound: Callable[[dict[str, Tensor]], Any]
    updated: tuple[str, ...] = ()


def _stats(k: Any, a: dict[str, Tensor], _: Vectors) -> Any:
    return k.stats(a["x"], None)


def _normalise(k: Any, a: dict[str, Tensor], v: Vectors) -> Any:
    running = Running(a["running_mean"], a["running_var"], a["num_batches_tracked"], oracle.MOMENTUM)
    k.normalise(a["x"], a["statistics"], None, running, oracle.EPS, v.weight, v.bias, a["y"])
    return a["y"]


def _backward_reduce(k: Any, a: dict[str, Tensor], v: Vectors) -> Any:
    return k.backward_reduce(a["dy"], a["x"], v.statistics, v.weight, v.bias)


def _backward_elemt(k: Any, a: dict[str, Tensor], v: Vectors) -> Any:
    k.backward_elemt(a["dy"], a["x"], v.statistics, v.weight, v.bias, v.sums, a["dx"])
    return a["dx"]


KERNELS = {
    "stats": Kernel(("x",), _stats, "moments", lambda a: a["x"].sum()),
    "normalise": Kernel(
        ("x", "y"),
        _normalise,
        "y",
        lambda a: a["y"].copy_(a["x"]),
        ("statistics", "running_mean", "running_var", "num_batches_tracked"),
    ),
    "backward_reduce": Kernel(("dy", "x"), _backward_reduce, "sums", lambda a: (a["dy"].sum(), a["x"].sum())),
    "backward_elemt": Kernel(
        ("dy", "x", "dx"), _backward_elemt, "dx", lambda a: torch.add(a["dy"], a["x"], out=a["dx"])
    ),
}


class Problem:
    """A case's arrays, one set or several, and what the kernels must compute from each of them.

    Attributes:
        vectors: what kernels get beside the arrays.
    """

    def __init__(self, ncs: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.ncs, self.device = dtype, ncs, device
        x, dy = (torch.randn(ncs, generator=generator) for _ in range(2))
        self._arrays = {"x": x.mul_(1.5).add_(0.5).to(dtype), "dy": dy.to(dtype)}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = ((torch.rand(ncs[1], generator=generator) + 0.5).to(wide) for _ in range(2))
        whole: Callable[[Tensor], Tensor] = lambda v: v  # noqa: E731
        forward = oracle.forward(self._arrays["x"], weight, bias, None, "none", whole)
        backward = oracle.backward(self._arrays["dy"], self._arrays["x"], weight, forward, "none", whole)
        self.expected = {**forward._asdict(), **backward._asdict(), "num_batches_tracked": torch.ones(()).double()}
        vectors = weight, bias, forward.moments, forward.statistics, backward.sums
        self.vectors = Vectors(*(v.to(device) for v in vectors))

    def array_sets(self, names: Sequence[str], sets: int) -> list[dict[str, Tensor]]:
        """Returns that many sets of the named arrays, filled, each array at an address that 64 divides."""
        size = math.prod(self.ncs)
        step = -(-size // 64) * 64
        made = {}
        for name in names:
            memory = torch.zeros(sets, step, dtype=self.dtype, device=self.device)
            if name in self._arrays:
                memory[:, :size] = self._arrays[name].flatten()
            made[name] = [row[:size].view(self.ncs) for row in memory]
        return [{name: made[name][i] for name in names} for i in range(sets)]

    def small(self) -> dict[str, Tensor]:
        """Returns fresh arrays for normalise, which updates them in place; `statistics` starts as the moments."""
        running = torch.zeros(2, self.ncs[1], dtype=self.vectors.weight.dtype, device=self.device)
        running[1] = 1
        tracked = torch.zeros((), dtype=torch.int64, device=self.device)
        buffers = {"running_mean": running[0], "running_var": running[1], "num_batches_tracked": tracked}
        return {"statistics": self.vectors.moments.clone(), **buffers}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = Arguments("kernels", ABOUT, ("float32", "bfloat16"), seconds=0.3, on_gpus=True)
    parser.several("--kernel", KERNELS, "kernels")
    parser.several("--implementation", IMPLEMENTATIONS, "what is timed beside the bound")
    parser.several("--buffers", BUFFERS, "one set of arrays, or one after another")
    launch(run, 0, parser.parse_args(arguments))


def run(world: World, arguments: argparse.Namespace) -> None:
    """Measures all groups: a kernel's implementations and its bound, in one case and one kind of buffers."""
    problems = [
        (case, layout, dtype)
        for case in arguments.case
        for layout in case.layouts(tuple(arguments.layout))
        for dtype in arguments.dtype
    ]
    absent = {name: _absence(name, world.device) for name in arguments.implementation}
    served = {name: IMPLEMENTATIONS[name].module for name in arguments.implementation if not absent[name]}
    total = len(problems) * len(arguments.kernel) * len(arguments.buffers)
    with Report("kernels", COLUMNS, arguments, world, total) as report:
        for name, absence in absent.items():
            if absence:
                report.note(f"skipped: {name}: {absence}")
        for case, layout, dtype in problems:
            problem = Problem(case.ncs(layout), getattr(torch, dtype), world.device)
            for kernel, buffers in product(arguments.kernel, arguments.buffers):
                report.group(f"{case.name} {layout} {dtype} {kernel} {buffers}")
                report.add(_rows(world, arguments, case, layout, dtype, problem, kernel, buffers, served))


def _absence(name: str, device: torch.device) -> str:
    """Returns why kernels cannot be timed on a device, or ""."""
    implementation = IMPLEMENTATIONS[name]
    if (absence := implementation.absence()) or implementation.serves(torch.empty(0, device=device)):
        return str(absence)
    return f"they do not serve {device.type}"


def _rows(
    world: World,
    arguments: argparse.Namespace,
    case: Case,
    layout: str,
    dtype: str,
    problem: Problem,
    name: str,
    buffers: str,
    served: dict[str, Any],
) -> list[dict[str, Any]]:
    kernel = KERNELS[name]
    moved_bytes = len(kernel.arrays) * math.prod(problem.ncs) * problem.dtype.itemsize
    if buffers == "rotated":
        sets, place = max(2, math.ceil(CACHES_OF_ROTATION * last_cache_bytes(world.device) / moved_bytes)), "memory"
    else:
        sets, place = 1, residence(moved_bytes, world.device)
    arrays = problem.array_sets(kernel.arrays, sets)
    for implementation, kernels in served.items():
        small = problem.small()
        computed = kernel.call(kernels, {**arrays[0], **small}, problem.vectors)
        label = f"{case.name} {layout} {dtype}: {implementation}.{name}"
        relative = tolerance(problem.dtype, problem.ncs[0] * problem.ncs[2])
        check(label, computed, problem.expected[kernel.expected], relative)
        for updated in kernel.updated:
            check(f"{label}: {updated}", small[updated], problem.expected[updated], relative)
    times = measure(_contenders(problem, kernel, arrays, served), world, arguments.seconds, arguments.minimum_repeats)
    bound = times[BOUND]
    return [
        {
            "case": case.name,
            "shape": problem.ncs,
            "layout": layout,
            "dtype": dtype,
            "kernel": name,
            "implementation": implementation,
            "buffers": buffers,
            "residence": place,
            "sets": sets,
            "moved_bytes": moved_bytes,
            **asdict(taken),
            "gbytes_per_s": moved_bytes / taken.p50_microseconds / 1e3,
            "bound_fraction": bound.p50_microseconds / taken.p50_microseconds,
        }
        for implementation, taken in times.items()
    ]


def _contenders(
    problem: Problem, kernel: Kernel, arrays: list[dict[str, Tensor]], served: dict[str, Any]
) -> list[Contender]:
    turn = counter()

    def next_set() -> dict[str, Tensor]:
        small = problem.small() if kernel.updated else {}
        return {**arrays[next(turn) % len(arrays)], **small}

    def next_words() -> dict[str, Tensor]:
        large = arrays[next(turn) % len(arrays)]
        return {name: array.flatten().view(torch.int64) for name, array in large.items()}

    def contender(name: str, call: Callable[[Any], Any], make: Callable[[], Any]) -> Contender:
        def prepare() -> Any:
            if len(arrays) == 1:
                call(make())  # the contenders before this one have used the caches for themselves
            return make()

        return Contender(name, call, prepare)

    def kernel_of(kernels: Any) -> Callable[[Any], Any]:
        return lambda a: kernel.call(kernels, a, problem.vectors)

    others = (contender(name, kernel_of(kernels), next_set) for name, kernels in served.items())
    return [contender(BOUND, kernel.bound, next_words), *others]


if __name__ == "__main__":
    main()
