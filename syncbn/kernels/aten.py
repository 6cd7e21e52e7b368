"""The kernels in plain torch operations: any device that has float64, any floating dtype, any strides.

Arrays are worked through in tiles, so that no temporary of the input's size exists: a tile's float64 copy stays in the
cache. Sums are in float64, element-wise work in the accumulate dtype. Each element-wise operation rounds on its own (no
addcmul, whose fused multiply-add would differ between vector body and tail), so that an element's result does not
depend on where the batch was cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import flatten
from .tail import PLAIN, Tail, weight_floor

# Elements per tile: on a CPU a float64 copy then takes 1 MiB, within a core's cache; an accelerator wants few launches.
_TILE_CPU = 1 << 17
_TILE_ACCELERATOR = 1 << 24
# Elements of a channel that a tile holds at least, where there are so many: the tiles' sums are then few.
_PER_CHANNEL = 512


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (n, c, s) into index tiles of a bounded number of elements, those of the same channels in a row."""
    n, c, s = x.shape
    room = _TILE_CPU if x.device.type == "cpu" else _TILE_ACCELERATOR
    step_s = max(1, min(s, room))
    step_n = max(1, min(n, room // step_s, -(-_PER_CHANNEL // step_s)))
    step_c = max(1, min(c, room // (step_s * step_n)))
    step_n = max(1, min(n, room // (step_s * step_c)))
    for j in range(0, c, step_c):
        for i in range(0, n, step_n):
            for k in range(0, s, step_s):
                yield slice(i, i + step_n), slice(j, j + step_c), slice(k, k + step_s)


class _ChannelSums:
    """Sums of tiles per channel, into a (c,) vector; one axis at a time, for torch sums one axis pairwise."""

    def __init__(self, out: Tensor) -> None:
        self.out, self.channels, self.parts = out, slice(0), list[Tensor]()

    def add(self, channels: slice, v: Tensor) -> None:
        if channels != self.channels:
            self.finish()
        self.channels = channels
        self.parts.append(v.sum(2).sum(0))

    def finish(self) -> None:
        if self.parts:
            self.out[self.channels] = torch.stack(self.parts).sum(0)
            self.parts.clear()


def stats(x: Tensor, center: Tensor | None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    (x,) = flatten(x)
    n, c, s = x.shape
    moments = torch.zeros(2 * c + 1, dtype=torch.float64, device=x.device)
    total, squares = _ChannelSums(moments[:c]), _ChannelSums(moments[c:-1])
    for tile in _tiles(x):
        v = x[tile].double()
        if center is not None:
            v = v - center[tile[1], None]
        total.add(tile[1], v)
        squares.add(tile[1], v * v)
    total.finish()
    squares.finish()
    moments[-1] = n * s
    return moments


def combine(
    moments: Tensor,
    center: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> float | None:
    """Mean, invstd and count from the moments of all ranks, in place. See the package's contract."""
    c = len(moments) // 2
    count = moments[-1]
    valid = (count > 1) & (count == count.floor())
    n = count.clamp(min=1)
    offset = moments[:c] / n
    mean = offset if center is None else center + offset
    # clamp: rounding may leave a tiny negative difference where all elements are equal.
    var = (moments[c:-1] / n - offset * offset).clamp(min=0)
    moments[:c], moments[c:-1] = mean, (var + eps).rsqrt()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(valid)
    if running_mean is not None and running_var is not None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        # where, not a factor of 0: of no valid count (a refused rank's is NaN) nothing may be written, NaN included.
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            updated = running + momentum * (batch - running)
            running.copy_(torch.where(valid, updated, running))
    return float(count) if count.is_cpu else None


def elemt(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    tail: Tail = PLAIN,
    residual: Tensor | None = None,
) -> None:
    """The result: y = activation((x - mean) * (invstd * weight) + bias + residual). See the package's contract."""
    y, x, residual = flatten(y, x, residual)
    affine = _Affine(x, statistics, weight, bias, tail)
    for tile in _tiles(x):
        z = affine.forward(x[tile] - affine.mean[tile[1], None], tile[1])
        if residual is not None:
            z += residual[tile]
        y[tile] = _activate(z, tail)


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    tail: Tail = PLAIN,
    gate: Tensor | None = None,
    g: Tensor | None = None,
) -> Tensor:
    """Sums of g and of g * (x - mean) of one rank. See the package's contract."""
    g, x, dy, gate = flatten(g, x, dy, gate) if g is not None else (None, *flatten(x, dy, gate))
    c = x.shape[1]
    sums = torch.zeros(2 * c, dtype=torch.float64, device=x.device)
    sum_dy, sum_dy_xmu = _ChannelSums(sums[:c]), _ChannelSums(sums[c:])
    affine = _Affine(x, statistics, weight, bias, tail)
    for tile in _tiles(x):
        gradient, xmu = _differentiate(dy, x, affine, tail, gate, tile)
        if g is not None:
            g[tile] = gradient
        wide = gradient.double()
        # In place, what is recovered is x minus the rounded mean.
        xmu = xmu.double() + affine.excess[tile[1], None] if tail.in_place else x[tile] - statistics[:c][tile[1], None]
        sum_dy.add(tile[1], wide)
        sum_dy_xmu.add(tile[1], wide * xmu)
    sum_dy.finish()
    sum_dy_xmu.finish()
    if grad_weight is not None:
        grad_weight.copy_(sums[c:] * statistics[c:-1])
    if grad_bias is not None:
        grad_bias.copy_(sums[:c])
    return sums


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    dx: Tensor,
    tail: Tail = PLAIN,
) -> None:
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    dx, x, dy = flatten(dx, x, dy)
    c = x.shape[1]
    n = statistics[-1].clamp(min=1)
    affine = _Affine(x, statistics, weight, bias, tail)
    slope = sums[c:] / n * statistics[c:-1].square()
    # What the rounding of the mean adds to x - mean goes, times slope, into the constant term.
    mean_dy = (sums[:c] / n + affine.excess * slope).to(affine.mean.dtype)
    slope = slope.to(affine.mean.dtype)
    for tile in _tiles(x):
        channels = tile[1], None
        g, xmu = _differentiate(dy, x, affine, tail, None, tile)
        t = g - xmu * slope[channels]
        t -= mean_dy[channels]
        t *= affine.scale[channels]
        dx[tile] = t


class _Affine:
    """Constants per channel, rounded to the accumulate dtype: mean, scale = invstd * weight, bias.

    `excess` is what the rounded mean is above the exact one, in float64.
    """

    def __init__(self, x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, tail: Tail) -> None:
        c = x.shape[1]
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = statistics[c:-1]
        if weight is not None:
            weight = weight.double()
            if tail.in_place:
                floor = weight_floor(x.dtype)
                weight = torch.where(weight.abs() < floor, floor * (1 - 2.0 * (weight < 0)), weight)
            scale = scale * weight
        self.mean, self.scale = statistics[:c].to(accumulate), scale.to(accumulate)
        self.bias = None if bias is None else bias.to(accumulate)
        self.excess = self.mean.double() - statistics[:c]

    def forward(self, xmu: Tensor, channels: slice) -> Tensor:
        z = xmu * self.scale[channels, None]
        if self.bias is not None:
            z += self.bias[channels, None]
        return z

    def inverse(self, z: Tensor, channels: slice) -> Tensor:
        if self.bias is not None:
            z = z - self.bias[channels, None]
        return z * (1 / self.scale.double()).to(self.scale.dtype)[channels, None]


def _differentiate(
    dy: Tensor, x: Tensor, affine: _Affine, tail: Tail, gate: Tensor | None, tile: tuple[slice, slice, slice]
) -> tuple[Tensor, Tensor]:
    """Returns g, the gradient of z, and x - mean for the rounded mean, of a tile and in the accumulate dtype."""
    g, v = dy[tile].to(affine.mean.dtype), x[tile].to(affine.mean.dtype)
    if tail.in_place:
        slope = 1.0 if tail.activation == "none" else tail.slope
        return torch.where(v <= 0, g * slope, g), affine.inverse(torch.where(v < 0, v * (1 / slope), v), tile[1])
    xmu = v - affine.mean[tile[1], None]
    if tail.activation == "none":
        return g, xmu
    if tail.activation == "silu":
        z = affine.forward(xmu, tile[1])
        if gate is not None:
            z += gate[tile]
        p = z.sigmoid()
        return g * (p * (1 + z * (1 - p))), xmu
    z = affine.forward(xmu, tile[1]) if gate is None else gate[tile]
    return torch.where(z <= 0, g * tail.slope if tail.slope else 0.0, g), xmu


def _activate(z: Tensor, tail: Tail) -> Tensor:
    if tail.activation == "silu":
        return torch.nn.functional.silu(z)
    if tail.activation == "none":
        return z
    return torch.where(z < 0, z * tail.slope if tail.slope else 0.0, z)
