"""The demo's network, its training loop, and the difference between two trained networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ... import scale_loss
from .dataset import Dataset

Snapshot = dict[str, Tensor]
_EVALUATIONS = 25
_MOMENTUM = 0.9
_TEST_CHUNK = 512  # images


@dataclass
class Result:
    """The result of one run. On ranks other than 0 the test's lists stay empty.

    Attributes:
        steps: at which train_loss, test_accuracy and test_loss were evaluated.
        train_loss: mean over all ranks' images since the previous evaluation.
        test_accuracy, test_loss: of rank 0's network in evaluation mode.
        seconds: for the whole run, with evaluations.
        snapshot: rank 0's parameters and running statistics after compare_steps steps.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    snapshot: Snapshot = field(default_factory=dict)


def build_network(channels: int, classes: int, seed: int) -> nn.Sequential:
    """Returns three convolutions, each with BatchNorm and ReLU, and a linear layer, initialised from seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *_block(channels, 16),
        nn.MaxPool2d(2, ceil_mode=True),
        *_block(16, 32),
        *_block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def evaluation_steps(steps: int) -> list[int]:
    """Returns the steps, counted from 1, after which to evaluate; the last step is one of them.

    >>> evaluation_steps(3)
    [1, 2, 3]
    """
    count = min(_EVALUATIONS, steps)
    return [steps * (i + 1) // count for i in range(count)]


def fit(
    model: nn.Module,
    network: nn.Module,
    data: Dataset,
    batches: list[Tensor],
    lr: float,
    compare_steps: int,
    uneven: bool,
    tests: bool,
    progress: Callable[[], object],
) -> Result:
    """Trains on this rank's batches.

    Args:
        model: called and differentiated: the network, or DistributedDataParallel around it.
        network: the network.
        data: the images.
        batches: for every step, the indices of this process's training images.
        lr: initial learning rate; it falls linearly to 0.
        compare_steps: the step after which to take the snapshot.
        uneven: whether the ranks' parts of a batch differ in size. Then syncbn.scale_loss makes DDP's mean of the
            ranks' gradients the gradient of the mean loss.
        tests: whether to evaluate, on rank 0.
        progress: called after every step.

    Collective:
        those of model and scale_loss at every step; one all_reduce of 2 float64 at every evaluation. A rank that does
        not train must call wait_for_training instead.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=_MOMENTUM)
    result, start = Result(), time.perf_counter()
    window = torch.zeros(2, dtype=torch.float64)  # summed loss, images
    due = evaluation_steps(len(batches))
    for step, indices in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / len(batches))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_images[indices]), data.train_labels[indices])
        (scale_loss(loss, len(indices)) if uneven else loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        window += torch.tensor([loss.item() * len(indices), len(indices)])
        if step == compare_steps:
            result.snapshot = take_snapshot(network)
        if step == due[len(result.steps)]:
            dist.all_reduce(window)
            result.steps.append(step)
            result.train_loss.append(float(window[0] / window[1]))
            window.zero_()
            if tests:
                accuracy, test_loss = evaluate(network, data)
                result.test_accuracy.append(accuracy)
                result.test_loss.append(test_loss)
        progress()
    result.seconds = time.perf_counter() - start
    return result


def wait_for_training(steps: int) -> None:
    """Waits for another rank's run, joining its all_reduce at every evaluation, so that no timeout expires."""
    for _ in evaluation_steps(steps):
        dist.all_reduce(torch.zeros(2, dtype=torch.float64))


@torch.no_grad()
def evaluate(network: nn.Module, data: Dataset) -> tuple[float, float]:
    """Returns accuracy and mean loss on the test images, in evaluation mode."""
    network.eval()
    correct, loss = 0, 0.0
    for images, labels in zip(
        torch.split(data.test_images, _TEST_CHUNK), torch.split(data.test_labels, _TEST_CHUNK), strict=True
    ):
        logits = network(images)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    network.train()
    return correct / len(data.test_labels), loss / len(data.test_labels)


def take_snapshot(network: nn.Module) -> Snapshot:
    """Returns copies of the parameters and running statistics, float32, by name."""
    return {name: v.detach().clone() for name, v in network.state_dict().items() if v.is_floating_point()}


def largest_difference(snapshot: Snapshot, reference: Snapshot, running_statistics: bool) -> float:
    """Returns the largest relative difference from the reference, over the parameters or the running statistics.

    For one tensor that is max|a - b| / max|b|, where b is the reference.
    """
    return max(
        _relative_difference(snapshot[name], reference[name])
        for name in reference
        if (".running_" in name) == running_statistics
    )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|.

    >>> _relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.5
    """
    difference, scale = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else float("inf")
