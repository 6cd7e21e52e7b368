"""The kernels that write a batch from sums per channel: normalise and backward_elemt.

Both go from the end of the batch to its start: what the sums read last may still be in the cache.
"""

import triton
import triton.language as tl

from .arithmetic import (
    activate,
    affine,
    channels_of,
    constants,
    differentiate,
    first_tile,
    is_last,
    masked,
    narrow,
    next_tile,
    only,
    tile_at,
)


@triton.jit
def approach(buffer, target, factor, inside):
    """Moves what is in buffer towards target by a factor."""
    old = tl.load(buffer, inside, other=0.0).to(tl.float64)
    tl.store(buffer, narrow(old + factor * (target - old), buffer.dtype.element_ty), inside)


@triton.jit
def normalise_kernel(
    x, y, residual, mask, moments, center, weight, bias, running_mean, running_var, batches, momentum_tensor, counter,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, eps: tl.float64, momentum: tl.float64, slope: tl.float64, floor: tl.float64,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y, by statistics that each program makes of the moments; the last one of each block of channels stores them."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, part = tl.program_id(0), tl.program_id(1)
    width = tl.cast(units, tl.int64) * UNIT
    channels, inside = channels_of(block, c, LAST, COLS)
    count = tl.load(moments + 2 * c)
    elements = tl.where(count < 1, 1.0, count)  # NaN stays NaN
    offset = tl.load(moments + channels, inside, other=0.0) / elements
    # Rounding may leave a tiny negative difference where all elements are equal.
    var = tl.load(moments + c + channels, inside, other=1.0) / elements - offset * offset
    var = tl.where(var < 0, 0.0, var)
    mean = offset
    if center is not None:
        mean = tl.load(center + channels, inside, other=0.0) + offset
    invstd = 1.0 / tl.sqrt(var + eps)

    last = parts == 1
    if parts > 1:
        last = is_last(counter + block, parts)  # all programs have read the moments, which can then be written
    if last:
        tl.store(moments + channels, mean, inside)
        tl.store(moments + c + channels, invstd, inside)
        # A refused count leaves the running statistics as they are; so does one of 0.
        if (count > 1) & (count == tl.floor(count)) & (count < float("inf")):
            factor = tl.full([], momentum, tl.float64)
            if momentum_tensor is not None:
                factor = tl.load(momentum_tensor).to(tl.float64)
            if running_mean is not None:
                approach(running_mean + channels, mean, factor, inside)
                approach(running_var + channels, var * (count / (count - 1)), factor, inside)
            if batches is not None:
                if block == 0:
                    tl.store(batches, tl.load(batches) + 1)

    lowest = tl.full([], floor, tl.float64) if IN_PLACE else None
    slope = tl.full([], slope, ACC)
    scale, shift = affine(invstd, weight, bias, channels, inside, lowest, ACC)
    m = mean.to(ACC)
    first = (parts - 1 - tl.cast(part, tl.int64)) * tiles_in_part
    row, col = first_tile(first, block, tiles_in_row, LAST, ROWS, COLS)
    for _ in range(first, tl.minimum(first + tiles_in_part, tiles)):
        start, place, there = tile_at(row, col, block, n, c, width, LAST, ROWS, COLS)
        valid, loaded, _ = masked(there, mask, row, col, n, width, LAST, ROWS, COLS)
        row, col = next_tile(row, col, width, LAST, ROWS, COLS)
        z = (tl.load(x + start + place, loaded, other=0.0).to(ACC) - m) * scale
        if bias is not None:
            z += shift
        if residual is not None:
            z += tl.load(residual + start + place, loaded, other=0.0).to(ACC)
        tl.store(y + start + place, narrow(only(activate(z, slope, ACT), valid, mask), y.dtype.element_ty), there)


@triton.jit
def backward_elemt_kernel(
    dy, x, dx, mask, statistics, weight, bias, sums,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, slope: tl.float64, steep: tl.float64, floor: tl.float64,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient: dx = weight * invstd * (g - sum_g / N - (x - mean) * invstd^2 * sum_g_xmu / N)."""
    DX: tl.constexpr = dx.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, part = tl.program_id(0), tl.program_id(1)
    width = tl.cast(units, tl.int64) * UNIT
    channels, inside = channels_of(block, c, LAST, COLS)
    lowest = tl.full([], floor, tl.float64) if IN_PLACE else None
    slope, steep = tl.full([], slope, ACC), tl.full([], steep, ACC)
    mean, invstd, m, scale, shift = constants(statistics, weight, bias, c, channels, inside, lowest, ACC)
    count = tl.load(statistics + 2 * c)
    elements = tl.where(count < 1, 1.0, count)
    tilt = tl.load(sums + c + channels, inside, other=0.0) / elements * (invstd * invstd)
    # The rounding error of the mean, times tilt, is corrected for in the constant term.
    mean_g = tl.load(sums + channels, inside, other=0.0) / elements + (m.to(tl.float64) - mean) * tilt
    tilt, mean_g = tilt.to(ACC), mean_g.to(ACC)
    first = (parts - 1 - tl.cast(part, tl.int64)) * tiles_in_part
    row, col = first_tile(first, block, tiles_in_row, LAST, ROWS, COLS)
    for _ in range(first, tl.minimum(first + tiles_in_part, tiles)):
        start, place, there = tile_at(row, col, block, n, c, width, LAST, ROWS, COLS)
        valid, loaded, _ = masked(there, mask, row, col, n, width, LAST, ROWS, COLS)
        row, col = next_tile(row, col, width, LAST, ROWS, COLS)
        v = tl.load(x + start + place, loaded, other=0.0).to(ACC)
        g = tl.load(dy + start + place, loaded, other=0.0).to(ACC)
        g, xmu = differentiate(g, v, None, m, scale, shift, slope, steep, ACT, IN_PLACE)
        tl.store(dx + start + place, narrow(only((g - xmu * tilt - mean_g) * scale, valid, mask), DX), there)
