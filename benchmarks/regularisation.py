"""Trains on few handwritten digits with several regularisers: `python -m benchmarks.regularisation --output FILE`."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import syncbn
from syncbn.cli.demo.dataset import Dataset, load_digits

from . import intervals
from .machine import fingerprint
from .report import output_path, positive

ABOUT = """Compares BatchNorm with statistics of each rank, SyncBatchNorm, NoisySyncBatchNorm, L1, L2, dropout and
combinations, by the test accuracy of a small network after training on few images. Ranks are parts of a batch in one
process, and all seeds train at once, as groups of one network. FILE gets JSON lines; what it has already is not run
again. Beside it go a picture, FILE.png, and the table in FILE.md."""
RANKS = 4
CHANNELS = (8, 16)
LEARNING_RATE, MOMENTUM = 0.05, 0.9


class Method(NamedTuple):
    """A way to regularise.

    Attributes:
        norm: "rank": statistics of each rank; "sync": of all ranks.
        noise: noise_mean and noise_var of NoisySyncBatchNorm, or 0.
        learns: whether noise is trained, too.
        l1, l2: factors of sum |w| and of sum w^2 / 2, of all weights but those of norm layers.
        dropout: before the last layer.
    """

    norm: str = "sync"
    noise: float = 0.0
    learns: bool = False
    l1: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0


# Strengths were set beforehand, and none was tuned.
BASE = "SyncBN"
L1, L2, DROPOUT, NOISE = 2e-4, 5e-3, 0.3, 0.3
METHODS = {
    "BatchNorm per rank": Method("rank"),
    BASE: Method(),
    "noise 0.1": Method(noise=0.1),
    "noise 0.3": Method(noise=NOISE),
    "noise 0.3 learnt": Method(noise=NOISE, learns=True),
    "L1": Method(l1=L1),
    "L2": Method(l2=L2),
    "dropout": Method(dropout=DROPOUT),
    "noise 0.3 + L2": Method(noise=NOISE, l2=L2),
    "noise 0.3 + dropout": Method(noise=NOISE, dropout=DROPOUT),
    "L2 + dropout": Method(l2=L2, dropout=DROPOUT),
    "noise 0.3 + L2 + dropout": Method(noise=NOISE, l2=L2, dropout=DROPOUT),
}
BATCHES = (2, 8)  # images of a rank
IMAGES = (25, 50, 100, 300)  # for training


class Setting(NamedTuple):
    """What is trained once, with all seeds.

    Attributes:
        method: its name.
        images: the number of training images.
        batch: images of each rank, a step.
        steps: of training.
        seeds: their number; each has training images, initial weights and batches of its own.
    """

    method: str
    images: int
    batch: int
    steps: int
    seeds: int


class BatchNormPerRank(nn.BatchNorm2d):
    """What nn.BatchNorm2d computes under DistributedDataParallel: statistics of each rank's part of the batch.

    Running statistics are those of rank 0, which DistributedDataParallel sends to all.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each of the RANKS parts of a batch by itself."""
        if not self.training:
            return super().forward(input)
        momentum = 0.1 if self.momentum is None else self.momentum
        parts = []
        for rank, part in enumerate(input.chunk(RANKS)):
            running = (self.running_mean, self.running_var) if rank == 0 else (None, None)
            parts.append(F.batch_norm(part, *running, self.weight, self.bias, True, momentum, self.eps))
        return torch.cat(parts)


class Networks(nn.Module):
    """Networks of several seeds as one: the channels of one are a group of its own, and meet those of no other.

    Each has two convolutions with norm layer, ReLU and pooling, and a linear layer.

    Shape:
        input: (N, seeds, 8, 8); the result: (N, seeds, 10).
    """

    def __init__(self, seeds: int, dropout: float = 0.0) -> None:
        super().__init__()
        first, second = CHANNELS
        self.seeds, self.dropout = seeds, nn.Dropout(dropout)
        self.features = nn.Sequential(*_block(1, first, seeds), *_block(first, second, seeds), nn.Flatten())
        self.weight = nn.Parameter(torch.empty(seeds, 10, 4 * second))
        self.bias = nn.Parameter(torch.zeros(seeds, 10))
        weights = [m.weight for m in self.features if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                for w in weights:
                    n, inputs = w.shape[0] // seeds, w[0].numel()
                    w[seed * n : (seed + 1) * n].normal_(0, math.sqrt(2 / inputs), generator=generator)
                self.weight[seed].normal_(0, math.sqrt(1 / (4 * second)), generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """Returns each network's logits for its images."""
        features = self.dropout(self.features(input)).view(len(input), self.seeds, -1)
        logits: Tensor = torch.einsum("nsf,scf->nsc", features, self.weight) + self.bias
        return logits


def _block(inputs: int, outputs: int, seeds: int) -> list[nn.Module]:
    convolution = nn.Conv2d(seeds * inputs, seeds * outputs, 3, padding=1, groups=seeds, bias=False)
    return [convolution, nn.BatchNorm2d(seeds * outputs), nn.ReLU(), nn.MaxPool2d(2)]


def networks(method: Method, seeds: int) -> Networks:
    """Returns networks that regularise so, in training mode."""
    net = Networks(seeds, method.dropout)
    if method.norm == "rank":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = BatchNormPerRank
    elif method.noise:
        syncbn.convert_sync_batchnorm(net, noise=(method.noise, method.noise), seed=0)
        for module in net.modules():
            if isinstance(module, syncbn.NoisySyncBatchNorm) and not method.learns:
                module.noise_mean.requires_grad_(False)
                module.noise_var.requires_grad_(False)
    else:
        syncbn.convert_sync_batchnorm(net)
    return net


def batches(setting: Setting, pool: int) -> Iterator[Tensor]:
    """Yields each step's image indices, (batch of all ranks, seeds), of the setting's images, drawn for each seed."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(setting.seeds)]
    chosen = torch.stack([torch.randperm(pool, generator=g)[: setting.images] for g in generators])
    size = RANKS * setting.batch
    order = torch.empty(setting.seeds, 0, dtype=torch.int64)
    for _ in range(setting.steps):
        while order.shape[1] < size:  # another epoch
            epoch = torch.stack([torch.randperm(setting.images, generator=g) for g in generators])
            order = torch.cat([order, epoch], 1)
        now, order = order[:, :size], order[:, size:]
        yield chosen.gather(1, now).t()


def train(setting: Setting, data: Dataset) -> dict[str, Any]:
    """Trains all seeds of a setting; returns test_accuracy and train_loss (of the last 20 steps) a seed, and noise."""
    method = METHODS[setting.method]
    net = networks(method, setting.seeds)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    of_norms = {id(p) for m in norms for p in m.parameters()}
    weights = [p for p in net.parameters() if id(p) not in of_norms and p is not net.bias]
    others = [p for p in net.parameters() if p.requires_grad and all(p is not w for w in weights)]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": method.l2}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM)
    torch.manual_seed(0)  # dropout's
    images = data.train_images[:, 0]
    losses = []
    for step, indices in enumerate(batches(setting, len(images))):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / setting.steps)) / 2
        logits, labels = net(images[indices]), data.train_labels[indices]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        optimizer.zero_grad()
        loss.mean(0).sum().backward()  # type: ignore[no-untyped-call]  # a mean for each seed, which meet nowhere
        if method.l1:
            for w in weights:
                assert w.grad is not None
                w.grad.add_(w.detach().sign(), alpha=method.l1)
        optimizer.step()
        losses.append(loss.detach().mean(0))
    net.eval()
    with torch.no_grad():
        test = data.test_images.expand(-1, setting.seeds, -1, -1)
        right = net(test).argmax(2) == data.test_labels[:, None]
    noisy = [m for m in norms if isinstance(m, syncbn.NoisySyncBatchNorm)]
    learnt = [float(v.detach().abs().mean()) for m in noisy for v in (m.noise_mean, m.noise_var)]
    return {
        "test_accuracy": [round(v, 6) for v in right.double().mean(0).tolist()],
        "train_loss": [round(v, 6) for v in torch.stack(losses[-20:]).double().mean(0).tolist()],
        "noise": [round(v, 4) for v in learnt],
    }


def settings(steps: int, seeds: int) -> list[Setting]:
    """Returns what the program trains."""
    return [Setting(*chosen, steps, seeds) for chosen in product(METHODS, IMAGES, BATCHES)]


def run(setting: Setting) -> dict[str, Any]:
    """Trains a setting in a process of its own; returns a row."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = train(setting, load_digits())
    seconds = round(time.perf_counter() - start, 2)
    return {"record": "row", "program": "regularisation", **setting._asdict(), **found, "seconds": seconds}


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file that may end in the middle of a line, or not exist."""
    lines = file.read_text().splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return [record for record in records if record.get("record") == "row"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regularisation", description=ABOUT)
    parser.add_argument("--output", type=output_path, required=True, metavar="FILE", help="JSON lines, gone on with")
    number: dict[str, Any] = {"type": positive(int), "metavar": "N"}
    parser.add_argument("--seeds", default=24, help="default: %(default)s", **number)
    parser.add_argument("--steps", default=300, help="of each training; default: %(default)s", **number)
    parser.add_argument("--jobs", default=2, help="processes, of one thread each; default: %(default)s", **number)
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 2:
        parser.error("expected --seeds of at least 2, for an interval; got 1")
    every = settings(parsed.steps, parsed.seeds)
    known = {tuple(row[key] for key in Setting._fields) for row in read(parsed.output)}
    left = [setting for setting in every if tuple(setting) not in known]
    with _appended(parsed.output) as write:
        if left:
            write({**fingerprint("regularisation", 0, None, torch.device("cpu")), "jobs": parsed.jobs})
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(parsed.jobs, mp_context=context) as pool:
            futures = [pool.submit(run, setting) for setting in left]
            bar = tqdm(total=len(every), initial=len(every) - len(left), file=sys.stderr, unit="setting", disable=None)
            with bar:
                for future in as_completed(futures):
                    write(future.result())
                    bar.update()
    wanted = {tuple(setting) for setting in every}
    rows = [row for row in read(parsed.output) if tuple(row[key] for key in Setting._fields) in wanted]
    print(intervals.table(rows, BASE))
    for path in (intervals.draw(rows, BASE, parsed.output), intervals.write(rows, BASE, parsed.output)):
        print(path)


@contextmanager
def _appended(file: Path) -> Iterator[Any]:
    """Opens a file to add records to; a last line that was cut short is removed first."""
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):
        file.write_text(text[: text.rfind("\n") + 1])
    with file.open("a") as opened:

        def write(record: dict[str, Any]) -> None:
            opened.write(json.dumps(record) + "\n")
            opened.flush()

        yield write


if __name__ == "__main__":
    main()
