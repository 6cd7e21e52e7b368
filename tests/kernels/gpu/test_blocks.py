"""How the GPU kernels cut a batch: no element is left out or taken twice, and offsets fit their integers."""

import itertools

import numpy as np
import pytest

from syncbn.kernels.gpu.blocks import Device, blocks_of

DEVICES = [Device(programs=3, warp_threads=32), Device(programs=264, warp_threads=32), Device(7, 64)]
SHAPES = [(5, 3, 7), (1, 1, 1), (0, 4, 3), (3, 4, 0), (9, 2, 601), (5, 48, 1), (150, 3, 1), (70, 300, 1), (33, 2, 196)]
SHAPES += [(2, 3, 49), (1, 1, 5000), (1000, 1, 3)]


def visited(shape, blocks):
    """How often each element is taken, as the kernels walk: a copy of arithmetic.py's tiles in NumPy."""
    n, c, s = shape
    n_, c_, units, tiles, tiles_in_row, tiles_in_part, parts = blocks.geometry
    unit, last, rows, cols = blocks.shape
    assert (n_, c_, units * unit, parts) == (n, c, c if last else s, blocks.grid[1])
    count = np.zeros((n, c, s), int)
    for block, part in itertools.product(*map(range, blocks.grid)):
        for t in range(part * tiles_in_part, min((part + 1) * tiles_in_part, tiles)):
            if last:
                count[t * rows : (t + 1) * rows, block * cols : (block + 1) * cols] += 1
            else:
                row, col = t // tiles_in_row * rows, t % tiles_in_row * cols
                count[row : row + rows, block, col : col + cols] += 1
    return count


@pytest.mark.parametrize("kind", ["sum", "map"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_in_one_tile(shape, device, kind):
    blocks = blocks_of(*shape, 4, device, kind)
    assert (visited(shape, blocks) == 1).all()
    if 0 not in shape:  # the negative control: half the rows in each tile
        unit, last, rows, cols = blocks.shape
        less = blocks._replace(shape=(unit, last, rows // 2, cols))
        assert not (visited(shape, less) == 1).all()


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_rows_are_known_to_be_aligned_as_far_as_they_are(itemsize):
    for s in (1, 2, 4, 6, 8, 49, 196, 3136):
        unit = blocks_of(4, 7, s, itemsize, DEVICES[0], "map").shape[0] if s > 1 else 1
        assert s % unit == 0
        assert unit * itemsize <= 16
        assert unit * itemsize == 16 or s % (2 * unit) or s == 1


@pytest.mark.parametrize(
    "shape", [(64, 1 << 12, 1 << 14), (1 << 20, 1 << 25, 1), (3, 1 << 20, 1 << 12), (1, 1, 1 << 33)]
)
@pytest.mark.parametrize("kind", ["sum", "map"])
def test_offsets_within_a_tile_fit_32_bits(shape, kind):
    n, c, s = shape
    _, last, rows, cols = blocks_of(n, c, s, 2, DEVICES[1], kind).shape
    assert rows == 1 or (rows - 1) * (c if last else c * s) + cols < 1 << 31


def test_the_grid_fits_a_gpu_and_fills_it():
    """At most 65,535 parts; and a large batch has as many programs as were asked for, to within a factor of 2."""
    device = DEVICES[1]
    for n, c, s in [(100_352, 64, 1), (32, 64, 3136), (1 << 30, 2, 1), (2, 64, 1 << 16), (32, 2048, 49)]:
        for kind in ("sum", "map"):
            blocks, parts = blocks_of(n, c, s, 2, device, kind).grid
            assert parts <= 65_535
            assert blocks * parts >= min(device.programs, blocks) // 2
            assert parts == 1 or blocks * parts <= 2 * device.programs
