"""The kernels in plain torch operations: any device that has float64, any floating dtype, any strides.

Arrays are worked through in tiles, so that no temporary of the input's size exists: a tile's float64 copy stays in the
cache. Sums are in float64, element-wise work in the accumulate dtype. Each element-wise operation rounds on its own, so
that an element's result does not depend on where the batch was cut: there is no addcmul in it, which fuses
multiplication and addition in vectors but not for the elements left over.

On an accelerator each operation is a launch. Operations that take narrow arrays beside wide ones, or write into narrow
ones, convert on the way; one that reduces in another dtype than its input's (sum(dtype=...)) first converts all of it.
Nothing is copied from the host or to it, for which both would wait and which no CUDA graph can capture: numbers are
arguments of operations, never assigned to elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layout import flatten, layout_of
from .contract import Running, is_refused
from .devices import has_float64
from .epilogue import PLAIN, Epilogue, weight_floor

# Elements of a tile on a CPU: a float64 copy then takes 1 MiB, which fits a core's cache. Bytes of a tile's temporaries
# on accelerators, of which a few fit the second-level cache of a large GPU.
_TILE_CPU = 1 << 17
_TILE_BYTES_ACCELERATOR = 1 << 25
# A tile has at least so many elements of a channel, where there are so many, so that there are few tiles to sum over.
_PER_CHANNEL = 512


def serves(x: Any) -> bool:
    """Whether these kernels take x: any tensor on a device with float64."""
    return isinstance(x, Tensor) and has_float64(x.device)


def absence() -> str:
    """Returns "": torch is there, or this module could not be imported."""
    return ""


def description() -> str:
    """What these kernels take and how they compute."""
    return "torch tensors, on any device with float64"


def _tiles(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice]]:
    """Yields the indices of tiles that cover (n, c, s), those of the same channels in a row, the largest first.

    Args:
        x: (n, c, s).
        dtype: of the temporaries, whose size is bounded.
    """
    n, c, s = x.shape
    room = _TILE_CPU if x.is_cpu else _TILE_BYTES_ACCELERATOR // dtype.itemsize
    step_s = max(1, min(s, room))
    step_n = max(1, min(n, room // step_s, -(-_PER_CHANNEL // step_s)))
    step_c = max(1, min(c, room // (step_s * step_n)))
    step_n = max(1, min(n, room // (step_s * step_c)))
    for j in range(0, c, step_c):
        for i in range(0, n, step_n):
            for k in range(0, s, step_s):
                yield slice(i, i + step_n), slice(j, j + step_c), slice(k, k + step_s)


def _invalid(like: Tensor, mask: Tensor | None) -> Tensor | None:
    """Returns where nothing is valid, (n, 1, s) in the layout of `like`, or None for nowhere."""
    return None if mask is None else layout_of(like).flatten_mask(mask).logical_not()


def _fill(v: Tensor, invalid: Tensor | None, tile: tuple[slice, slice, slice]) -> Tensor:
    """Returns v, a tile, with 0 where nothing is valid."""
    return v if invalid is None else v.masked_fill(invalid[tile[0], :, tile[2]], 0.0)


def _fill_(v: Tensor, invalid: Tensor | None, tile: tuple[slice, slice, slice]) -> None:
    """As _fill, in place, of a tile of v."""
    if invalid is not None:
        v[tile].masked_fill_(invalid[tile[0], :, tile[2]], 0.0)


class _ChannelSums:
    """Sums a and a * b per channel, over all tiles, into a (2c,) vector; element by element until the channels' last.

    Args:
        out: (2c,) float64.
    """

    def __init__(self, out: Tensor) -> None:
        self.out, self.channels = out.view(2, -1), slice(0)
        self.first = self.second = out  # sums of a, and of a * b

    def add(self, channels: slice, a: Tensor, b: Tensor) -> None:
        """Adds a tile of these channels, which is no larger than the first of them. a, b: of any floating dtypes."""
        if channels != self.channels:
            self._finish_channels()
            self.channels, self.first = channels, a.to(torch.float64, copy=True)
            self.second = self.first * b
            return
        n, _, s = a.shape
        self.first[:n, :, :s].add_(a)
        self.second[:n, :, :s].addcmul_(a, b)

    def finish(self) -> None:
        """To be called after the last tile."""
        if self.first is self.second:  # there was none
            self.out.zero_()
        self._finish_channels()

    def _finish_channels(self) -> None:
        if self.first is self.second:
            return
        for v, out in zip((self.first, self.second), self.out, strict=True):
            if v.is_cpu:  # one axis at a time: over several torch does not sum pairwise there
                torch.sum(v.sum(2), 0, out=out[self.channels])
            else:
                torch.sum(v, (0, 2), out=out[self.channels])


def stats(x: Tensor, center: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    invalid = _invalid(x, mask)
    (x,) = flatten(x)
    n, c, s = x.shape
    moments = torch.empty(2 * c + 1, dtype=torch.float64, device=x.device)
    moments[-1:].fill_(n * s)
    if invalid is not None:
        moments[-1:].sub_(invalid.sum())
    sums = _ChannelSums(moments[:-1])
    for tile in _tiles(x, torch.float64):
        v = _fill(x[tile] if center is None else x[tile] - center[tile[1], None], invalid, tile)
        sums.add(tile[1], v, v)
    sums.finish()
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
    count = float(moments[-1]) if moments.is_cpu else None
    if count is not None and is_refused(count):
        return count
    _combine(moments, center, running, eps)
    invalid = _invalid(y, mask)
    y, x, residual = flatten(y, x, residual)
    affine = _Affine(x, moments, weight, bias, epilogue)
    for tile in _tiles(x, affine.mean.dtype):
        z = x[tile] - affine.mean[tile[1], None]
        steps = affine.steps(tile[1])
        if residual is not None:
            steps.append((torch.add, residual[tile]))
        last, operand = (None, z) if epilogue.activation != "none" else steps.pop()
        for operation, v in steps:
            operation(z, v, out=z)
        if last is None:
            y[tile].copy_(_activate(z, epilogue))
        else:  # converts to y's dtype on the way
            last(z, operand, out=y[tile])
        _fill_(y, invalid, tile)
    return count


def _combine(moments: Tensor, center: Tensor | None, running: Running, eps: float) -> None:
    """Turns moments into statistics, in place, and updates the running statistics unless the count is refused.

    On accelerators that is decided by arithmetic there, for reading the count would stall the device.
    """
    c = len(moments) // 2
    count, mean, second = moments[-1], moments[:c], moments[c:-1]
    moments[:-1].div_(count.clamp(min=1))
    # clamp: rounding may leave a tiny negative difference where all elements are equal.
    var = (second - mean * mean).clamp_(min=0)
    if center is not None:
        mean += center
    torch.rsqrt(var + eps, out=second)
    if running.mean is None and running.num_batches_tracked is None:
        return
    whole = count.clamp(2, 2**62).floor_()
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(whole == count)
    if running.mean is not None:
        refused = whole != count
        unbiased = var * (count / (count - 1))
        for buffer, batch in ((running.mean, mean), (running.var, unbiased)):
            # Filled, not multiplied by 0: a refused count may be NaN.
            buffer += (batch - buffer).mul_(running.momentum).masked_fill_(refused, 0.0)


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
    invalid = _invalid(x if g is None else g, mask)
    g, x, dy, gate = flatten(g, x, dy, gate) if g is not None else (None, *flatten(x, dy, gate))
    c = x.shape[1]
    sums = torch.empty(2 * c, dtype=torch.float64, device=x.device)
    total = _ChannelSums(sums)
    affine = None if epilogue == PLAIN else _Affine(x, statistics, weight, bias, epilogue)
    for tile in _tiles(x, torch.float64):
        channels = tile[1], None
        gradient = dy[tile] if affine is None else _differentiate(dy, x, affine, epilogue, gate, tile)
        gradient = _fill(gradient, invalid, tile)
        if g is not None:
            g[tile].copy_(gradient)
        if affine is not None and epilogue.in_place:
            # What is recovered is x minus the rounded mean; the difference is corrected for.
            xmu = _recover(x, affine, epilogue, tile) + affine.excess[channels]
        else:
            xmu = x[tile] - statistics[:c][channels]
        total.add(tile[1], gradient, _fill(xmu, invalid, tile))
    total.finish()
    if grad_weight is not None:
        torch.mul(sums[c:], statistics[c:-1], out=grad_weight)
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
    invalid = _invalid(dx, mask)
    dx, x, dy = flatten(dx, x, dy)
    c = x.shape[1]
    affine = _Affine(x, statistics, weight, bias, epilogue)
    averages = sums / statistics[-1].clamp(min=1)
    slope = averages[c:] * statistics[c:-1].square()
    # The rounding error of the mean, times slope, is corrected for in the constant term.
    mean_dy = (averages[:c] + affine.excess * slope).to(affine.mean.dtype)
    slope = slope.to(affine.mean.dtype)
    for tile in _tiles(x, affine.mean.dtype):
        channels = tile[1], None
        xmu = _recover(x, affine, epilogue, tile)
        g = _differentiate(dy, x, affine, epilogue, None, tile, xmu)
        xmu *= slope[channels]
        t = torch.sub(g, xmu, out=xmu)
        t -= mean_dy[channels]
        torch.mul(t, affine.scale[channels], out=dx[tile])
        _fill_(dx, invalid, tile)


class _Affine:
    """Constants per channel, rounded to the accumulate dtype: mean, scale = invstd * weight, bias."""

    def __init__(
        self, x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, epilogue: Epilogue
    ) -> None:
        c = x.shape[1]
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._exact_mean, invstd = statistics[:c], statistics[c:-1]
        self.mean = self._exact_mean.to(accumulate)
        if weight is None:
            self.scale = invstd.to(accumulate)
        else:
            if epilogue.in_place:
                floor = weight_floor(x.dtype)
                weight = torch.where(weight.abs() < floor, floor * (1 - 2.0 * (weight < 0)), weight)
            self.scale = torch.mul(invstd, weight, out=torch.empty_like(self.mean))
        self.bias = None if bias is None else bias.to(accumulate)

    @property
    def excess(self) -> Tensor:
        """The rounded mean minus the exact one, (c,) float64."""
        return self.mean - self._exact_mean

    def steps(self, channels: slice) -> list[tuple[Any, Tensor]]:
        """The operations, and their operands, that make z of x - mean."""
        found: list[tuple[Any, Tensor]] = [(torch.mul, self.scale[channels, None])]
        return found if self.bias is None else [*found, (torch.add, self.bias[channels, None])]

    def forward(self, xmu: Tensor, channels: slice) -> Tensor:
        z = xmu * self.scale[channels, None]
        if self.bias is not None:
            z += self.bias[channels, None]
        return z

    def inverse(self, z: Tensor, channels: slice) -> Tensor:
        if self.bias is not None:
            z = z - self.bias[channels, None]
        return z * (1 / self.scale.double()).to(self.scale.dtype)[channels, None]


def _recover(x: Tensor, affine: _Affine, epilogue: Epilogue, tile: tuple[slice, slice, slice]) -> Tensor:
    """Returns x - mean for the rounded mean, of a tile and in the accumulate dtype."""
    if not epilogue.in_place:
        return x[tile] - affine.mean[tile[1], None]
    v = x[tile].to(affine.mean.dtype)
    if epilogue.activation != "none":
        v = torch.where(v < 0, v * (1 / epilogue.slope), v)
    return affine.inverse(v, tile[1])


def _differentiate(
    dy: Tensor,
    x: Tensor,
    affine: _Affine,
    epilogue: Epilogue,
    gate: Tensor | None,
    tile: tuple[slice, slice, slice],
    xmu: Tensor | None = None,
) -> Tensor:
    """Returns g, the gradient of z, of a tile: in the accumulate dtype, or that of dy where it is dy or 0.

    Args:
        dy, x, gate: as backward_reduce's.
        xmu: the tile's, as _recover returns it, where it is at hand.
    """
    activation, slope = epilogue.activation, epilogue.slope
    if activation == "none":
        return dy[tile]
    if epilogue.in_place:
        z = x[tile]
    elif gate is not None and activation != "silu":
        z = gate[tile]
    else:
        z = affine.forward(_recover(x, affine, epilogue, tile) if xmu is None else xmu, tile[1])
    if activation == "silu":
        if gate is not None:
            z += gate[tile]
        p = z.sigmoid()
        return dy[tile] * (p * (1 + z * (1 - p)))
    if not slope:
        g: Tensor = torch.ops.aten.threshold_backward(dy[tile], z, 0.0)
        return g
    wide = dy[tile].to(affine.mean.dtype)
    return torch.where(z <= 0, wide * slope, wide)


def _activate(z: Tensor, epilogue: Epilogue) -> Tensor:
    """Returns activation(z), in the memory of z."""
    if epilogue.activation == "silu":
        return torch.nn.functional.silu(z, inplace=True)
    if epilogue.slope:
        return torch.nn.functional.leaky_relu(z, epilogue.slope, inplace=True)
    return z.clamp_(min=0)
