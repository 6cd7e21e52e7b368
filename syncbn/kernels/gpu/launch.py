"""Launches of the GPU kernels: compiled once for each variant, then straight through Triton's launcher."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret


class Kernel:
    """A Triton function, with what has been compiled of it.

    The variant is the key: dtypes and alignments of the arrays, the constants, warps and the device. Triton's own way
    of finding it takes 11 to 20 us a launch, this one 2 to 4.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}

    def launch(
        self,
        device: torch.device,
        grid: tuple[int, int],
        warps: int,
        arrays: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Runs the function on the device's current stream.

        Args:
            arrays, numbers, constants: the function's arguments, in this order.
        """
        arguments = *arrays, *numbers, *constants
        if _INTERPRETED:
            with np.errstate(all="ignore"):  # GPUs make inf and NaN without a word
                self.function[grid](*arguments)
            return
        index = device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self.launch(device, grid, warps, arrays, numbers, constants)
            return
        variants = [None if v is None else (v.dtype, v.data_ptr() % 16) for v in arrays]
        key = index, warps, constants, *variants
        kernel = self.compiled.get(key)
        if kernel is None:
            # Without contraction of a * b + c into one operation, which would round otherwise than the other kernels.
            self.compiled[key] = self.function[grid](*arguments, num_warps=warps, enable_fp_fusion=False)
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        kernel.run(*grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


class Scratch:
    """What the programs of a kernel hand to the last of them, one for each device and stream.

    Attributes:
        partial: float64, the programs' sums.
        counter: int32, how many of a block's programs have come; 0 between kernels.
    """

    def __init__(self, device: torch.device, partial: int, counter: int) -> None:
        self.partial = torch.empty(partial, dtype=torch.float64, device=device)
        self.counter = torch.zeros(counter, dtype=torch.int32, device=device)


_scratches: dict[tuple[torch.device, int], Scratch] = {}


def scratch_of(device: torch.device, partial: int, counter: int) -> Scratch:
    """Returns scratch with room for so many elements, for kernels on the device's current stream.

    While a CUDA graph is captured it is the graph's own: graphs may be replayed on other streams, at the same time.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return Scratch(device, partial, counter)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    scratch = _scratches.get((device, stream))
    if scratch is None or len(scratch.partial) < partial or len(scratch.counter) < counter:
        scratch = Scratch(device, _room(partial), _room(counter))
        _scratches[device, stream] = scratch
    return scratch


def _room(elements: int) -> int:
    return 1 << max(12, elements.bit_length())
