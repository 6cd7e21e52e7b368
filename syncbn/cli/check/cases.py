"""The cases of `syncbn check`: a layer's forward and backward, against float64 nn.BatchNorm on the whole batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import SyncBatchNorm
from ... import numpy as numpy_frontend
from ...comm import as_communicator
from .tolerance import allowed_errors

_CHANNELS, _SIDES = 5, (6, 7)
_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_NORMS: dict[int, type[_Norm]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}


class Case(NamedTuple):
    """One comparison.

    Attributes:
        split: of the batch over the ranks: even, uneven, or one rank empty.
        frontend: torch or numpy.
        dtype: of the input.
        memory: contiguous, channels last, or 2-D for input of shape (N, C).
        synchronised: False for the negative control.
    """

    split: str
    frontend: str
    dtype: str
    memory: str
    synchronised: bool = True

    def __str__(self) -> str:
        if not self.synchronised:
            return "negative control: nn.BatchNorm, not synchronised"
        return f"{self.split}, {self.frontend}, {self.dtype}, {self.memory}"


class Outcome(NamedTuple):
    """One rank's result.

    Attributes:
        ratio: the largest error / allowed.
        error, allowed, quantity: the error with that ratio, its bound, and the result it is in.
        seconds: for forward and backward.
        failure: the error that this rank raised, or "".
    """

    ratio: float
    error: float
    allowed: float
    quantity: str
    seconds: float
    failure: str = ""


def all_cases(ranks: int) -> Iterator[Case]:
    """Yields the cases for that number of ranks. One rank has no splits and no negative control."""
    splits = ("even", "uneven", "one rank empty") if ranks > 1 else ("whole",)
    for split in splits:
        memories = ("contiguous", "channels last")
        for dtype, memory in itertools.product(("float32", "bfloat16", "float16", "float64"), memories):
            yield Case(split, "torch", dtype, memory)
        yield Case(split, "torch", "float32", "2-D")
        for dtype, memory in itertools.product(("float32", "float64"), memories):
            yield Case(split, "numpy", dtype, memory)
    if ranks > 1:
        yield Case("uneven", "torch", "float32", "contiguous", synchronised=False)


def compare(case: Case, seed: int, rank: int, ranks: int, group: Any) -> Outcome:
    """Runs one case and compares this rank's results with float64 nn.BatchNorm on the whole batch.

    Collective:
        the layer's, and one all_reduce of 2C float64 to sum the parameters' gradients.
    """
    sizes = _sizes(case.split, ranks)
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, dy, layer = _batch(case, sum(sizes), seed)
    expected = _reference(x, dy, layer)
    allowed = allowed_errors(
        _flat(x.double()), _flat(dy.double()), sizes, layer.state_dict(), expected, layer.eps, 0.1, x.dtype
    )
    run = {"torch": _run_torch, "numpy": _run_numpy}[case.frontend] if case.synchronised else _run_unsynchronised
    start = time.perf_counter()
    got = run(x[part], dy[part], layer, group)
    seconds = time.perf_counter() - start
    gradients = torch.cat([got["grad_weight"].double(), got["grad_bias"].double()])
    as_communicator(group).all_reduce(gradients)
    got["grad_weight"], got["grad_bias"] = gradients.chunk(2)
    worst = Outcome(0.0, 0.0, 0.0, "all", seconds)
    for name, bound in allowed.items():
        mine = part if name in ("y", "dx") else slice(None)
        exact, limit = expected[name][mine], bound[mine].flatten()
        error = (got[name].double().reshape(exact.shape) - exact).abs().flatten()
        ratio = (error / limit).nan_to_num(nan=float("inf"))
        if len(ratio) and float(ratio.max()) > worst.ratio:
            at = int(ratio.argmax())
            worst = Outcome(float(ratio[at]), float(error[at]), float(limit[at]), name, seconds)
    return worst


def _sizes(split: str, ranks: int) -> list[int]:
    """Returns the number of samples on each rank."""
    if split == "uneven":
        return [rank + 1 for rank in range(ranks)]
    return [0 if split == "one rank empty" and rank == ranks // 2 else 3 for rank in range(ranks)]


def _batch(case: Case, samples: int, seed: int) -> tuple[Tensor, Tensor, _Norm]:
    """Returns x, dy and the initial layer, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dtype = getattr(torch, case.dtype)
    shape = (samples, _CHANNELS) if case.memory == "2-D" else (samples, _CHANNELS, *_SIDES)
    per_channel = (1, _CHANNELS, *[1] * (len(shape) - 2))
    x = (2 * random(*shape) + 3 * random(*per_channel)).to(dtype)
    dy = (random(*shape) + random(*per_channel)).to(dtype)
    if case.memory == "channels last":
        x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    layer = _NORMS[len(shape)](_CHANNELS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for vector in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert vector is not None
            vector.copy_(random(_CHANNELS).abs() + 0.5)
    return x, dy, layer


def _reference(x: Tensor, dy: Tensor, layer: _Norm) -> dict[str, Tensor]:
    """Returns the results of float64 nn.BatchNorm on the whole batch, y and dx as (n, c, s)."""
    exact = type(layer)(_CHANNELS, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    result = _differentiate(exact, x.double(), dy.double())
    return result | {"y": _flat(result["y"]), "dx": _flat(result["dx"])}


def _flat(v: Tensor) -> Tensor:
    """(N, C, ...) -> (n, c, s)."""
    return v.reshape(*v.shape[:2], -1)


def _differentiate(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Runs a torch layer forward and backward once."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.register_hook(lambda _: dy)  # y.backward(dy) imports sympy, for seconds, on every rank
    y.sum().backward()
    assert x.grad is not None
    gradients = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


def _run_torch(x: Tensor, dy: Tensor, layer: _Norm, group: Any) -> dict[str, Tensor]:
    synchronised = SyncBatchNorm(_CHANNELS, process_group=group, dtype=layer.weight.dtype)
    synchronised.load_state_dict(layer.state_dict())
    return _differentiate(synchronised, x, dy)


def _run_unsynchronised(x: Tensor, dy: Tensor, layer: _Norm, _: Any) -> dict[str, Tensor]:
    return _differentiate(layer, x, dy)


def _run_numpy(x: Tensor, dy: Tensor, layer: _Norm, group: Any) -> dict[str, Tensor]:
    synchronised = numpy_frontend.SyncBatchNorm(
        _CHANNELS, comm=as_communicator(group), dtype=layer.weight.detach().numpy().dtype
    )
    synchronised.load_state_dict(layer.state_dict())
    arrays = {"y": synchronised.forward(x.numpy()), "dx": synchronised.backward(dy.numpy())}
    for name in ("grad_weight", "grad_bias", "running_mean", "running_var"):
        arrays[name] = getattr(synchronised, name)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
