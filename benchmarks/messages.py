"""Times the message of a layer, one all_reduce: `mpirun -n 2 python -m mpi4py -m benchmarks.messages`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm import as_communicator

from .harness import Contender, Times, check, measure
from .ranks import World, launch_over_mpi
from .report import Arguments, Report, positive

ABOUT = """Times an in-place all_reduce of the 2C + 1 float64 that a layer of C channels sends forward: over MPI, by
mpi4py alone and by syncbn's communicator, in shared memory, and over torch.distributed. Runs on mpirun's processes."""
COLUMNS = {
    "channels": 8,
    "message_bytes": 13,
    "implementation": 26,
    "p20_microseconds": 16,
    "p50_microseconds": 16,
    "p80_microseconds": 16,
    "p95_microseconds": 16,
}
# Name, and the module that registers it, of the backends of torch.distributed.
BACKENDS = {
    "torch.distributed, mpi4py": ("mpi4py", "syncbn.mpi"),
    "torch.distributed, gloo": ("gloo", "torch"),
}


class Way(NamedTuple):
    """A way to sum over ranks.

    Attributes:
        all_reduce: sums in place what it is given.
        given: makes that from a tensor, of the same memory, while the clock stands.
    """

    all_reduce: Callable[[Any], Any]
    given: Callable[[Tensor], Any] = lambda message: message


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = Arguments("messages", ABOUT, None, seconds=1.0)
    parser.add_argument(
        "--channels",
        nargs="+",
        type=positive(int),
        default=[64, 512, 2048],
        metavar="C",
        help="sizes of the message, as channels of a layer; default: %(default)s",
    )
    launch_over_mpi(run, parser.parse_args(arguments))


def run(world: World, arguments: argparse.Namespace) -> None:
    """Measures all sizes. What takes microseconds is compared in one group, torch.distributed's ways in another."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(world.process_group.bcast(folder), "store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size)
        torchs, reasons = _over_torch()
        world.barrier()
    with Report("messages", COLUMNS, arguments, world, len(arguments.channels)) as report:
        for channels in arguments.channels:
            report.group(f"{channels} channels")
            times: dict[str, Times] = {}
            for ways in (_quick(world), torchs):
                contenders = [_contender(name, way, channels, world) for name, way in ways.items()]
                times |= measure(contenders, world, arguments.seconds, arguments.minimum_repeats)
            shared = {"channels": channels, "message_bytes": 8 * (2 * channels + 1)}
            report.add(
                [{**shared, "implementation": name, **asdict(t), "skipped": None} for name, t in times.items()]
                + [
                    {**shared, "implementation": name, **dict.fromkeys(Times.__dataclass_fields__), "skipped": reason}
                    for name, reason in reasons.items()
                ]
            )
    dist.destroy_process_group()


def _quick(world: World) -> dict[str, Way]:
    from mpi4py import MPI

    comm = world.process_group
    return {
        "mpi4py": Way(lambda message: comm.Allreduce(MPI.IN_PLACE, message), lambda message: message.numpy()),
        "syncbn.comm, mpi4py": Way(as_communicator(comm).all_reduce),
        # Not over Gloo, but for its first message: see syncbn/comm/shared_memory.py.
        "syncbn.comm, shared memory": Way(as_communicator(dist.group.WORLD).all_reduce),
    }


def _over_torch() -> tuple[dict[str, Way], dict[str, str]]:
    """Returns a way for each backend of torch.distributed that is here, and why the others are not."""
    found: dict[str, Way] = {}
    reasons: dict[str, str] = {}
    for name, (backend, module) in BACKENDS.items():
        if importlib.util.find_spec(module) is None:
            reasons[name] = f"there is no {module}"
            continue
        importlib.import_module(module)
        group = dist.new_group(backend=backend)
        found[name] = Way(functools.partial(dist.all_reduce, group=group))
    return found, reasons


def _contender(name: str, way: Way, channels: int, world: World) -> Contender:
    """Returns what is timed, after a check of its result.

    Raises:
        WrongResultError: it does not sum.
    """
    generator = torch.Generator().manual_seed(world.rank)
    message = torch.randn(2 * channels + 1, dtype=torch.float64, generator=generator)
    given, expected = way.given(message), world.sum(message)
    way.all_reduce(given)
    check(name, message, expected, 1e-14 * world.size)

    def prepare() -> Any:
        message.fill_(1.0)
        return given

    return Contender(name, way.all_reduce, prepare)


if __name__ == "__main__":
    main()
