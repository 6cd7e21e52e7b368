"""Batch normalisation of a whole batch in two passes, and how far from it a correct result may be.

All parity tests compare with this. The results are independent of syncbn; the bounds are those of `syncbn check`,
for a smaller error of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from syncbn.cli.check.tolerance import ErrorBounds


@dataclass
class Results:
    """What a training step computes on a batch in parts; y, dx and the gradients have one entry per part."""

    mean: Any
    var: Any
    y: list[Any]
    dx: list[Any]
    grad_weight: list[Any]
    grad_bias: list[Any]
    running_mean: Any
    running_var: Any


def batch_norm(
    xs: list[Any],
    dys: list[Any],
    weight: Any = 1.0,
    bias: Any = 0.0,
    eps: float = 1e-5,
    momentum: float = 0.1,
    dtype: str = "float32",
) -> tuple[Results, Results]:
    """Normalises the concatenation of xs, parts of shape (N_r, C, ...), and differentiates it for dys.

    Running statistics start at mean 0 and variance 1.

    Returns:
        The truth, and the greatest permitted distance from it for inputs of that dtype, which is derived in
        syncbn/cli/check/tolerance.py. Sums of N terms may be off by 2^-53 (5 + sqrt(N) / 3) of the sum of their sizes.
        The roundings of a running sum of N like terms, each within 2^-53 of the sum so far, are a random walk, whose
        end has a standard deviation below 2^-53 sqrt(N) / 3. Kernels keep four running sums or more, which halves it,
        so that this is two standard deviations at least; 5 covers the operations on terms and those on the sums.
    """
    flat_x = [_elements(x) for x in xs]
    flat_dy = [_elements(dy) for dy in dys]
    x, dy = np.concatenate(flat_x), np.concatenate(flat_dy)
    n, c = x.shape
    mean = x.mean(0)
    mean = mean + (x - mean).mean(0)  # takes the rounding of the first mean out
    var = ((x - mean) ** 2).mean(0)
    invstd = 1 / np.sqrt(var + eps)
    k = weight * invstd
    mean_dy, mean_dyx = dy.mean(0), (dy * (x - mean) * invstd).mean(0)

    def by_part(function: Any) -> list[Any]:
        return [_shaped(function(v, g), x) for v, g, x in zip(flat_x, flat_dy, xs, strict=True)]

    unbiased = n / max(n - 1, 1)
    truth = Results(
        mean=mean,
        var=var,
        y=by_part(lambda v, g: (v - mean) * k + bias),
        dx=by_part(lambda v, g: k * (g - mean_dy - (v - mean) * invstd * mean_dyx)),
        grad_weight=[(g * (v - mean) * invstd).sum(0) for v, g in zip(flat_x, flat_dy, strict=True)],
        grad_bias=[g.sum(0) for g in flat_dy],
        running_mean=momentum * mean,
        running_var=(1 - momentum) + momentum * var * unbiased,
    )
    sums = 2.0**-53 * (5 + np.sqrt(n) / 3)
    vectors = (torch.full((c,), 1.0, dtype=torch.float64) * torch.as_tensor(v) for v in (weight, bias))
    of = ErrorBounds(_for_bounds(x.T[None]), _for_bounds(dy.T[None]), *vectors, eps, getattr(torch, dtype), sums)
    parts = [(_for_bounds(v), _for_bounds(g)) for v, g in zip(xs, dys, strict=True)]
    allowed = Results(
        mean=of.mean.numpy(),
        var=of.var.numpy(),
        y=[of.y(v, _for_bounds(y)).numpy().reshape(y.shape) for (v, _), y in zip(parts, truth.y, strict=True)],
        dx=[of.dx(*part, _for_bounds(dx)).numpy().reshape(dx.shape) for part, dx in zip(parts, truth.dx, strict=True)],
        grad_weight=[of.grad_weight(*part).numpy() for part in parts],
        grad_bias=[of.grad_bias(g).numpy() for _, g in parts],
        running_mean=of.running_mean(momentum, torch.zeros(c), torch.from_numpy(truth.running_mean)).numpy(),
        running_var=of.running_var(momentum, torch.ones(c), torch.from_numpy(truth.running_var)).numpy(),
    )
    return truth, allowed


def _for_bounds(v: Any) -> torch.Tensor:
    """(N, C, ...) ndarray -> (n, c, s) float64 tensor."""
    v = np.array(v, np.float64)
    return torch.from_numpy(v.reshape(*v.shape[:2], int(np.prod(v.shape[2:]))))


def _elements(x: Any) -> Any:
    """(N, C, ...) -> (N * ..., C) in float64."""
    return np.moveaxis(np.asarray(x, np.float64), 1, -1).reshape(-1, x.shape[1])


def _shaped(v: Any, x: Any) -> Any:
    """The inverse of _elements."""
    n, c, *spatial = x.shape
    return np.moveaxis(v.reshape(n, *spatial, c), -1, 1)


FIELDS = ("y", "dx", "grad_weight", "grad_bias", "running_mean", "running_var")


def worst(got: Any, truth: Any, allowed: Any) -> float:
    """Returns the largest distance of got from truth, in units of what is allowed; of empty arrays 0."""
    got = np.asarray(got, np.float64)
    assert got.shape == truth.shape, f"expected shape {truth.shape}, got {got.shape}"
    if not got.size:
        return 0.0
    distance = abs(got - truth)
    return (
        float(np.where(distance == 0, 0.0, distance / np.maximum(allowed, 1e-300)).max(initial=0.0))
        if np.isfinite(distance).all()
        else float("inf")
    )
