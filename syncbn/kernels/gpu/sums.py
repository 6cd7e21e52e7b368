"""The kernels that read a batch and sum per channel: stats and backward_reduce.

Sums are of float64 in every thread. Where float64 is slow (ERROR_FREE), a thread adds pairs of float32 instead, a high
and a low part: the rounding error of each operation goes to the low part, and every _FOLD tiles both go to float64. The
error is that of the low part alone, at most _FOLD^2 * 2^-48 of the sum of squares about an element of the channel. What
differs from that element by less than 1e-19 or more than 1e19 is beyond float32's squares.
"""

import triton
import triton.language as tl

from .arithmetic import (
    channels_of,
    constants,
    differentiate,
    first_tile,
    marked,
    masked,
    narrow,
    next_tile,
    only,
    over_parts,
    per_channel,
    sum_of_parts,
    tile_at,
)

_FOLD = tl.constexpr(64)


@triton.jit
def exact_difference(a, b):
    """Returns a - b, rounded, and the rounding error."""
    d = a - b
    z = a - d
    return d, (a - (d + z)) + (z - b)


@triton.jit
def add(high, low, v, error):
    """Adds v + error to a sum of two parts."""
    total = high + v
    z = total - high
    return total, low + ((high - (total - z)) + (v - z) + error)


@triton.jit
def add_product(high, low, a, b, b_error):
    """Adds a * (b + b_error) to a sum of two parts."""
    product = a * b
    return add(high, low, product, tl.fma(a, b, -product) + a * b_error)


@triton.jit
def first_valid(
    mask, first, stop, row, col, block, n, c, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Returns the offset of the first valid element in tiles first to stop, or a negative number if there is none."""
    far: tl.constexpr = 1 << 62
    t, offset = first, tl.full([], -far, tl.int64)
    while (offset < 0) & (t < stop):
        start, place, inside = tile_at(row, col, block, n, c, width, LAST, ROWS, COLS)
        valid, _, _ = masked(inside, mask, row, col, n, width, LAST, ROWS, COLS)
        nearest = start + tl.min(tl.where(valid, place, 0x7FFFFFFF))
        offset = tl.where(tl.max(valid.to(tl.int32)) > 0, nearest, offset)
        row, col = next_tile(row, col, width, LAST, ROWS, COLS)
        t += 1
    return offset


@triton.jit
def stats_kernel(
    x, mask, center, moments, partial, counter,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ADD: tl.constexpr,
    ERROR_FREE: tl.constexpr,
):  # fmt: skip
    """Moments, [sum of x - center | sum of its square | valid positions], in float64."""
    ACC: tl.constexpr = tl.float32 if ERROR_FREE else tl.float64
    block, part = tl.program_id(0), tl.program_id(1)
    width = tl.cast(units, tl.int64) * UNIT
    channels, inside = channels_of(block, c, LAST, COLS)
    first = tl.cast(part, tl.int64) * tiles_in_part
    row, col = first_tile(first, block, tiles_in_row, LAST, ROWS, COLS)
    shift = tl.zeros(channels.shape, ACC)
    if ERROR_FREE:
        # About an element of each channel, so that the mean does not drown what is summed; taken back in float64.
        origin, across, exists = tile_at(row, col, block, n, c, width, LAST, 1, COLS if LAST else 1)
        if mask is not None:
            end = tl.minimum(first + tiles_in_part, tiles)
            origin = first_valid(mask, first, end, row, col, block, n, c, width, LAST, ROWS, COLS)
            exists = inside & (origin + across >= 0)
        shift = tl.load(x + origin + across, exists, other=0.0).to(ACC)
    elif center is not None:
        shift = tl.load(center + channels, inside, other=0.0)
    sum1 = tl.zeros([ROWS, COLS], tl.float64)
    sum2 = tl.zeros([ROWS, COLS], tl.float64)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    elements = tl.zeros([], tl.int64)
    stop = tl.minimum(first + tiles_in_part, tiles)
    positions = tl.zeros([ROWS, 1 if LAST else COLS], tl.int32)
    for some in range(first, stop, _FOLD if ERROR_FREE else tiles_in_part):
        high1, low1, high2, low2 = zeros, zeros, zeros, zeros
        for _ in range(some, tl.minimum(some + _FOLD, stop) if ERROR_FREE else stop):
            start, place, there = tile_at(row, col, block, n, c, width, LAST, ROWS, COLS)
            valid, loaded, here = masked(there, mask, row, col, n, width, LAST, ROWS, COLS)
            if mask is not None:
                positions -= here
            v = tl.load(x + start + place, loaded, other=0.0)
            if ERROR_FREE:
                v = v.to(ACC)
                v, error = exact_difference(v, shift)
                v, error = tl.where(valid, v, 0.0), tl.where(valid, error, 0.0)
                high1, low1 = add(high1, low1, v, error)
                high2, low2 = add_product(high2, low2, v, v, 2 * error)
                if mask is None:
                    elements += tl.minimum(n - row, ROWS) * (1 if LAST else tl.minimum(width - col, COLS))
            else:
                v = marked(v, here, mask, LAST).to(ACC)
                if center is not None:
                    v = tl.where(valid, v - shift, 0.0)
                sum1 += v
                sum2 += v * v
            row, col = next_tile(row, col, width, LAST, ROWS, COLS)
        if ERROR_FREE:
            sum1 += high1.to(tl.float64) + low1.to(tl.float64)
            sum2 += high2.to(tl.float64) + low2.to(tl.float64)
    total1, total2 = per_channel(sum1, LAST), per_channel(sum2, LAST)
    if mask is not None:
        elements = tl.sum(positions.to(tl.int64))
        count = elements.to(tl.float64)
        counts = partial + tl.cast(parts, tl.int64) * (2 * c)
        if block == 0:
            tl.store(counts + part, count)
    if ERROR_FREE:
        k = shift.to(tl.float64)
        total2 += k * (2 * total1 + elements * k)
        total1 += elements * k
    total1, total2, last = over_parts(total1, total2, partial, counter, parts, c, channels, inside, ADD)
    if last:
        tl.store(moments + channels, total1, inside)
        tl.store(moments + c + channels, total2, inside)
        if block == 0:
            if mask is None:
                elements = tl.cast(n, tl.int64)
                if not LAST:
                    elements = elements * width
                tl.store(moments + 2 * c, elements.to(tl.float64))
            else:
                if parts > 1:
                    count = sum_of_parts(counts, parts, ADD)
                tl.store(moments + 2 * c, count)


@triton.jit
def backward_reduce_kernel(
    dy, x, gate, g_out, mask, statistics, weight, bias, grad_weight, grad_bias, sums, partial, counter,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, slope: tl.float64, steep: tl.float64, floor: tl.float64,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ADD: tl.constexpr,
    ERROR_FREE: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (x - mean), in float64, g itself if g_out is there, and the gradients of weight and bias."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, part = tl.program_id(0), tl.program_id(1)
    width = tl.cast(units, tl.int64) * UNIT
    channels, inside = channels_of(block, c, LAST, COLS)
    lowest = tl.full([], floor, tl.float64) if IN_PLACE else None
    slope, steep = tl.full([], slope, ACC), tl.full([], steep, ACC)
    mean, invstd, m, scale, shift = constants(statistics, weight, bias, c, channels, inside, lowest, ACC)
    excess = m.to(tl.float64) - mean
    first = tl.cast(part, tl.int64) * tiles_in_part
    row, col = first_tile(first, block, tiles_in_row, LAST, ROWS, COLS)
    sum1 = tl.zeros([ROWS, COLS], tl.float64)
    sum2 = tl.zeros([ROWS, COLS], tl.float64)
    zeros = tl.zeros([ROWS, COLS], tl.float32)
    seen = tl.zeros([ROWS, 1 if LAST else COLS], tl.int32)
    stop = tl.minimum(first + tiles_in_part, tiles)
    for some in range(first, stop, _FOLD if ERROR_FREE else tiles_in_part):
        high1, low1, high2, low2 = zeros, zeros, zeros, zeros
        for _ in range(some, tl.minimum(some + _FOLD, stop) if ERROR_FREE else stop):
            start, place, there = tile_at(row, col, block, n, c, width, LAST, ROWS, COLS)
            valid, loaded, here = masked(there, mask, row, col, n, width, LAST, ROWS, COLS)
            if mask is not None:
                seen |= here
            row, col = next_tile(row, col, width, LAST, ROWS, COLS)
            v = marked(tl.load(x + start + place, loaded, other=0.0), here, mask, LAST)
            g = tl.load(dy + start + place, loaded, other=0.0).to(ACC)
            z = None
            if gate is not None:
                z = tl.load(gate + start + place, loaded, other=0.0).to(ACC)
            g, xmu = differentiate(g, v.to(ACC), z, m, scale, shift, slope, steep, ACT, IN_PLACE)
            g = only(g, valid, mask)
            if g_out is not None:
                tl.store(g_out + start + place, narrow(g, g_out.dtype.element_ty), there)
            if ERROR_FREE:
                error = zeros
                if not IN_PLACE:
                    xmu, error = exact_difference(v.to(ACC), m)
                high1, low1 = add(high1, low1, g, zeros)
                high2, low2 = add_product(high2, low2, g, xmu, error)
            else:
                wide = g.to(tl.float64)
                sum1 += wide
                # x - mean in float64: xmu, of the rounded mean and rounded again, is good to 2^-24 of x only.
                sum2 += wide * (xmu.to(tl.float64) + excess if IN_PLACE else v.to(tl.float64) - mean)
        if ERROR_FREE:
            sum1 += high1.to(tl.float64) + low1.to(tl.float64)
            sum2 += high2.to(tl.float64) + low2.to(tl.float64)
    total1, total2 = per_channel(sum1, LAST), per_channel(sum2, LAST)
    if ERROR_FREE:
        total2 += excess * total1
    if mask is not None:
        total2 = tl.where(tl.min(seen) < 0, total2, 0.0)  # of no element, whatever the mean is: 0
    total1, total2, last = over_parts(total1, total2, partial, counter, parts, c, channels, inside, ADD)
    if last:
        tl.store(sums + channels, total1, inside)
        tl.store(sums + c + channels, total2, inside)
        if grad_weight is not None:
            tl.store(grad_weight + channels, narrow(total2 * invstd, grad_weight.dtype.element_ty), inside)
        if grad_bias is not None:
            tl.store(grad_bias + channels, narrow(total1, grad_bias.dtype.element_ty), inside)
