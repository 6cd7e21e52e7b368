"""One training step of a layer on one rank's part of a batch, for run_ranks, and the comparison with the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import syncbn
import syncbn.numpy
from support import oracle

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(array: Any, dtype: str) -> Any:
    """Returns array rounded to dtype, as a float64 ndarray: what a layer of that input dtype really gets."""
    return torch.as_tensor(array).to(DTYPES[dtype]).double().numpy()


def batch(
    seed: int, shapes: list[tuple[int, ...]], dtype: str = "float32", mean: float = 0.0
) -> tuple[list[Any], list[Any]]:
    """Returns xs, with channel means around `mean` and standard deviations around 1, and dys, one per shape."""
    rng = np.random.default_rng(seed)
    c = shapes[0][1]
    centre, std = rng.normal(mean, 1, c), rng.uniform(0.5, 2, c)

    def column(v: Any, shape: tuple[int, ...]) -> Any:
        return v.reshape((1, c) + (1,) * (len(shape) - 2))

    xs = [rounded(column(centre, s) + column(std, s) * rng.standard_normal(s), dtype) for s in shapes]
    return xs, [rounded(rng.standard_normal(s), dtype) for s in shapes]


def torch_step(
    rank: int,
    group: Any,
    xs: list[Any],
    dys: list[Any],
    dtype: str = "float32",
    layer: nn.Module | None = None,
    formats: tuple[str, str] = ("contiguous", "contiguous"),
) -> dict[str, Any]:
    """Runs forward and backward on part `rank`, by default of a SyncBatchNorm of the group with `parameters`."""
    if layer is None:
        layer = torch_layer(xs[0].shape[1], dtype)
        layer.process_group = group
    x = in_format(torch.from_numpy(xs[rank]).to(DTYPES[dtype]), formats[0]).requires_grad_()
    dy = in_format(torch.from_numpy(dys[rank]).to(DTYPES[dtype]), formats[1])
    y = layer(x)
    y.register_hook(lambda _: dy)  # y.backward(dy) imports sympy, for seconds, in every new process
    y.sum().backward()
    assert y.dtype == x.dtype
    found = {"y": y.detach(), "dx": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return {name: v.double().numpy() for name, v in found.items()} | {"batches": layer.num_batches_tracked.item()}


def numpy_step(rank: int, group: Any, xs: list[Any], dys: list[Any], dtype: str = "float32") -> dict[str, Any]:
    """As torch_step, of the NumPy frontend."""
    c = xs[0].shape[1]
    wide = dtype if dtype == "float64" else "float32"
    layer = syncbn.numpy.SyncBatchNorm(c, comm=group, dtype=wide)
    layer.weight[...], layer.bias[...] = parameters(c)
    y = layer.forward(xs[rank].astype(dtype))
    dx = layer.backward(dys[rank].astype(dtype))
    assert y.dtype == dx.dtype == dtype
    found = {name: np.asarray(getattr(layer, name), np.float64) for name in oracle.FIELDS[2:]}
    return found | {"y": y, "dx": dx, "batches": int(layer.num_batches_tracked)}


def torch_layer(c: int, dtype: str, cls: Any = syncbn.SyncBatchNorm) -> Any:
    """Returns a layer with the parameters of `parameters`; of float64 for float64 input, else float32."""
    layer = cls(c, dtype=torch.float64 if dtype == "float64" else torch.float32)
    weight, bias = parameters(c)
    layer.weight.data.copy_(torch.from_numpy(weight))
    layer.bias.data.copy_(torch.from_numpy(bias))
    return layer


def parameters(c: int) -> tuple[Any, Any]:
    """Returns a weight and a bias, exact in float32."""
    rng = np.random.default_rng(c)
    weight, bias = rng.uniform(0.5, 1.5, c), rng.normal(0, 1, c)
    return weight.astype(np.float32).astype(np.float64), bias.astype(np.float32).astype(np.float64)


def in_format(x: torch.Tensor, format: str) -> torch.Tensor:
    """Returns x with the strides of that name."""
    if format == "channels_last":
        return x.to(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
    if format == "strided":  # no dense memory format at all
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


def distances(results: list[dict[str, Any]], xs: list[Any], dys: list[Any], dtype: str = "float32") -> dict[str, float]:
    """Returns, for each quantity, the ranks' largest distance from the truth in units of the permitted one."""
    weight, bias = parameters(xs[0].shape[1])
    truth, allowed = oracle.batch_norm(xs, dys, weight, bias, dtype=dtype)
    worst = {}
    for name in oracle.FIELDS:
        expected, permitted = getattr(truth, name), getattr(allowed, name)
        if not isinstance(expected, list):
            expected, permitted = [expected] * len(xs), [permitted] * len(xs)
        triples = zip((r[name] for r in results), expected, permitted, strict=True)
        worst[name] = max(oracle.worst(*triple) for triple in triples)
    return worst


def assert_equals_whole_batch(
    results: list[dict[str, Any]], xs: list[Any], dys: list[Any], dtype: str = "float32"
) -> None:
    """Asserts that the ranks' results are those of the concatenated batch, each quantity for itself."""
    worst = distances(results, xs, dys, dtype)
    for name in oracle.FIELDS:
        assert worst[name] <= 1, f"{name} is {worst[name]:.3g} times as far from the truth as its arithmetic explains"
    assert [r["batches"] for r in results] == [1] * len(xs)
    for name in ("running_mean", "running_var"):
        assert all((r[name] == results[0][name]).all() for r in results), f"{name} differs between ranks"
