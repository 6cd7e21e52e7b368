"""How a batch is cut into tiles and programs: a table, not a search, for the bits must not depend on timing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

# Elements that a thread loads at once from each array: one or two vectors of 16 bytes.
_PER_THREAD = {"sum": 8, "map": 16}
_THREADS = 256  # of a program, at most
_MAX_COLS = 256  # channels of a program, channels last
_ADDED_AT_ONCE = 2048  # elements of partial sums, for each of two sums


class Device(NamedTuple):
    """What the table asks of a device.

    Attributes:
        programs: about how many run at once.
        warp_threads: threads of a warp.
        slow_float64: whether it has one unit of float64 for 32 or more of float32.
    """

    programs: int
    warp_threads: int
    slow_float64: bool = False


class Blocks(NamedTuple):
    """A grid of programs, and the tiles of each; see arithmetic.py.

    Attributes:
        grid: (blocks of channels, parts of the batch).
        warps: of a program.
        registers: of a thread, at most. Of 256 threads with 128 registers two programs fit a multiprocessor; left to
            itself, CUDA's assembler keeps some values in memory to fit more.
        geometry: n, c, units, tiles, tiles_in_row, tiles_in_part, parts: the kernels' arguments of these names.
        shape: UNIT, LAST, ROWS, COLS: the kernels' constants of these names.
        added: ADD, how many parts' sums are added at once.
    """

    grid: tuple[int, int]
    warps: int
    registers: int
    geometry: tuple[int, int, int, int, int, int, int]
    shape: tuple[int, bool, int, int]
    added: int

    def options(self, is_hip: bool) -> dict[str, Any]:
        """Returns what the compiler is told.

        a * b + c is not contracted into one operation, which would round otherwise than the other kernels.
        """
        options: dict[str, Any] = {"num_warps": self.warps, "enable_fp_fusion": False}
        return options if is_hip else options | {"maxnreg": self.registers}


@lru_cache(maxsize=4096)
def blocks_of(n: int, c: int, s: int, itemsize: int, device: Device, kind: str, is_masked: bool = False) -> Blocks:
    """Returns how a batch of (n, c, s) is cut.

    Args:
        itemsize: of the batch's dtype, in bytes.
        device: what decides about the size of programs.
        kind: "sum" or "map", of kernels that sum or that write a batch.
        is_masked: whether there is a mask.
    """
    last = s == 1
    width = c if last else s
    per_thread = min(_PER_THREAD[kind], 64 // itemsize)  # of float64 more do not fit the registers
    if is_masked and width % 2:
        per_thread = min(per_thread, 8)  # nor of elements with an address each, and that of a mask
    most = _THREADS * per_thread
    cols = min(_power_above(c), _MAX_COLS) if last else _columns(s, most)
    rows = max(1, min(most // cols, _power_above(n)))
    while rows > 1 and rows * (c if last else c * s) >= 1 << 31:
        rows //= 2  # offsets within a tile are 32-bit integers
    blocks = -(-c // cols) if last else c
    tiles_in_row = 1 if last else -(-s // cols)
    tiles = -(-n // rows) * tiles_in_row
    tiles_in_part = max(1, -(-tiles * blocks // device.programs))
    parts = max(1, -(-tiles // tiles_in_part))
    unit = 1
    while unit * itemsize < 16 and width % (2 * unit) == 0:
        unit *= 2
    warps = max(1, rows * cols // (per_thread * device.warp_threads))
    return Blocks(
        (blocks, parts),
        warps,
        168 if kind == "sum" and (device.slow_float64 or itemsize == 8) else 128,
        (n, c, width // unit, tiles, tiles_in_row, tiles_in_part, parts),
        (unit, last, rows, cols),
        max(1, _ADDED_AT_ONCE // (cols if last else 16)),
    )


def _power_above(v: int) -> int:
    """The smallest power of 2 that is at least v, and 1."""
    return 1 << max(0, v - 1).bit_length()


def _columns(s: int, most: int) -> int:
    """Returns a power of 2, for rows of s elements.

    The largest that leaves at most an eighth of the columns unused; if there is none, the one that leaves fewest.
    """
    candidates = [1 << k for k in range(most.bit_length() - 1, 5, -1) if 1 << k < 2 * s] or [_power_above(s)]
    padded = [-(-s // cols) * cols for cols in candidates]
    for cols, elements in zip(candidates, padded, strict=True):
        if 8 * (elements - s) <= s:
            return cols
    return candidates[padded.index(min(padded))]
