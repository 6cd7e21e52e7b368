"""Launches of the GPU kernels: compiled once for each variant, then straight through Triton's launcher."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from .blocks import Blocks
from .presence import is_interpreted

_INTERPRETED = is_interpreted()
# Before 3.3 what was compiled took other arguments; Triton's own way of finding it then serves.
_IS_FOUND_HERE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_interpreter = threading.Lock()  # it is one for all threads


class Kernel:
    """A Triton function, with what has been compiled of it.

    The variant is the key: dtypes and alignments of the arrays, the constants, what the compiler is told, and the
    device. Triton's own way
    of finding it takes 11 to 20 us a launch, this one 2 to 4.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}

    def launch(
        self,
        device: torch.device,
        blocks: Blocks,
        arrays: tuple[Any, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Runs the function on the device's current stream.

        Args:
            arrays, numbers, constants: the function's arguments, in this order; the first is a batch.

        Raises:
            RuntimeError: a variant that is not compiled yet, within the capture of a graph.
        """
        grid, arguments = blocks.grid, (*arrays, *numbers, *constants)
        if _INTERPRETED:
            with _interpreter, np.errstate(all="ignore"):  # GPUs make inf and NaN without a word
                self.function[grid](*arguments)
            return
        index = device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self.launch(device, blocks, arrays, numbers, constants)
            return
        variants = [None if v is None else (v.dtype, v.data_ptr() % 16) for v in arrays]
        key = index, blocks.warps, blocks.registers, constants, *variants
        kernel = self.compiled.get(key)
        if kernel is None or not _IS_FOUND_HERE:
            if kernel is None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"expected a step before the capture of a graph, which compiles {self.function.__name__} for "
                    f"{arrays[0].dtype} on {device}; got the first within one: run a step of the same shapes, dtypes "
                    "and memory formats outside, as torch.cuda.graph asks for"
                )
            self.compiled[key] = self.function[grid](*arguments, **blocks.options(bool(torch.version.hip)))
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        kernel.run(*grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


class Scratch(NamedTuple):
    """What the programs of a kernel hand to the last of them, one for each device and stream.

    Attributes:
        partial: float64, the programs' sums.
        counter: int32, how many of a block's programs have come; 0 between kernels.
        room: elements of partial and of counter.
    """

    partial: Tensor
    counter: Tensor
    room: tuple[int, int]


_scratches: dict[tuple[int | None, int], Scratch] = {}


def scratch_of(device: torch.device, partial: int, counter: int) -> Scratch:
    """Returns scratch with room for so many elements, for kernels on the device's current stream.

    While a CUDA graph is captured it is the graph's own: graphs may be replayed on other streams, at the same time.
    """
    stream, index = 0, device.index
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _allocate(device, partial, counter)
        stream = torch._C._cuda_getCurrentRawStream(index)
    scratch = _scratches.get((index, stream))
    if scratch is None or scratch.room[0] < partial or scratch.room[1] < counter:
        scratch = _scratches[index, stream] = _allocate(device, _more_than(partial), _more_than(counter))
    return scratch


def _allocate(device: torch.device, partial: int, counter: int) -> Scratch:
    return Scratch(
        torch.empty(partial, dtype=torch.float64, device=device),
        torch.zeros(counter, dtype=torch.int32, device=device),
        (partial, counter),
    )


def _more_than(elements: int) -> int:
    """A power of 2, so that scratch grows a few times only."""
    return 1 << max(12, elements.bit_length())
