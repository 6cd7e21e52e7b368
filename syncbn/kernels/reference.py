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

Epilogue. With y = activation(z), z = xhat * weight + bias + residual, all of this holds with g = dy * activation'(z),
the gradient of z (and of residual), in dy's place. In place, y has overwritten x, and x - mean is recovered as

    xmu = (activation^-1(y) - bias) / (invstd * weight).

Mask. All sums run over the valid positions alone, and N is their number. What stands elsewhere is replaced, never
multiplied by 0, which would keep NaN and infinity.

References:
    S. Ioffe, C. Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.
    T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983 (on the cancellation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import flatten, layout_of
from .contract import Running, is_refused
from .epilogue import PLAIN, Epilogue, weight_floor

Array = NDArray[Any]


def serves(x: Any) -> bool:
    """Whether these kernels take x: any ndarray."""
    return isinstance(x, np.ndarray)


def absence() -> str:
    """Returns "": NumPy is always there."""
    return ""


def description() -> str:
    """What these kernels take and how they compute."""
    return "NumPy arrays, in float64"


def _row(v: Array) -> Array:
    """(c,) -> (c, 1) float64, to meet an (n, c, s) array."""
    return v.astype(np.float64)[:, None]


def _channel_sums(v: Array) -> Array:
    """(n, c, s) -> (c,). Along one contiguous row per channel, for NumPy sums accurately (pairwise) only so."""
    sums: Array = np.ascontiguousarray(v.swapaxes(0, 1)).reshape(v.shape[1], -1).sum(1)
    return sums


def _select(v: Array, valid: Array | None) -> Array:
    """Returns v, or a copy that is 0 where valid, (n, 1, s), says so."""
    return v if valid is None else np.where(valid, v, v.dtype.type(0))


def stats(x: Array, center: Array | None, mask: Array | None = None) -> Array:
    """Sums, sums of squares and the count of one rank's x. See the package's contract.

    >>> stats(np.array([[[1.0], [4.0]], [[3.0], [4.0]]], np.float32), None)
    array([ 4.,  8., 10., 32.,  2.])
    """
    valid = layout_of(x).flatten_mask(mask)
    (x,) = flatten(x)
    v = _select(x, valid).astype(np.float64)
    if center is not None:
        v = _select(v - _row(center), valid)
    count = x.shape[0] * x.shape[2] if valid is None else valid.sum()
    return np.concatenate([_channel_sums(v), _channel_sums(v * v), [count]])


def normalise(
    x: Array,
    moments: Array,
    center: Array | None,
    running: Running,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    y: Array,
    epilogue: Epilogue = PLAIN,
    residual: Array | None = None,
    mask: Array | None = None,
) -> float:
    """Statistics from the moments of all ranks; y = activation((x - mean) * (invstd * weight) + bias + residual).

    >>> x, moments = np.array([[[1.0], [4.0]], [[3.0], [4.0]]]), np.array([4.0, 8.0, 10.0, 32.0, 2.0])
    >>> y = np.empty_like(x)
    >>> normalise(x, moments, None, Running(), 0.01, None, None, y), moments
    (2.0, array([ 2.        ,  4.        ,  0.99503719, 10.        ,  2.        ]))
    >>> y[:, 0, 0]
    array([-0.99503719,  0.99503719])
    """
    count = float(moments[-1])
    if is_refused(count):
        return count
    c = len(moments) // 2
    n = np.maximum(count, 1)
    offset = moments[:c] / n
    mean = offset if center is None else center + offset
    # max: rounding may leave a tiny negative difference where all elements are equal.
    var = np.maximum(moments[c:-1] / n - offset * offset, 0.0)
    moments[:c], moments[c:-1] = mean, 1.0 / np.sqrt(var + eps)
    if count:
        _update(running, mean, var * (count / (count - 1)))
    valid = layout_of(y).flatten_mask(mask)
    y, x, residual = flatten(y, x, residual)
    x = _select(x, valid)
    z = (x - _row(mean)) * _scale(x, moments, weight, epilogue) + (0.0 if bias is None else _row(bias))
    y[...] = _select(_activate(z if residual is None else z + _select(residual, valid), epilogue), valid)
    return count


def _update(running: Running, mean: Array, unbiased_var: Array) -> None:
    """Moves the running statistics towards the batch's by momentum, and counts the batch."""
    batches = running.num_batches_tracked
    if batches is not None:
        batches += 1
    if running.mean is not None:
        running.mean[...] = running.mean + running.momentum * (mean - running.mean)
        running.var[...] = running.var + running.momentum * (unbiased_var - running.var)


def backward_reduce(
    dy: Array,
    x: Array,
    statistics: Array,
    weight: Array | None,
    bias: Array | None,
    grad_weight: Array | None = None,
    grad_bias: Array | None = None,
    epilogue: Epilogue = PLAIN,
    gate: Array | None = None,
    g: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Sums of g and of g * (x - mean) of one rank. See the package's contract."""
    valid = layout_of(x if g is None else g).flatten_mask(mask)
    g, x, dy, gate = flatten(g, x, dy, gate) if g is not None else (None, *flatten(x, dy, gate))
    x, gate = _select(x, valid), None if gate is None else _select(gate, valid)
    terms = _differentiate(_select(dy, valid), x, statistics, weight, bias, epilogue, gate)
    gradient, xmu = (_select(v, valid) for v in terms)
    if g is not None:
        g[...] = gradient
    sum_dy, sum_dy_xmu = _channel_sums(gradient), _channel_sums(gradient * xmu)
    if grad_weight is not None:
        grad_weight[...] = sum_dy_xmu * statistics[x.shape[1] : -1]
    if grad_bias is not None:
        grad_bias[...] = sum_dy
    return np.concatenate([sum_dy, sum_dy_xmu])


def backward_elemt(
    dy: Array,
    x: Array,
    statistics: Array,
    weight: Array | None,
    bias: Array | None,
    sums: Array,
    dx: Array,
    epilogue: Epilogue = PLAIN,
    mask: Array | None = None,
) -> None:
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    valid = layout_of(dx).flatten_mask(mask)
    dx, x, dy = flatten(dx, x, dy)
    x, dy = _select(x, valid), _select(dy, valid)
    c = x.shape[1]
    n = np.maximum(statistics[-1], 1)
    g, xmu = _differentiate(dy, x, statistics, weight, bias, epilogue, None)
    mean_dy, slope = _row(sums[:c] / n), _row(sums[c:] / n * np.square(statistics[c:-1]))
    dx[...] = _select((g - mean_dy - xmu * slope) * _scale(x, statistics, weight, epilogue), valid)


def _scale(x: Array, statistics: Array, weight: Array | None, epilogue: Epilogue) -> Array:
    """Returns invstd * weight, (c, 1)."""
    invstd = _row(statistics[x.shape[1] : -1])
    if weight is None:
        return invstd
    floor = weight_floor(x.dtype) if epilogue.in_place else 0.0
    w = _row(weight)
    return invstd * np.where(abs(w) < floor, np.where(w < 0, -floor, floor), w)


def _differentiate(
    dy: Array,
    x: Array,
    statistics: Array,
    weight: Array | None,
    bias: Array | None,
    epilogue: Epilogue,
    gate: Array | None,
) -> tuple[Array, Array]:
    """Returns g, the gradient of z, and x - mean."""
    scale, shift = _scale(x, statistics, weight, epilogue), 0.0 if bias is None else _row(bias)
    if epilogue.in_place:
        z = np.where(x < 0, x / _slope(epilogue), x)
        return _differentiate_activation(dy, z, epilogue), (z - shift) / scale
    xmu = x - _row(statistics[: x.shape[1]])
    z = xmu * scale + shift
    if gate is not None:
        z = z + gate if epilogue.activation == "silu" else gate
    return _differentiate_activation(dy, z, epilogue), xmu


def _slope(epilogue: Epilogue) -> float:
    """Returns the activation's slope below 0."""
    return {"none": 1.0, "relu": 0.0, "leaky_relu": epilogue.slope}[epilogue.activation]


def _activate(z: Array, epilogue: Epilogue) -> Array:
    y: Array
    if epilogue.activation == "silu":
        y = z * _sigmoid(z)
        return y
    y = np.where(z < 0, 0.0 if _slope(epilogue) == 0 else z * _slope(epilogue), z)
    return y


def _differentiate_activation(dy: Array, z: Array, epilogue: Epilogue) -> Array:
    """Returns dy * activation'(z)."""
    dy = dy.astype(np.float64)
    g: Array
    if epilogue.activation == "silu":
        g = dy * _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))
        return g
    g = np.where(z <= 0, 0.0 if _slope(epilogue) == 0 else dy * _slope(epilogue), dy)
    return g


def _sigmoid(z: Array) -> Array:
    p: Array = 1 / (1 + np.exp(-np.clip(z, -700, 700, dtype=np.float64)))
    return p
