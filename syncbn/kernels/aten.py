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


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats(x: Tensor, center: Tensor | None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
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
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, invstd and count from the moments of all ranks, without reading any on the host. See the contract."""
    c = len(moments) // 2
    count = moments[-1].clone()
    n = count.clamp(min=1)
    offset = moments[:c] / n
    mean = offset if center is None else center + offset
    # clamp: rounding may leave a tiny negative difference where all elements are equal.
    var = (moments[c:-1] / n - offset * offset).clamp(min=0)
    invstd = (var + eps).rsqrt()
    if running_mean is not None and running_var is not None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        # where, not a factor of 0: with count < 2 (or a refused rank's NaN) nothing may be written, NaN included.
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            updated = running + momentum * (batch - running)
            running.copy_(torch.where(count > 1, updated, running))
    return mean, invstd.to(_accumulate(dtype)), count


def elemt(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """The result: y = (x - mean) * (invstd * weight) + bias. See the package's contract."""
    mean = mean.to(invstd.dtype)
    scale = invstd if weight is None else invstd * weight
    for tile in _tiles(x):
        channels = tile[1], None
        t = x[tile] - mean[channels]
        t *= scale[channels]
        if bias is not None:
            t += bias[channels]
        y[tile] = t


def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Sums of dy and of dy * (x - mean) of one rank. See the package's contract."""
    c = x.shape[1]
    sums = torch.zeros(2 * c, dtype=torch.float64, device=x.device)
    sum_dy, sum_dy_xmu = _ChannelSums(sums[:c]), _ChannelSums(sums[c:])
    for tile in _tiles(x):
        g = dy[tile].double()
        sum_dy.add(tile[1], g)
        sum_dy_xmu.add(tile[1], g * (x[tile] - mean[tile[1], None]))
    sum_dy.finish()
    sum_dy_xmu.finish()
    return sums


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, weight: Tensor | None, sums: Tensor, dx: Tensor
) -> None:
    """The gradient: dx = weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)."""
    c = x.shape[1]
    n = count.clamp(min=1)
    rounded_mean = mean.to(invstd.dtype)
    slope = sums[c:] / n * invstd.double().square()
    # What the rounding of the mean adds to x - mean goes, times slope, into the constant term.
    mean_dy = (sums[:c] / n - (mean - rounded_mean) * slope).to(invstd.dtype)
    slope = slope.to(invstd.dtype)
    scale = invstd if weight is None else invstd * weight
    for tile in _tiles(x):
        channels = tile[1], None
        t = x[tile] - rounded_mean[channels]
        t *= slope[channels]
        t = dy[tile] - t
        t -= mean_dy[channels]
        t *= scale[channels]
        dx[tile] = t
