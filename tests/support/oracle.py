"""Batch normalisation of a whole batch in two passes, and how far from it a correct result may be.

Independent of syncbn: all parity tests compare with this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float64": 0.0, "float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-24}  # where results come near it


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
        The truth, and the greatest permitted distance from it for inputs of that dtype. The distance follows from
        the arithmetic in which a result is computed: with u the roundoff of the accumulate dtype (float64 for
        float64, else float32) and a = 2^-53 * (16 + sqrt(N)) that of float64 sums of N terms, mean is rounded by u
        |mean|, a variance taken as E[x^2] - mean^2 is off by a (var + mean^2) (float64 input: a var, for there it is
        centred), and the rest is propagated to first order; each further operation adds u of its result. Results in a
        narrower dtype add its roundoff, or half of its smallest number.
    """

    def store_off(v: Any) -> Any:
        return np.maximum(ROUNDOFF[dtype] * abs(v), SMALLEST[dtype] / 2)

    u, a_of = (2.0**-53 if dtype == "float64" else 2.0**-24), lambda n: 2.0**-53 * (16 + np.sqrt(n))
    flat_x = [_elements(x) for x in xs]
    flat_dy = [_elements(dy) for dy in dys]
    x, dy = np.concatenate(flat_x), np.concatenate(flat_dy)
    n, a = len(x), a_of(len(x))
    mean = x.mean(0)
    mean = mean + (x - mean).mean(0)  # takes the rounding of the first mean out
    xmu = x - mean
    var = (xmu * xmu).mean(0)
    invstd = 1 / np.sqrt(var + eps)
    xhat, k = xmu * invstd, weight * invstd
    mean_dy, mean_dyx = dy.mean(0), (dy * xhat).mean(0)

    mean_off = u * abs(mean) + a * abs(x).mean(0)
    var_off = a * (var if dtype == "float64" else var + mean**2) + mean_off**2
    k_off = abs(k) * (3 * u + 0.5 * var_off / (var + eps))
    dyx_off = mean_off * invstd * abs(mean_dy) + (3 * u + a) * abs(dy * xhat).mean(0) + abs(mean_dyx) * k_off / abs(k)

    def y_of(v: Any) -> Any:
        return (v - mean) * k + bias

    def y_off(v: Any) -> Any:
        scaled = abs((v - mean) * k)
        return (
            abs(k) * mean_off + scaled * (2 * u + k_off / abs(k)) + u * (abs(bias) + abs(y_of(v))) + store_off(y_of(v))
        )

    def dx_of(v: Any, g: Any) -> Any:
        return k * (g - mean_dy - (v - mean) * invstd * mean_dyx)

    def dx_off(v: Any, g: Any) -> Any:
        normed = (v - mean) * invstd
        terms = abs(g) + abs(mean_dy) + abs(normed * mean_dyx)
        correction = mean_off * invstd * abs(mean_dyx) + abs(normed) * dyx_off
        off = abs(k) * (correction + (6 * u + a) * terms) + k_off * terms
        return off + store_off(dx_of(v, g))

    def by_part(function: Any) -> list[Any]:
        return [_shaped(function(v, g), x) for v, g, x in zip(flat_x, flat_dy, xs, strict=True)]

    grad_weight = [(g * (v - mean) * invstd).sum(0) for v, g in zip(flat_x, flat_dy, strict=True)]
    grad_weight_off = [
        mean_off * invstd * abs(g.sum(0))
        + (a + 3 * u + 0.5 * var_off / (var + eps)) * abs(g * (v - mean) * invstd).sum(0)
        for v, g in zip(flat_x, flat_dy, strict=True)
    ]
    unbiased = n / max(n - 1, 1)
    truth = Results(
        mean=mean,
        var=var,
        y=by_part(lambda v, g: y_of(v)),
        dx=by_part(dx_of),
        grad_weight=grad_weight,
        grad_bias=[g.sum(0) for g in flat_dy],
        running_mean=momentum * mean,
        running_var=(1 - momentum) + momentum * var * unbiased,
    )
    allowed = Results(
        mean=mean_off,
        var=var_off,
        y=by_part(lambda v, g: y_off(v)),
        dx=by_part(dx_off),
        grad_weight=grad_weight_off,
        grad_bias=[(a + u) * abs(g).sum(0) for g in flat_dy],
        running_mean=momentum * mean_off + 2 * u * abs(truth.running_mean),
        running_var=momentum * var_off * unbiased + 2 * u * truth.running_var,
    )
    return truth, allowed


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
