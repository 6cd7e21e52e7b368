r"""Bounds on the rounding errors of a correct implementation, element by element.

First-order error analysis: each operation in a format with unit roundoff u adds an error of u times the size of its
result, and the formula's derivative propagates the errors of its inputs. Per channel, with N elements over all ranks
and E their mean,

    u               of the accumulate dtype, of element-wise work: float32's 2^-24, for float64 input 2^-53
    o               of the dtype of the result, or of the buffer or parameter; store(v) = o |v|, and at least half the
                    format's smallest step, for results in the subnormal range; twice that for float64, in which the
                    reference is rounded, too
    w = 2^-53       of float64
    g               of sums of N terms in float64: they are within g * (sum of |terms|)
    xmu = x - mean, xhat = xmu invstd, k = invstd weight

    mean            d = g E|x|                          in float64; element-wise work rounds it, by u |mean|
    var             g (E[x^2] + 2 |mean| E|x|)          as E[x^2] - mean^2 takes E[x^2] and, twice, mean
                    g var                               of float64 input, whose squares are taken about the mean
    invstd          relative: v / 2, with v = (error of var) / (var + eps), as invstd = (var + eps)^(-1/2)

    y = xmu k + bias; with t = |xmu k|
        |k| (d + u |mean|) + t (v / 2 + 4 u) + u |bias| + store(y)
        4 operations on xmu k: difference, rounding of k, product, sum

    sum_dy / N      g E|dy|
    slope = invstd^2 sum_dy_xmu / N
        invstd^2 (g E|dy xmu| + d |E dy|) + v |slope|
    dx = k (dy - xmu slope - sum_dy / N); with a = |dy| + |E dy| + |xmu slope|
        |k| (d |slope| + |xmu| (error of slope) + g E|dy| + a v / 2 + u (4 |dy| + 4 |E dy| + 7 |xmu slope|)) + store(dx)
        4 operations on each term: two differences (sum_dy / N: its rounding, one difference), rounding of k, product;
        3 more on xmu slope: rounding of slope, difference, product. The rounding of mean is taken out by the kernels.

    grad_weight, of one rank           invstd (g sum|dy xmu| + d |sum dy|) + v / 2 |grad_weight| + store(grad_weight)
    grad_bias, of one rank             g sum|dy| + store(grad_bias)
    running_mean                       momentum d + 2 w |its change| + store(running_mean)
    running_var                        momentum N / (N - 1) (error of var) + 2 w |its change| + store(running_var)
        before + momentum (batch - before) is computed in float64: difference and product, and the sum is what is stored
"""

from __future__ import annotations

import torch
from torch import Tensor

_W = 2.0**-53
_SECOND_ORDER = 1.1  # for products of roundoffs, which the analysis leaves out


class ErrorBounds:
    """The bounds for one batch of all ranks. Everything is float64; per-channel results are (c,).

    Args:
        x, dy: the whole batch and its gradient, (n, c, s).
        weight, bias: (c,).
        eps: of the layer.
        dtype: of the input under test. Parameters and buffers are float64 for float64, else float32.
        sums: the relative error of sums of x.shape[0] * x.shape[2] terms in float64.

    Attributes:
        mean, var: the bounds of the mean and the variance in float64.
    """

    def __init__(
        self, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, sums: float
    ) -> None:
        self._dtype, self._parameters = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        self._u, self._sums, self._n = _roundoff(self._parameters), sums, x.shape[0] * x.shape[2]
        self._batch_mean = _mean(x)
        xmu = x - self._batch_mean
        var = _mean(xmu * xmu)
        self._invstd = (var + eps).rsqrt()
        self._k, self._bias = weight[:, None].abs() * self._invstd, bias[:, None].abs()
        self._mean_dy, self._slope = _mean(dy).abs(), self._invstd**2 * _mean(dy * xmu).abs()
        self._of_mean = sums * _mean(x.abs())
        squares = var if dtype == torch.float64 else _mean(x * x) + 2 * self._batch_mean.abs() * _mean(x.abs())
        self.mean, self.var = self._of_mean[:, 0], (sums * squares)[:, 0]
        self._v = sums * squares / (var + eps)
        self._of_mean_dy = sums * _mean(dy.abs())
        of_products = sums * _mean((dy * xmu).abs()) + self._of_mean * self._mean_dy
        self._of_slope = self._invstd**2 * of_products + self._v * self._slope

    def y(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the bound of y, the exact result for x, a part of the batch, (n, c, s)."""
        t = (x - self._batch_mean).abs() * self._k
        of_mean = self._of_mean + self._u * self._batch_mean.abs()
        return self._k * of_mean + t * (self._v / 2 + 4 * self._u) + self._u * self._bias + _stored(y, self._dtype)

    def dx(self, x: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        """Returns the bound of dx, the exact result for x and dy, a part of the batch, (n, c, s)."""
        xmu = (x - self._batch_mean).abs()
        terms = dy.abs(), self._mean_dy, xmu * self._slope
        rounding = self._u * (4 * terms[0] + 4 * terms[1] + 7 * terms[2]) + self._v / 2 * sum(terms)
        of_sums = self._of_mean * self._slope + xmu * self._of_slope + self._of_mean_dy
        return self._k * (of_sums + rounding) + _stored(dx, self._dtype)

    def grad_weight(self, x: Tensor, dy: Tensor) -> Tensor:
        """Returns the bound of grad_weight of a rank with x and dy, a part of the batch."""
        products = dy * (x - self._batch_mean) * self._invstd
        of_sums = self._sums * _sum(products.abs()) + (self._of_mean * self._invstd)[:, 0] * _sum(dy).abs()
        exact = _sum(products)
        return of_sums + self._v[:, 0] / 2 * exact.abs() + _stored(exact, self._parameters)

    def grad_bias(self, dy: Tensor) -> Tensor:
        """Returns the bound of grad_bias of a rank with dy, a part of the batch."""
        return self._sums * _sum(dy.abs()) + _stored(_sum(dy), self._parameters)

    def running_mean(self, momentum: float, before: Tensor, running_mean: Tensor) -> Tensor:
        """Returns the bound of running_mean, the exact result of an update of `before`, both (c,)."""
        of_batch = momentum * self.mean
        return of_batch + 2 * _W * (running_mean - before).abs() + _stored(running_mean, self._parameters)

    def running_var(self, momentum: float, before: Tensor, running_var: Tensor) -> Tensor:
        """Returns the bound of running_var, the exact result of an update of `before`, both (c,)."""
        of_batch = momentum * self._n / max(self._n - 1, 1) * self.var
        return of_batch + 2 * _W * (running_var - before).abs() + _stored(running_var, self._parameters)


def allowed_errors(
    x: Tensor,
    dy: Tensor,
    sizes: list[int],
    before: dict[str, Tensor],
    expected: dict[str, Tensor],
    eps: float,
    momentum: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Returns the bound for each of `expected`, in its shape, for sums in any order.

    In any order, sums of N terms are within N 2^-53 of the sum of their sizes, and 10 more cover the operations in
    float64 on terms and sum; the reference, in float64 itself, is off by as much: hence twice that.

    Args:
        x, dy: the whole batch and its gradient, (n, c, s) float64.
        sizes: the number of samples on each rank, in order.
        before: weight and bias, and the running_mean and running_var that the layer starts with.
        expected: the exact y, dx, grad_weight and grad_bias, both summed over ranks, running_mean and running_var.
        eps, momentum: of the layer.
        dtype: of the input under test.
    """
    sums = 2 * (x.shape[0] * x.shape[2] + 10) * _W
    of = ErrorBounds(x, dy, before["weight"].double(), before["bias"].double(), eps, dtype, sums)
    parts = list(zip(torch.split(x, sizes), torch.split(dy, sizes), strict=True))
    bounds = {
        "y": of.y(x, expected["y"]),
        "dx": of.dx(x, dy, expected["dx"]),
        "grad_weight": torch.stack([of.grad_weight(*part) for part in parts]).sum(0),
        "grad_bias": torch.stack([of.grad_bias(dy) for _, dy in parts]).sum(0),
        "running_mean": of.running_mean(momentum, before["running_mean"].double(), expected["running_mean"]),
        "running_var": of.running_var(momentum, before["running_var"].double(), expected["running_var"]),
    }
    return {name: _SECOND_ORDER * bound for name, bound in bounds.items()}


def _mean(v: Tensor) -> Tensor:
    """(n, c, s) -> (c, 1)."""
    return v.mean((0, 2))[:, None]


def _sum(v: Tensor) -> Tensor:
    """(n, c, s) -> (c,)."""
    return v.sum((0, 2))


def _stored(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the largest error of rounding v to dtype; to float64, of result and reference, which is rounded, too."""
    times = 2 if dtype == torch.float64 else 1
    return times * (_roundoff(dtype) * v.abs()).clamp(min=torch.finfo(dtype).smallest_normal * _roundoff(dtype))


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
