"""The kernels that read a batch and sum per channel: stats and backward_reduce."""

import triton
import triton.language as tl

from .arithmetic import channels_of, constants, differentiate, narrow, over_parts, tile_at


@triton.jit
def stats_kernel(
    x, center, moments, partial, counter,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Moments, [sum of x - center | sum of its square | n * s], in float64."""
    block, part = tl.program_id(0), tl.program_id(1)
    width = tl.cast(units, tl.int64) * UNIT
    channels, inside = channels_of(block, c, LAST, COLS)
    if center is not None:
        shift = tl.load(center + channels, inside, other=0.0)
    first = tl.cast(part, tl.int64) * tiles_in_part
    total1 = tl.zeros([ROWS, COLS], tl.float64)
    total2 = tl.zeros([ROWS, COLS], tl.float64)
    for t in range(first, tl.minimum(first + tiles_in_part, tiles)):
        start, place, valid = tile_at(t, block, n, c, width, tiles_in_row, LAST, ROWS, COLS)
        v = tl.load(x + start + place, valid, other=0.0).to(tl.float64)
        if center is not None:
            v = tl.where(valid, v - shift, 0.0)
        total1 += v
        total2 += v * v
    sum1, sum2, last = over_parts(total1, total2, partial, counter, parts, c, channels, inside, LAST, ADD)
    if last:
        tl.store(moments + channels, sum1, inside)
        tl.store(moments + c + channels, sum2, inside)
        if block == 0:
            elements = tl.cast(n, tl.int64)
            if not LAST:
                elements = elements * width
            tl.store(moments + 2 * c, elements.to(tl.float64))


@triton.jit
def backward_reduce_kernel(
    dy, x, gate, g_out, statistics, weight, bias, grad_weight, grad_bias, sums, partial, counter,
    n: tl.int64, c: tl.int32, units: tl.int64, tiles: tl.int64, tiles_in_row: tl.int64, tiles_in_part: tl.int64,
    parts: tl.int32, slope: tl.float64, steep: tl.float64, floor: tl.float64,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ADD: tl.constexpr,
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
    total1 = tl.zeros([ROWS, COLS], tl.float64)
    total2 = tl.zeros([ROWS, COLS], tl.float64)
    for t in range(first, tl.minimum(first + tiles_in_part, tiles)):
        start, place, valid = tile_at(t, block, n, c, width, tiles_in_row, LAST, ROWS, COLS)
        v = tl.load(x + start + place, valid, other=0.0)
        g = tl.load(dy + start + place, valid, other=0.0).to(ACC)
        z = None
        if gate is not None:
            z = tl.load(gate + start + place, valid, other=0.0).to(ACC)
        g, xmu = differentiate(g, v.to(ACC), z, m, scale, shift, slope, steep, ACT, IN_PLACE)
        if g_out is not None:
            tl.store(g_out + start + place, narrow(g, g_out.dtype.element_ty), valid)
        if IN_PLACE:
            exact = xmu.to(tl.float64) + excess
        else:
            # Not of xmu: x minus the rounded mean, rounded again, would be good to 2^-24 of x only.
            exact = v.to(tl.float64) - mean
        wide = g.to(tl.float64)
        total1 += wide
        total2 += wide * exact
    sum1, sum2, last = over_parts(total1, total2, partial, counter, parts, c, channels, inside, LAST, ADD)
    if last:
        tl.store(sums + channels, sum1, inside)
        tl.store(sums + c + channels, sum2, inside)
        if grad_weight is not None:
            tl.store(grad_weight + channels, narrow(sum2 * invstd, grad_weight.dtype.element_ty), inside)
        if grad_bias is not None:
            tl.store(grad_bias + channels, narrow(sum1, grad_bias.dtype.element_ty), inside)
