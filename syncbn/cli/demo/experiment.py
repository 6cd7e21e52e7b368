"""The demo's three training runs, as each rank runs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ... import convert_sync_batchnorm, init_process_group
from ...environment import rank_prefix
from .dataset import Dataset, load_digits, load_folder, schedule
from .errors import InputError
from .report import draw, format_table, make_report, write_json
from .training import Result, build_network, fit, largest_difference, wait_for_training

_DEFAULT_COMPARE_STEPS = 10


class Run(NamedTuple):
    """One training of the network.

    Attributes:
        name: in the JSON file.
        label: in the table and the picture.
        distributed: whether every rank trains on its part of each batch, or only rank 0 on whole batches.
        synchronised: whether BatchNorm's statistics are over all ranks.
    """

    name: str
    label: str
    distributed: bool
    synchronised: bool


def experiment(arguments: argparse.Namespace) -> None:
    """Runs the demo's three trainings on this rank; rank 0 prints and writes the report."""
    with init_process_group(device="cpu"):
        _experiment(arguments)


def _experiment(arguments: argparse.Namespace) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data, steps = _prepare(arguments, ranks)
    batch = sum(len(part) for part in steps[0])
    compare_steps = arguments.compare_steps or min(_DEFAULT_COMPARE_STEPS, len(steps))
    if rank == 0:
        print(
            f"{data.name}: {len(data.train_labels)} training and {len(data.test_labels)} test images, "
            f"{len(data.classes)} classes; {len(steps)} steps of {batch} images",
            flush=True,
        )
    runs = (
        Run("one_process", f"one process, batch {batch}, nn.BatchNorm", distributed=False, synchronised=False),
        Run("synchronised", f"{ranks} ranks, syncbn.SyncBatchNorm", distributed=True, synchronised=True),
        Run("unsynchronised", f"{ranks} ranks, nn.BatchNorm", distributed=True, synchronised=False),
    )
    results = [_train(run, arguments, data, steps, compare_steps) for run in runs]
    if rank == 0:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "data")}
        settings |= {"ranks": ranks, "batch": batch, "steps": len(steps), "compare_steps": compare_steps}
        images = {"name": data.name, "folder": arguments.data, "classes": data.classes}
        images |= {"training_images": len(data.train_labels), "test_images": len(data.test_labels)}
        lines = [_describe(run, result, results[0]) for run, result in zip(runs, results, strict=True)]
        report = make_report(settings, images, lines)
        print(f"\n{format_table(report)}\n", flush=True)
        for path in (write_json(report, Path(arguments.out)), draw(report, Path(arguments.out))):
            print(f"wrote {path}", flush=True)


def _describe(run: Run, result: Result, reference: Result) -> dict[str, Any]:
    """Returns a run's entry in the report."""
    differences = [
        None if result is reference else largest_difference(result.snapshot, reference.snapshot, running_statistics)
        for running_statistics in (False, True)
    ]
    return {
        **run._asdict(),
        "steps": result.steps,
        "train_loss": result.train_loss,
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "seconds": result.seconds,
        "largest_difference_of_parameters": differences[0],
        "largest_difference_of_running_statistics": differences[1],
    }


def _prepare(arguments: argparse.Namespace, ranks: int) -> tuple[Dataset, list[list[Tensor]]]:
    """Reads the images and plans the steps. If that fails on one rank, all ranks raise its InputError."""
    prepared = None
    try:
        prepared = _read_and_plan(arguments, ranks)
        answer: int | str = prepared[0].digest()
    except (InputError, OSError) as error:
        answer = str(error)
    answers: list[Any] = [None] * ranks
    dist.all_gather_object(answers, answer)
    for rank, said in enumerate(answers):
        if isinstance(said, str):
            raise InputError(said if answers.count(said) == ranks else f"{rank_prefix(rank, ranks)}{said}")
    if prepared is None or len(set(answers)) > 1:
        raise InputError(
            f"expected the same images on every rank; got different ones (checksums {answers}): "
            "copy the folder to every machine, or share it"
        )
    return prepared


def _read_and_plan(arguments: argparse.Namespace, ranks: int) -> tuple[Dataset, list[list[Tensor]]]:
    if arguments.ranks not in (None, ranks):
        raise InputError(f"expected --ranks to be that of the launcher, {ranks}; got {arguments.ranks}: leave it out")
    data = load_digits() if arguments.data is None else load_folder(Path(arguments.data), arguments.image_size)
    batch = arguments.batch or ranks
    steps = schedule(data.train_labels, ranks, batch, arguments.epochs, arguments.shards, arguments.seed)
    steps = steps[: arguments.max_steps]
    if (arguments.compare_steps or 0) > len(steps):
        raise InputError(
            f"expected --compare-steps of at most the {len(steps)} steps of a run; got {arguments.compare_steps}: "
            "lower it, or train for longer"
        )
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    return data, steps


def _train(
    run: Run, arguments: argparse.Namespace, data: Dataset, steps: list[list[Tensor]], compare_steps: int
) -> Result:
    """Trains once; every rank must call. Only rank 0's result is complete."""
    rank = dist.get_rank()
    if rank and not run.distributed:
        wait_for_training(len(steps))
        return Result()
    network: nn.Module = build_network(data.train_images.shape[1], len(data.classes), arguments.seed)
    model = network
    if run.synchronised:
        model = network = convert_sync_batchnorm(network)
    if run.distributed:
        model = DistributedDataParallel(network)
    batches = [parts[rank] if run.distributed else torch.cat(parts) for parts in steps]
    uneven = run.distributed and len({len(part) for part in steps[0]}) > 1
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=len(steps), desc=run.label, unit="step", disable=None if rank == 0 else True) as bar:
        result = fit(
            model, network, data, batches, arguments.lr, compare_steps, uneven, tests=rank == 0, progress=bar.update
        )
    if rank == 0:
        print(f"{run.label}: {result.test_accuracy[-1]:.3f} test accuracy in {result.seconds:.1f} s", flush=True)
    return result
