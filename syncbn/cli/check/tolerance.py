r"""Bounds on the rounding errors of a correct implementation, element by element.

First-order error analysis: each operation in a format with unit roundoff u adds an error of u times the size of its
result, and the formula's derivative propagates the errors of its inputs. The factor _SECOND_ORDER covers products of
roundoffs, which are left out. Per channel, with N elements over all ranks,

    w = 2^-53       of float64, in which sums are accumulated
    u               of the accumulate dtype: float32's 2^-24, for float64 input w
    o               of the dtype of the result, or of the buffer or parameter
    g = (N + 10) w  a sum of N terms, in any order, is within g * (sum of |terms|); 10 covers the operations in float64
                    on terms and sum. The reference is within g, too: hence 2 g below.

    mean            2 g E|x|,                     and after rounding to the accumulate dtype  d = 2 g E|x| + u |mean|
    var             3 (2 g) E[x^2]                as E[x^2] - mean^2 takes E[x^2] and, twice, mean
    invstd          relative: r = 3 g E[x^2] / (var + eps) + u          as invstd = (var + eps)^(-1/2)

    y = (x - mean) * (invstd * weight) + bias; with t = |xhat weight|, xhat = (x - mean) invstd
        d |invstd weight| + t (r + 3 u) + u (t + |bias|) + o |y|
        the terms: error of mean; of invstd, difference and two products; of the sum; of the result

    sum_dy / N      2 g E|dy| + u E|dy|                                                       =: e0
    slope = invstd^2 sum_dy_xmu / N    its error is at most                                   =: e1
        invstd^2 (2 g E|dy xmu| + d E|dy|) + (2 r + u) invstd^2 E|dy xmu|
    dx = weight invstd (dy - xmu slope - sum_dy / N); with a = |dy| + |xmu slope| + E|dy|
        |weight invstd| (d |slope| + |xmu| e1 + e0 + a (r + 6 u)) + o |dx|
        6 operations: difference, product, two sums, scale and the product with it

    grad_weight, summed over ranks     invstd (2 g sum|dy xmu| + d sum|dy|) + (r + o) invstd sum|dy xmu|
    grad_bias, summed over ranks       (2 g + o) sum|dy|
    running_mean                       momentum (error of mean in float64) + o |running_mean|
    running_var                        momentum N / (N - 1) (error of var) + o |running_var|

Every bound includes half the format's smallest step, for results in the subnormal range.
"""

from __future__ import annotations

import torch
from torch import Tensor

_W = 2.0**-53
_SECOND_ORDER = 1.1


def allowed_errors(
    x: Tensor, dy: Tensor, expected: dict[str, Tensor], eps: float, momentum: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the bound for each of `expected`, in its shape.

    Args:
        x, dy: the whole batch and its gradient, (n, c, s) float64.
        expected: the exact y, dx, grad_weight, grad_bias, running_mean and running_var; also weight and bias.
        eps: of the layer.
        momentum: of the layer.
        dtype: of the input under test. Parameters and buffers are float64 for float64, else float32.
    """
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    u, o, op = _roundoff(parameters), _roundoff(dtype), _roundoff(parameters)
    n = x.shape[0] * x.shape[2]
    g = (n + 10) * _W
    mean, var = _mean(x), x.var((0, 2), unbiased=False, keepdim=True).squeeze(0)
    weight, bias = expected["weight"][:, None].abs(), expected["bias"][:, None].abs()
    invstd, xmu = (var + eps).rsqrt(), (x - mean).abs()
    of_mean, of_var = 2 * g * _mean(x.abs()), 6 * g * _mean(x * x)
    d = of_mean + u * mean.abs()
    r = 3 * g * _mean(x * x) / (var + eps) + u
    t = xmu * invstd * weight
    dys, products = _mean(dy.abs()), _mean(dy.abs() * xmu)
    slope = invstd**2 * _mean(dy * (x - mean)).abs()
    e0 = (2 * g + u) * dys
    e1 = invstd**2 * (2 * g * products + d * dys) + (2 * r + u) * invstd**2 * products
    a = dy.abs() + xmu * slope + dys
    bounds = {
        "y": d * invstd * weight + t * (r + 3 * u) + u * (t + bias) + o * expected["y"].abs(),
        "dx": weight * invstd * (d * slope + xmu * e1 + e0 + a * (r + 6 * u)) + o * expected["dx"].abs(),
        "grad_weight": n * (invstd * (2 * g * products + d * dys) + (r + op) * invstd * products)[:, 0],
        "grad_bias": n * ((2 * g + op) * dys)[:, 0],
        "running_mean": momentum * of_mean[:, 0] + op * expected["running_mean"].abs(),
        "running_var": momentum * n / (n - 1) * of_var[:, 0] + op * expected["running_var"].abs(),
    }
    smallest = {"y": dtype, "dx": dtype}
    return {
        name: _SECOND_ORDER * bound + _smallest_step(smallest.get(name, parameters)) / 2
        for name, bound in bounds.items()
    }


def _mean(v: Tensor) -> Tensor:
    """(n, c, s) -> (c, 1)."""
    return v.mean((0, 2))[:, None]


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _smallest_step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
