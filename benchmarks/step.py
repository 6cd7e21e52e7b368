"""Times a training step under DistributedDataParallel: `mpirun -n 2 python -m mpi4py -m benchmarks.step`.

On GPUs: `torchrun --nproc-per-node 2 -m benchmarks.step --device cuda`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.environment import read_environment

from . import compiled
from .harness import Contender, check, measure
from .implementations import BASE, OURS, NaiveSyncBatchNorm
from .ranks import World, launch, launch_over_mpi
from .report import Arguments, Report, positive
from .resnet import SHAPES, resnet

ABOUT = """Times training steps of a ResNet under DistributedDataParallel, with nn.BatchNorm, syncbn.SyncBatchNorm and
a naive SyncBatchNorm: all messages over MPI (the backend mpi4py) and all over Gloo. Runs on the processes of mpirun.
With --device cuda also with torch.nn.SyncBatchNorm, and with syncbn.SyncBatchNorm over a group of its own: all messages
over NCCL. Runs on the processes of torchrun, or any launcher. With --compile it times chains of norm layers on CPUs
instead, with and without torch.compile, also on one process."""
COLUMNS = {
    "model": 9,
    "messages_over": 13,
    "implementation": 22,
    "p20_microseconds": 16,
    "p50_microseconds": 16,
    "p80_microseconds": 16,
    "speedup": 7,
    "round_trip_microseconds": 23,
}
TRANSPORTS = ("mpi4py", "gloo")
# In float64, of the largest gradient: roundoff, 1e-16, through some 20 layers that can each enlarge it several times. A
# layer that is not synchronised is off by 1e-1.
RELATIVE = 1e-8
CHECKED_IMAGES = 2
ROUND_TRIPS = 200


def _naive(net: nn.Module, group: Any) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = NaiveSyncBatchNorm
            module.process_group = group
    return net


# What each makes of a network with nn.BatchNorm, for ranks of a group.
CONVERSIONS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    BASE: lambda net, _: net,
    OURS: syncbn.convert_sync_batchnorm,
    "naive SyncBatchNorm": _naive,
}
# And of a network on GPUs.
CONVERSIONS_ON_GPUS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    f"{OURS}, own group": lambda net, _: syncbn.convert_sync_batchnorm(net, "own"),
    "nn.SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = Arguments("step", ABOUT, None, seconds=30.0, on_gpus=True)
    parser.several("--model", SHAPES, "networks")
    parser.add_argument(
        "--batch", type=positive(int), default=8, metavar="N", help="images of a rank; default: %(default)s"
    )
    parser.add_argument(
        "--image", type=positive(int), default=64, metavar="P", help="their side, in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="in place of networks: chains of norm layers, with and without torch.compile; on one process, too",
    )
    parser.several("--chain", compiled.MODELS, "with --compile: chains")
    parsed = parser.parse_args(arguments)
    if parsed.compile and parsed.device == "cuda":
        parser.error("expected --compile on CPUs; got --device cuda: leave one of them out")
    if parsed.device == "cuda":
        run_on_gpus(parsed)
    elif parsed.compile and not _is_launched():
        launch(compiled.run, 0, parsed)
    else:
        launch_over_mpi(compiled.run if parsed.compile else run, parsed)


def _is_launched() -> bool:
    """Whether mpirun started this as one of several processes."""
    found = read_environment()
    return found is not None and found.world_size > 1


def run_on_gpus(arguments: argparse.Namespace) -> None:
    """Measures all networks on the GPUs of the processes that a launcher started."""
    with syncbn.init_process_group(device="cuda") as joined:
        world = World(device=joined.device)
        with Report("step", COLUMNS, arguments, world, len(arguments.model)) as report:
            for model in arguments.model:
                report.group(model)
                report.add(_rows(world, arguments, model, {"nccl": dist.group.WORLD}))


def run(world: World, arguments: argparse.Namespace) -> None:
    """Measures all networks; what one is trained with, and over what, is compared within one group."""
    importlib.import_module("syncbn.mpi")  # registers its backend; it starts MPI, which importing this must not
    with syncbn.init_process_group("gloo", device="cpu"):
        groups = {transport: dist.new_group(backend=transport) for transport in TRANSPORTS}
        with Report("step", COLUMNS, arguments, world, len(arguments.model)) as report:
            for model in arguments.model:
                report.group(model)
                report.add(_rows(world, arguments, model, groups))


def _rows(world: World, arguments: argparse.Namespace, model: str, groups: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of one network, each checked, then timed."""
    names = [*CONVERSIONS] if world.device.type == "cpu" else [*CONVERSIONS, *CONVERSIONS_ON_GPUS]
    ways = {f"{name} over {transport}": (name, transport) for transport, name in product(groups, names)}
    contenders = []
    for label, (name, transport) in ways.items():
        _check(label, model, name, groups[transport], world, arguments.image)
        batch = _batch(world.rank, arguments.batch, arguments.image)
        step = Step(model, name, groups[transport], torch.float32, batch, world.device)
        contenders.append(Contender(label, step))
    round_trip = None if world.process_group is None else _round_trip_microseconds(world)
    times = measure(contenders, world, arguments.seconds, arguments.minimum_repeats)
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in resnet(SHAPES[model]).modules())
    shared = {"model": model, "shape": [arguments.batch, 3, arguments.image, arguments.image], "norm_layers": layers}
    return [
        {
            **shared,
            "messages_over": transport,
            "implementation": name,
            **asdict(times[label]),
            "speedup": times[f"{BASE} over {transport}"].p50_microseconds / times[label].p50_microseconds,
            "round_trip_microseconds": round_trip,
        }
        for label, (name, transport) in ways.items()
    ]


class Step:
    """A network under DistributedDataParallel and its optimizer, to call: one step, always on the same batch.

    Args:
        model: one of SHAPES.
        name: one of CONVERSIONS, or of CONVERSIONS_ON_GPUS.
        group: that all messages go over.
        dtype: of parameters and images.
        batch: this rank's images and labels.
        device: of all of it.
    """

    def __init__(
        self,
        model: str,
        name: str,
        group: Any,
        dtype: torch.dtype,
        batch: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> None:
        net = (CONVERSIONS | CONVERSIONS_ON_GPUS)[name](_network(model, dtype).to(device), group)
        self.net = DistributedDataParallel(net, process_group=group)
        self._optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self._images, self._labels = batch[0].to(device, dtype), batch[1].to(device)

    def __call__(self, _: Any = None) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.net(self._images), self._labels))
        self._optimizer.step()


def _network(model: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return resnet(SHAPES[model]).to(dtype)


def _batch(rank: int, images: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(images, 3, side, side, generator=generator)
    return x, torch.randint(1000, (images,), generator=generator)


def _check(label: str, model: str, name: str, group: Any, world: World, side: int) -> None:
    """Compares the gradients and running statistics of a step with those of one process, in float64.

    Raises:
        WrongResultError: they differ.
    """
    batches = [_batch(rank, CHECKED_IMAGES, side) for rank in range(world.size)]
    step = Step(model, name, group, torch.float64, batches[world.rank], world.device)
    step()
    if name == BASE:  # each rank by itself; DistributedDataParallel averages
        parts, mine = batches, world.rank
    else:
        parts, mine = [(torch.cat([x for x, _ in batches]), torch.cat([labels for _, labels in batches]))], 0
    gradients: list[Tensor] = []
    for part, (images, labels) in enumerate(parts):
        net = _network(model, torch.float64)
        torch.autograd.backward(F.cross_entropy(net(images.double()), labels))
        gradients.append(_flat(p.grad for p in net.parameters()))
        if part == mine:
            statistics = _statistics(net)
    check(f"{label}: gradients", _flat(p.grad for p in step.net.parameters()), torch.stack(gradients).mean(0), RELATIVE)
    check(f"{label}: running statistics", _statistics(step.net.module), statistics, RELATIVE)


def _statistics(net: nn.Module) -> Tensor:
    return _flat(v for name, v in net.named_buffers() if "running" in name)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([v.detach().flatten() for v in tensors])


def _round_trip_microseconds(world: World) -> float:
    """Returns how long an empty message of MPI's takes from rank 0 to the last and back: on rank 0, the median."""
    comm, last, nothing = world.process_group, world.size - 1, bytearray()
    samples = []
    world.barrier()
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter_ns()
        if world.rank == 0:
            comm.Send(nothing, last)
            comm.Recv(nothing, last)
        elif world.rank == last:
            comm.Recv(nothing, 0)
            comm.Send(nothing, 0)
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return median(samples)


if __name__ == "__main__":
    main()
