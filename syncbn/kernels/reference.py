r"""The kernels in NumPy and float64, written like the formulas: the oracle for the fast ones, and the derivation.

Forward. For one channel with elements x_1 .. x_N over all ranks,

    mean = sum(x) / N        var = sum((x - mean)^2) / N        invstd = 1 / sqrt(var + eps)
    y_i  = xhat_i * weight + bias        with xhat_i = (x_i - mean) * invstd

Sums over ranks add, so each rank sends sum(x), sum(x^2) and its own N, and

    var = sum(x^2) / N - mean^2.

The subtraction cancels: of the 53 bits of float64 it costs 2 * log2(mean / std). A float32 times itself is exact in
float64, so at mean/std = 1e4 some 26 good bits are left, more than float32 has. For float64 input the squares are not
exact; there the sums are taken about a `center` that all ranks agree on (the mean itself, from a first message), for
any constant k:

    mean = k + sum(x - k) / N        var = sum((x - k)^2) / N - (sum(x - k) / N)^2.

Backward. With L the loss, dy_i = dL/dy_i and g_i = dy_i * weight = dL/dxhat_i. As mean and invstd depend on every x_j,

    dL/dx_i = invstd * (g_i - sum_j(g_j) / N - xhat_i * sum_j(g_j * xhat_j) / N).

The two sums run over all ranks. Pulling weight and invstd out of them, with xmu = x - mean,

    dx_i = weight * invstd * (dy_i - sum_dy / N - xmu_i * invstd^2 * sum_dy_xmu / N)

    dL/dweight = sum(dy * xhat) = sum_dy_xmu * invstd        dL/dbias = sum_dy

References:
    S. Ioffe, C. Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.
    T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983 (on the cancellation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _row(v: Array) -> Array:
    """(c,) -> (1, c, 1) float64, to meet an (n, c, s) array."""
    return v.astype(np.float64)[:, None]


def _channel_sums(v: Array) -> Array:
    """(n, c, s) -> (c,). In one row per channel, which NumPy sums pairwise: its sums over other axes lose digits."""
    sums: Array = np.ascontiguousarray(v.swapaxes(0, 1)).reshape(v.shape[1], -1).sum(1)
    return sums


def stats(x: Array, center: Array | None) -> Array:
    """Sums, sums of squares and the count of one rank's x. See the package's contract.

    >>> stats(np.array([[[1.0], [4.0]], [[3.0], [4.0]]], np.float32), None)
    array([ 4.,  8., 10., 32.,  2.])
    """
    v = x.astype(np.float64)
    if center is not None:
        v -= _row(center)
    return np.concatenate([_channel_sums(v), _channel_sums(v * v), [x.shape[0] * x.shape[2]]])


def combine(
    moments: Array,
    center: Array | None,
    dtype: Any,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
) -> tuple[Array, Array, Array]:
    """Mean, invstd and count from the moments of all ranks. See the package's contract.

    >>> combine(np.array([4.0, 10.0, 2.0]), None, np.dtype(np.float32), None, None, 0.1, 0.0)
    (array([2.]), array([1.], dtype=float32), array(2.))
    """
    c = len(moments) // 2
    count = moments[-1]
    n = np.maximum(count, 1)
    offset = moments[:c] / n
    mean = offset if center is None else center + offset
    # max: rounding may leave a tiny negative difference where all elements are equal.
    var = np.maximum(moments[c:-1] / n - offset * offset, 0.0)
    invstd = 1.0 / np.sqrt(var + eps)
    if running_mean is not None and running_var is not None and count > 1:
        unbiased = var * (count / (count - 1))
        running_mean[...] = running_mean + momentum * (mean - running_mean)
        running_var[...] = running_var + momentum * (unbiased - running_var)
    accumulate = np.float64 if dtype == np.float64 else np.float32
    return mean, invstd.astype(accumulate), np.array(count)


def elemt(x: Array, mean: Array, invstd: Array, weight: Array | None, bias: Array | None, y: Array) -> None:
    """The result: y = (x - mean) * (invstd * weight) + bias. See the package's contract."""
    y[...] = (x - _row(mean)) * _scale(invstd, weight) + (0.0 if bias is None else _row(bias))


def backward_reduce(dy: Array, x: Array, mean: Array) -> Array:
    """Sums of dy and of dy * (x - mean) of one rank. See the package's contract."""
    dy = dy.astype(np.float64)
    return np.concatenate([_channel_sums(dy), _channel_sums(dy * (x - _row(mean)))])


def backward_elemt(
    dy: Array, x: Array, mean: Array, invstd: Array, count: Array, weight: Array | None, sums: Array, dx: Array
) -> None:
    """The gradient: dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)."""
    c = x.shape[1]
    n = np.maximum(count, 1)
    mean_dy, slope = _row(sums[:c] / n), _row(sums[c:] / n * np.square(invstd, dtype=np.float64))
    dx[...] = (dy - mean_dy - (x - _row(mean)) * slope) * _scale(invstd, weight)


def _scale(invstd: Array, weight: Array | None) -> Array:
    return _row(invstd) if weight is None else _row(invstd) * _row(weight)
