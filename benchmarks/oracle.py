"""Batch normalisation in float64, written like the formulas: what every result is checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS, MOMENTUM, LEAKY_SLOPE = 1e-5, 0.1, 0.01
ACTIVATIONS = ("none", "relu", "leaky_relu")


class Forward(NamedTuple):
    """What forward computes, in float64.

    Attributes:
        moments: (2C + 1,), sums, sums of squares and the count.
        statistics: (2C + 1,), mean, 1 / sqrt(var + eps) and the count.
        running_mean, running_var: (C,), after one batch from 0 and 1.
        before: as the input, what the activation is applied to.
        y: as the input.
    """

    moments: Tensor
    statistics: Tensor
    running_mean: Tensor
    running_var: Tensor
    before: Tensor
    y: Tensor


class Backward(NamedTuple):
    """What backward computes, in float64.

    Attributes:
        sums: (2C,), sum of dy and of dy * (x - mean), dy taken through the activation.
        dx, dresidual: as the input.
        grad_weight, grad_bias: (C,), of this rank's elements.
    """

    sums: Tensor
    dx: Tensor
    dresidual: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _as_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.double().view(1, -1, *[1] * (x.dim() - 2))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    reduce: Callable[[Tensor], Tensor],
) -> Forward:
    """Computes y = activation((x - mean) / sqrt(var + EPS) * weight + bias + residual).

    Args:
        x: (N, C, ...).
        weight, bias: (C,).
        residual: as x, or None for 0.
        activation: one of ACTIVATIONS.
        reduce: returns the sum over the ranks that normalise together.
    """
    x, c = x.double(), x.shape[1]
    sums, squares = x.sum(_axes(x)), (x * x).sum(_axes(x))
    moments = reduce(torch.cat([sums, squares, x.new_tensor([x.numel() / c])]))
    count = moments[-1]
    mean = moments[:c] / count
    var = moments[c:-1] / count - mean * mean
    invstd = (var + EPS).rsqrt()
    before = (x - _as_channels(mean, x)) * _as_channels(invstd * weight, x) + _as_channels(bias, x)
    before = before if residual is None else before + residual
    return Forward(
        moments,
        torch.cat([mean, invstd, count[None]]),
        MOMENTUM * mean,
        (1 - MOMENTUM) + MOMENTUM * var * count / (count - 1),
        before,
        before * _slope(before, activation),
    )


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, exact: Forward, activation: str, reduce: Callable[[Tensor], Tensor]
) -> Backward:
    """Computes dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N).

    dy is the gradient of y, taken through the activation first. The other arguments are as in forward.
    """
    x, c = x.double(), x.shape[1]
    mean, invstd, count = exact.statistics[:c], exact.statistics[c:-1], exact.statistics[-1]
    dy = dy.double() * _slope(exact.before, activation)
    xmu = x - _as_channels(mean, x)
    local = torch.cat([dy.sum(_axes(x)), (dy * xmu).sum(_axes(x))])
    sums = reduce(local)
    slope = _as_channels(invstd**2 * sums[c:] / count, x)
    dx = _as_channels(weight * invstd, x) * (dy - _as_channels(sums[:c] / count, x) - xmu * slope)
    return Backward(sums, dx, dy, local[c:] * invstd, local[:c])


def _slope(before: Tensor, activation: str) -> Tensor:
    """Returns the derivative of a piecewise linear activation through 0: the activation is it times its argument."""
    below = {"none": 1.0, "relu": 0.0, "leaky_relu": LEAKY_SLOPE}[activation]
    return torch.where(before > 0, torch.ones_like(before), below)
