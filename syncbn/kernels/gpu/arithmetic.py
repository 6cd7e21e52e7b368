"""What the GPU kernels have in common: tiles, sums over programs, and the formulas of a tile.

Kernels see a batch as (n, c, s), see layout.py, in tiles of [ROWS, COLS] elements. With LAST (channels last, s == 1) a
program has COLS channels, and a tile ROWS of the n rows; otherwise it has one channel, and a tile COLS positions of
ROWS samples. `width`, c with LAST and else s, is UNIT times an argument, so that the compiler knows how far rows are
aligned, and loads as many elements at once.

Vectors per channel have shape [1, COLS] with LAST, [1, 1] otherwise. `mask`, if that is not None, is dense, (n, s).
"""

import triton
import triton.language as tl

from ..epilogue import ACTIVATIONS
from .presence import is_interpreted

_INTERPRETED = tl.constexpr(is_interpreted())
_RELU = tl.constexpr(ACTIVATIONS.index("relu"))
_LEAKY_RELU = tl.constexpr(ACTIVATIONS.index("leaky_relu"))
_SILU = tl.constexpr(ACTIVATIONS.index("silu"))


@triton.jit
def channels_of(block, c, LAST: tl.constexpr, COLS: tl.constexpr):
    """The channels of a program, and which of them there are."""
    if LAST:
        channels = block * COLS + tl.arange(0, COLS)[None, :]
    else:
        channels = block + tl.arange(0, 1)[None, :]
    return channels, channels < c


@triton.jit
def first_tile(t, block, tiles_in_row, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns where tile t starts: its first row and column, int64."""
    t, block = tl.cast(t, tl.int64), tl.cast(block, tl.int64)
    if LAST:
        return t * ROWS, block * COLS
    return t // tiles_in_row * ROWS, t % tiles_in_row * COLS


@triton.jit
def next_tile(row, col, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns where the tile after that at row and col starts, without the division of first_tile."""
    if LAST:
        return row + ROWS, col
    is_end = col + COLS >= width
    return tl.where(is_end, row + ROWS, row), tl.where(is_end, 0, col + COLS)


@triton.jit
def tile_at(row, col, block, n, c, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns the offset of a tile, int64, those of its elements from there, int32, and which of them there are."""
    if LAST:
        stride = width
        first = row * stride + col
    else:
        stride = width * c
        first = row * stride + block * width + col
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (rows < tl.minimum(n - row, ROWS).to(tl.int32)) & (cols < tl.minimum(width - col, COLS).to(tl.int32))
    if ROWS == 1:
        return first, cols, inside  # a row is followed by none, however far that would be
    return first, rows * stride.to(tl.int32) + cols, inside


@triton.jit
def masked_at(mask, row, col, n, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns a tile's mask, [ROWS, 1] with LAST, [ROWS, COLS] otherwise, int32: -1 for valid positions, else 0."""
    if LAST:
        start, place = row, tl.arange(0, ROWS)[:, None]
        inside = place < tl.minimum(n - row, ROWS).to(tl.int32)
    else:
        start, place, inside = tile_at(row, col, 0, n, 1, width, LAST, ROWS, COLS)
    found = tl.load(mask.to(tl.pointer_type(tl.uint8)) + start + place, inside, other=0)
    return (0 - found.to(tl.int32)) >> 31


@triton.jit
def marked(v, positions, mask, LAST: tl.constexpr):
    """Sets what was loaded of positions that are not valid to 0.

    Bit by bit: of a select, compilers make two, of v and of its square, in float64.
    """
    if mask is not None and not LAST:
        size: tl.constexpr = v.dtype.primitive_bitwidth
        bits: tl.constexpr = tl.int64 if size == 64 else (tl.int32 if size == 32 else tl.int16)
        v = (v.to(bits, bitcast=True) & positions.to(bits)).to(v.dtype, bitcast=True)
    return v


@triton.jit
def only(v, valid, mask):
    """Sets elements that are not valid to 0, whatever they are."""
    if mask is not None:
        v = tl.where(valid, v, 0.0)
    return v


@triton.jit
def masked(inside, mask, row, col, n, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns which elements of a tile are valid, of those inside, which to load, and the tile of the mask.

    With LAST the invalid rows are not loaded. Otherwise invalid elements are, so that vectors stay whole.
    """
    valid, loaded, positions = inside, inside, inside
    if mask is not None:
        positions = masked_at(mask, row, col, n, width, LAST, ROWS, COLS)
        valid = positions != 0
        if LAST:
            valid = inside & valid
            loaded = valid
    return valid, loaded, positions


@triton.jit
def is_last(counter, parts):
    """Whether this program is the last of `parts` to come here; it then sees what the others have stored.

    It sets the counter back to 0, for the next kernel.
    """
    tl.debug_barrier()  # all threads have loaded and stored; the atomic operation then orders that for the others
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def per_channel(v, LAST: tl.constexpr):
    """Sums a tile over all but the channels."""
    if not LAST:
        v = tl.sum(v, 1, keep_dims=True)
    return tl.sum(v, 0, keep_dims=True)


@triton.jit
def over_parts(sum1, sum2, partial, counter, parts, c, channels, inside, ADD: tl.constexpr):
    """Sums two vectors per channel over the programs of a block of channels.

    Returns both sums, and whether this program is the one that has them: the last of the block to come here. It adds
    what the programs stored, ADD of them at a time, in an order that does not depend on who came when.
    """
    last = parts == 1
    if parts > 1:
        own = partial + tl.program_id(1).to(tl.int64) * (2 * c) + channels
        tl.store(own, sum1, inside)
        tl.store(own + c, sum2, inside)
        last = is_last(counter + tl.program_id(0), parts)
        if last:
            rows = tl.arange(0, ADD)[:, None]
            added1 = tl.zeros([ADD, channels.shape[1]], tl.float64)
            added2 = tl.zeros([ADD, channels.shape[1]], tl.float64)
            for first in range(0, parts, ADD):
                stored = (first + rows < parts) & inside
                place = partial + (first + rows).to(tl.int64) * (2 * c) + channels
                # Past the L1 cache, which may hold what was there before.
                added1 += tl.load(place, stored, other=0.0, cache_modifier=".cg")
                added2 += tl.load(place + c, stored, other=0.0, cache_modifier=".cg")
            sum1, sum2 = tl.sum(added1, 0, keep_dims=True), tl.sum(added2, 0, keep_dims=True)
    return sum1, sum2, last


@triton.jit
def sum_of_parts(stored, parts, ADD: tl.constexpr):
    """Sums a number over the programs of a block, in the last of them: stored has one for each part."""
    added = tl.zeros([ADD], tl.float64)
    for first in range(0, parts, ADD):
        part = first + tl.arange(0, ADD)
        added += tl.load(stored + part, part < parts, other=0.0, cache_modifier=".cg")  # see over_parts
    return tl.sum(added)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """Rounds to nearest, ties to even. The interpreter's own conversion to bfloat16 truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(v != v, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def constants(statistics, weight, bias, c, channels, inside, floor, ACC: tl.constexpr):
    """Returns mean and invstd in float64, and mean, invstd * weight and bias in the accumulate dtype.

    Weights closer to 0 than floor, if that is not None, count as that far from it, with their sign.
    """
    mean = tl.load(statistics + channels, inside, other=0.0)
    invstd = tl.load(statistics + c + channels, inside, other=0.0)
    scale, shift = affine(invstd, weight, bias, channels, inside, floor, ACC)
    return mean, invstd, mean.to(ACC), scale, shift


@triton.jit
def affine(invstd, weight, bias, channels, inside, floor, ACC: tl.constexpr):
    """Returns invstd * weight and bias, in the accumulate dtype."""
    scale = invstd
    if weight is not None:
        w = tl.load(weight + channels, inside, other=1.0).to(tl.float64)
        if floor is not None:
            w = tl.where(tl.abs(w) < floor, tl.where(w < 0, -floor, floor), w)
        scale = invstd * w
    shift = scale.to(ACC) * 0
    if bias is not None:
        shift = tl.load(bias + channels, inside, other=0.0).to(ACC)
    return scale.to(ACC), shift


@triton.jit
def activate(z, slope, ACT: tl.constexpr):
    if ACT == _RELU:
        z = tl.where(z < 0, 0.0, z)
    elif ACT == _LEAKY_RELU:
        z = tl.where(z < 0, z * slope, z)
    elif ACT == _SILU:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def differentiate(g, v, gate, mean, scale, shift, slope, steep, ACT: tl.constexpr, IN_PLACE: tl.constexpr):
    """Returns the gradient of z, and x - mean, of the rounded mean. In place v is y, of which x - mean is recovered.

    steep is 1 / slope.
    """
    if IN_PLACE:
        z = v
        if ACT == _LEAKY_RELU:
            g = tl.where(v <= 0, g * slope, g)
            z = tl.where(v < 0, v * steep, v)
        return g, (z - shift) * (1.0 / scale.to(tl.float64)).to(scale.dtype)
    xmu = v - mean
    if ACT == 0:
        return g, xmu
    z = xmu * scale + shift
    if ACT == _SILU:
        if gate is not None:
            z += gate
        p = 1.0 / (1 + tl.exp(-z))
        return g * (p * (1 + z * (1 - p))), xmu
    if gate is not None:
        z = gate
    if ACT == _RELU:
        return tl.where(z <= 0, 0.0, g), xmu
    return tl.where(z <= 0, g * slope, g), xmu
