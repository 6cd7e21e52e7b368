"""The (n, c, s) view of a batch, and back.

Kernels see every batch as an array of shape (n, c, s), whatever its number of spatial axes and its memory format:

    (N, C, H, W) contiguous       ->  (N, C, H*W)
    (N, C, H, W) channels last    ->  (N*H*W, C, 1)
    (N, C)                        ->  (N, C, 1)

Torch tensors and ndarrays are handled alike, through what both have: shape, strides, reshape and swapaxes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any


class Layout:
    """How a batch of one shape maps to (n, c, s) and back.

    Attributes:
        shape: the batch's own shape, (N, C, ...).
        channels_last: whether neighbouring channels are neighbours in memory.
        strides: of a dense array of this layout, in elements; it is flattened without a copy.
        flat_shape, flat_strides: its (n, c, s), and the strides of that.
    """

    def __init__(self, shape: tuple[int, ...], channels_last: bool) -> None:
        n, c, *spatial = shape
        s = math.prod(spatial)
        strides, step = [], c if channels_last else 1
        for size in reversed(spatial):
            strides.append(step)
            step *= size
        strides.reverse()
        self.shape, self.channels_last = shape, channels_last
        self.strides = (step, 1, *strides) if channels_last else (step * c, step, *strides)
        self.flat_shape = (n * s, c, 1) if channels_last else (n, c, s)
        self.flat_strides = (c, 1, 1) if channels_last else (c * s, s, 1)

    def flatten(self, x: Any) -> Any:
        """Views x, of this layout's shape, as (n, c, s).

        A view where the strides of x allow one; a copy otherwise (say, a contiguous dy for a channels-last x).
        """
        if hasattr(x, "as_strided") and x.stride() == self.strides:  # one operation of torch's, in place of three
            return x.as_strided(self.flat_shape, self.flat_strides)
        n, c, *spatial = self.shape
        x = x.reshape((n, c, math.prod(spatial)))
        return x.swapaxes(1, 2).reshape(self.flat_shape) if self.channels_last else x

    def flatten_mask(self, mask: Any) -> Any:
        """Views, or copies, a mask of a batch, (N, 1, ...), as (n, 1, s); None for None."""
        n, _, s = self.flat_shape
        return None if mask is None else mask.reshape((n, 1, s))

    def restore(self, y: Any) -> Any:
        """Views y, of shape (n, c, s), in this layout's shape and memory format."""
        if self.channels_last:
            n, c, *spatial = self.shape
            y = y.reshape((n, math.prod(spatial), c)).swapaxes(1, 2)
        return y.reshape(self.shape)


_layout = lru_cache(maxsize=256)(Layout)


def layout_of(x: Any) -> Layout:
    """Returns the layout in which x is flattened without a copy, where there is one."""
    if hasattr(x, "as_strided"):
        contiguous, channel_stride = x.is_contiguous(), x.stride(1)
    else:
        contiguous, channel_stride = x.flags.c_contiguous, x.strides[1] // x.itemsize
    return _layout(x.shape, not contiguous and channel_stride == 1)


def flatten(first: Any, *others: Any) -> list[Any]:
    """Views arrays of one shape as (n, c, s), all in the layout of the first; None for None."""
    layout = layout_of(first)
    return [None if x is None else layout.flatten(x) for x in (first, *others)]
