"""Steps of compiled models, for `python -m benchmarks.step --compile`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import product
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import syncbn

from .harness import Contender, check, measure, tolerance
from .implementations import BASE, FUSED, OURS, Composite, batch_norm
from .ranks import World
from .report import Report

COLUMNS = {
    "model": 12,
    "activation": 10,
    "implementation": 39,
    "p20_microseconds": 16,
    "p50_microseconds": 16,
    "p80_microseconds": 16,
    "speedup": 7,
}
ACTIVATIONS = ("none", "relu")


class Model(NamedTuple):
    """A chain of layers: how many norm layers it has, each behind a 3 x 3 convolution or not, and a rank's batch."""

    layers: int
    shape: tuple[int, ...]
    has_convolutions: bool = False


MODELS = {
    "tiny": Model(8, (32, 64)),
    "tiny-spatial": Model(8, (4, 32, 7, 7)),
    "norms": Model(4, (8, 64, 56, 56)),
    "convolutions": Model(2, (8, 64, 56, 56), has_convolutions=True),
}


def _composite(norm: Callable[..., nn.Module]) -> Callable[[int, str], nn.Module]:
    def make(channels: int, activation: str) -> nn.Module:
        layer = norm(channels)
        return layer if activation == "none" else Composite(layer, activation)

    return make


def _fused(channels: int, activation: str) -> nn.Module:
    return syncbn.SyncBatchNormAct(channels, act=activation)


# What makes a norm layer with its activation.
NORMS = {
    BASE: _composite(partial(batch_norm, dtype=torch.float32)),
    OURS: _composite(syncbn.SyncBatchNorm),
    FUSED: _fused,
}


def run(world: World, arguments: argparse.Namespace) -> None:
    """Measures all chains; what one is made of, compiled and not, is compared within one group."""
    groups = list(product(arguments.chain, ACTIVATIONS))
    group: Any = syncbn.init_process_group("gloo", device="cpu") if world.size > 1 else nullcontext()
    with group, Report("step", COLUMNS, arguments, world, len(groups)) as report:
        for model, activation in groups:
            report.group(f"{model} {activation}")
            report.add(_rows(world, arguments, model, activation))


def _rows(world: World, arguments: argparse.Namespace, name: str, activation: str) -> list[dict[str, Any]]:
    """Returns the rows of one chain, each implementation checked, then all timed."""
    torch._dynamo.reset()
    model, batch = MODELS[name], _batch(MODELS[name], world.rank)
    contenders = []
    for norm in NORMS if activation != "none" else (BASE, OURS):
        for is_compiled in (False, True):
            label = f"torch.compile({norm})" if is_compiled else norm
            step = Step(model, norm, activation, is_compiled, *batch)
            _check(f"{name}: {label}", step, model, norm, activation, world)
            contenders.append(Contender(label, step))
    times = measure(contenders, world, arguments.seconds, arguments.minimum_repeats)
    shared = {"model": name, "shape": model.shape, "norm_layers": model.layers, "activation": activation}
    return [
        {
            **shared,
            "implementation": label,
            **asdict(found),
            "speedup": times[BASE].p50_microseconds / found.p50_microseconds,
        }
        for label, found in times.items()
    ]


class Step:
    """A chain, to call: forward, and the gradients of its input and its parameters.

    Args:
        model: the chain.
        norm: one of NORMS.
        activation: after each norm.
        is_compiled: by torch.compile.
        x, dy: this rank's batch, and the gradient of the result; their dtype is the chain's.
    """

    def __init__(self, model: Model, norm: str, activation: str, is_compiled: bool, x: Tensor, dy: Tensor) -> None:
        channels = model.shape[1]
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(model.layers):
            if model.has_convolutions:
                layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            layers.append(NORMS[norm](channels, activation))
        self.net = nn.Sequential(*layers).to(x.dtype)  # at the end, for the same parameters in every dtype
        self.x, self.dy = x.detach().requires_grad_(), dy
        self._inputs = [self.x, *self.net.parameters()]
        self._call = _compiled(self.net) if is_compiled else self.net

    def __call__(self, _: Any = None) -> tuple[Tensor, ...]:
        y = self._call(self.x)
        return y, *torch.autograd.grad(y, self._inputs, self.dy)


def _compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y: Tensor = net(x)
        return y

    # Of a code object of its own, for torch.compile keeps what it compiled by code objects, and tries one by one.
    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _batch(model: Model, rank: int) -> tuple[Tensor, Tensor]:
    """Returns a rank's x and dy; ranks have other means, so that it shows whether a layer is synchronised."""
    generator = torch.Generator().manual_seed(rank)
    x, dy = (torch.randn(model.shape, generator=generator) for _ in range(2))
    return x.add_(rank), dy


def _check(label: str, step: Step, model: Model, norm: str, activation: str, world: World) -> None:
    """Compares a step's results with those of nn.BatchNorm in float64, on one process, of the whole batch.

    Raises:
        WrongResultError: they differ.
    """
    ranks = [world.rank] if norm == BASE else range(world.size)  # which nn.BatchNorm normalises together
    batches = [_batch(model, rank) for rank in ranks]
    x, dy = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    exact = Step(model, BASE, activation, False, x, dy)
    y, dx, *gradients = exact()
    mine = slice(0, len(x)) if norm == BASE else slice(world.rank * len(step.x), (world.rank + 1) * len(step.x))
    found_y, found_dx, *found = step()
    if norm != BASE:  # each rank has the gradients of its own elements
        found = [world.sum(v) for v in found]
    # Each layer adds its errors, as does each convolution.
    relative = tolerance(torch.float32, x.numel() // model.shape[1]) * model.layers * (1 + model.has_convolutions)
    check(f"{label}: output", found_y, y[mine].detach(), relative)
    # Where an activation's argument is as near to 0 as its error either slope is right. Arguments are about normal, so
    # in each layer there are 0.8 * relative such elements, each of which may be off by its size.
    kinks = math.sqrt(0.8 * relative * model.layers) if activation != "none" else 0.0
    for name, got, expected in (
        ("dx", found_dx, dx[mine]),
        ("gradients", _flat(found), _flat(gradients)),
        ("running statistics", _flat(_running(step.net)), _flat(_running(exact.net))),
    ):
        error = (got.double() - expected).norm() / expected.norm()
        allowed = relative + (kinks if "running" not in name else 0.0)
        check(f"{label}: {name}", (1 + error).view(1), torch.ones(1, dtype=torch.float64), allowed)


def _running(net: nn.Module) -> list[Tensor]:
    return [v for name, v in net.named_buffers() if "running" in name]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([v.detach().flatten() for v in tensors])
