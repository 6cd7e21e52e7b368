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


def _tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (n, c, s) into index tiles of a bounded number of elements, the last axes whole first."""
    n, c, s = x.shape
    room = _TILE_CPU if x.device.type == "cpu" else _TILE_ACCELERATOR
    step_s = max(1, min(s, room))
    step_c = max(1, min(c, room // step_s))
    step_n = max(1, min(n, room // (step_s * step_c)))
    for i in range(0, n, step_n):
        for j in range(0, c, step_c):
            for k in range(0, s, step_s):
                yield slice(i, i + step_n), slice(j, j + step_c), slice(k, k + step_s)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats(x: Tensor, center: Tensor | None) -> Tensor:
    """Sums, sums of squares and the count of one rank's x. See the package's contract."""
    n, c, s = x.shape
    moments = torch.zeros(2 * c + 1, dtype=torch.float64, device=x.device)
    total, squares = moments[:c], moments[c:-1]
    for tile in _tiles(x):
        v = x[tile].double()
        if center is not None:
            v = v - center[tile[1], None]
        total[tile[1]] += v.sum((0, 2))
        squares[tile[1]] += (v * v).sum((0, 2))
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
    accumulate = _accumulate(dtype)
    return mean.to(accumulate), invstd.to(accumulate), count


def elemt(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * (invstd * weight) + bias. See the package's contract."""
    scale = invstd if weight is None else invstd * weight
    y = torch.empty_like(x)
    for tile in _tiles(x):
        channels = tile[1], None
        t = x[tile] - mean[channels]
        t *= scale[channels]
        if bias is not None:
            t += bias[channels]
        y[tile] = t
    return y


def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Sums of dy and of dy * (x - mean) of one rank. See the package's contract."""
    c = x.shape[1]
    sums = torch.zeros(2 * c, dtype=torch.float64, device=x.device)
    sum_dy, sum_dy_xmu = sums[:c], sums[c:]
    for tile in _tiles(x):
        g = dy[tile].double()
        sum_dy[tile[1]] += g.sum((0, 2))
        sum_dy_xmu[tile[1]] += (g * (x[tile].double() - mean[tile[1], None])).sum((0, 2))
    return sums


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """The gradient: weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N). See the contract."""
    c = x.shape[1]
    n = count.clamp(min=1)
    mean_dy = (sums[:c] / n).to(mean.dtype)
    slope = (sums[c:] / n * invstd.double().square()).to(mean.dtype)
    scale = invstd if weight is None else invstd * weight
    dx = torch.empty_like(x)
    for tile in _tiles(x):
        channels = tile[1], None
        t = x[tile] - mean[channels]
        t *= slope[channels]
        t = dy[tile] - t
        t -= mean_dy[channels]
        t *= scale[channels]
        dx[tile] = t
    return dx
