"""The kernels in plain torch operations: any device that has float64, any floating dtype, any strides.

Arrays are worked through in tiles, so that no temporary of the input's size exists: a tile's float64 copy stays in the
cache. Sums are in float64, element-wise work in the accumulate dtype. Each element-wise operation rounds on its own, so
that an element's result does not depend on where the batch was cut: there is no addcmul, which fuses multiplication and
addition in vectors but not for the elements left over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layout import flatten
from .contract import Running, is_refused, refuse_mask
from .epilogue import PLAIN, Epilogue, weight_floor

# Elements per tile: on a CPU a float64 copy then takes 1 MiB, which fits a core's cache; accelerators want few tiles.
_TILE_CPU = 1 << 17
_TILE_ACCELERATOR = 1 << 24
# A tile has at least so many elements of a channel, where there are so many, so that there are few tiles to sum over.
_PER_CHANNEL = 512


def serves(x: Any) -> bool:
    """Whether these kernels take x: any tensor."""
    return isinstance(x, Tensor)


def absence() -> str:
    """Returns "": torch is there, or this module could not be imported."""
    return ""


def description() -> str:
    """What these kernels take and how they compute."""
    return "torch tensors, on any device with float64"


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yields the indices of tiles of bounded size that cover (n, c, s), those of the same channels in a row."""
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
    """Adds up tiles per channel into a (c,) vector, one axis at a time: over several torch does not sum pairwise."""

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


def stats(x: Tensor, center: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    refuse_mask(mask)
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


def normalise(
    x: Tensor,
    moments: Tensor,
    center: Tensor | None,
    running: Running,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = PLAIN,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> float | None:
    """Statistics from the moments of all ranks; y = activation((x - mean) * (invstd * weight) + bias + residual)."""
    refuse_mask(mask)
    count = float(moments[-1]) if moments.is_cpu else None
    if count is not None and is_refused(count):
        return count
    _combine(moments, center, running, eps)
    y, x, residual = flatten(y, x, residual)
    affine = _Affine(x, moments, weight, bias, epilogue)
    for tile in _tiles(x):
        z = affine.forward(x[tile] - affine.mean[tile[1], None], tile[1])
        if residual is not None:
            z += residual[tile]
        y[tile] = _activate(z, epilogue)
    return count


def _combine(moments: Tensor, center: Tensor | None, running: Running, eps: float) -> None:
    """Turns moments into statistics, in place, and updates the running statistics unless the count is refused.

    On accelerators that is decided by arithmetic there, for reading the count would stall the device.
    """
    c = len(moments) // 2
    count = moments[-1]
    valid = (count > 1) & (count == count.floor())
    n = count.clamp(min=1)
    offset = moments[:c] / n
    mean = offset if center is None else center + offset
    # clamp: rounding may leave a tiny negative difference where all elements are equal.
    var = (moments[c:-1] / n - offset * offset).clamp(min=0)
    moments[:c], moments[c:-1] = mean, (var + eps).rsqrt()
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(valid)
    if running.mean is not None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        # where, not a factor of 0: a refused count may be NaN, which the product would let through.
        for buffer, batch in ((running.mean, mean), (running.var, unbiased)):
            updated = buffer + running.momentum * (batch - buffer)
            buffer.copy_(torch.where(valid, updated, buffer))


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    gate: Tensor | None = None,
    g: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sums of g and of g * (x - mean) of one rank. See the package's contract."""
    refuse_mask(mask)
    g, x, dy, gate = flatten(g, x, dy, gate) if g is not None else (None, *flatten(x, dy, gate))
    c = x.shape[1]
    sums = torch.zeros(2 * c, dtype=torch.float64, device=x.device)
    sum_dy, sum_dy_xmu = _ChannelSums(sums[:c]), _ChannelSums(sums[c:])
    affine = _Affine(x, statistics, weight, bias, epilogue)
    for tile in _tiles(x):
        gradient, xmu = _differentiate(dy, x, affine, epilogue, gate, tile)
        if g is not None:
            g[tile] = gradient
        wide = gradient.double()
        # In place, what is recovered is x minus the rounded mean; the difference is corrected for.
        xmu = (
            xmu.double() + affine.excess[tile[1], None]
            if epilogue.in_place
            else x[tile] - statistics[:c][tile[1], None]
        )
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
    epilogue: Epilogue = PLAIN,
    mask: Tensor | None = None,
) -> None:
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    refuse_mask(mask)
    dx, x, dy = flatten(dx, x, dy)
    c = x.shape[1]
    n = statistics[-1].clamp(min=1)
    affine = _Affine(x, statistics, weight, bias, epilogue)
    slope = sums[c:] / n * statistics[c:-1].square()
    # The rounding error of the mean, times slope, is corrected for in the constant term.
    mean_dy = (sums[:c] / n + affine.excess * slope).to(affine.mean.dtype)
    slope = slope.to(affine.mean.dtype)
    for tile in _tiles(x):
        channels = tile[1], None
        g, xmu = _differentiate(dy, x, affine, epilogue, None, tile)
        t = g - xmu * slope[channels]
        t -= mean_dy[channels]
        t *= affine.scale[channels]
        dx[tile] = t


class _Affine:
    """Constants per channel, rounded to the accumulate dtype: mean, scale = invstd * weight, bias.

    `excess` is the rounded mean minus the exact one, in float64.
    """

    def __init__(
        self, x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, epilogue: Epilogue
    ) -> None:
        c = x.shape[1]
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = statistics[c:-1]
        if weight is not None:
            weight = weight.double()
            if epilogue.in_place:
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
    dy: Tensor, x: Tensor, affine: _Affine, epilogue: Epilogue, gate: Tensor | None, tile: tuple[slice, slice, slice]
) -> tuple[Tensor, Tensor]:
    """Returns g, the gradient of z, and x - mean for the rounded mean, of a tile and in the accumulate dtype."""
    g, v = dy[tile].to(affine.mean.dtype), x[tile].to(affine.mean.dtype)
    if epilogue.in_place:
        slope = 1.0 if epilogue.activation == "none" else epilogue.slope
        return torch.where(v <= 0, g * slope, g), affine.inverse(torch.where(v < 0, v * (1 / slope), v), tile[1])
    xmu = v - affine.mean[tile[1], None]
    if epilogue.activation == "none":
        return g, xmu
    if epilogue.activation == "silu":
        z = affine.forward(xmu, tile[1])
        if gate is not None:
            z += gate[tile]
        p = z.sigmoid()
        return g * (p * (1 + z * (1 - p))), xmu
    z = affine.forward(xmu, tile[1]) if gate is None else gate[tile]
    return torch.where(z <= 0, g * epilogue.slope if epilogue.slope else 0.0, g), xmu


def _activate(z: Tensor, epilogue: Epilogue) -> Tensor:
    if epilogue.activation == "silu":
        return torch.nn.functional.silu(z)
    if epilogue.activation == "none":
        return z
    return torch.where(z < 0, z * epilogue.slope if epilogue.slope else 0.0, z)
