"""The (n, c, s) view of a batch, and back.

Kernels see every batch as an array of shape (n, c, s), whatever its number of spatial axes and its memory format:

    (N, C, H, W) contiguous       ->  (N, C, H*W)
    (N, C, H, W) channels last    ->  (N*H*W, C, 1)
    (N, C)                        ->  (N, C, 1)

Torch tensors and ndarrays are handled alike, through what both have: shape, strides, reshape and swapaxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FLOATING = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a batch of one shape maps to (n, c, s) and back.

    Attributes:
        shape: the batch's own shape, (N, C, ...).
        channels_last: whether neighbouring channels are neighbours in memory.
    """

    shape: tuple[int, ...]
    channels_last: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, in elements, of a dense array of this layout; it is flattened without a copy."""
        n, c, *spatial = self.shape
        order = (n, *spatial, c) if self.channels_last else self.shape
        steps = [math.prod(order[i + 1 :]) for i in range(len(order))]
        return (steps[0], steps[-1], *steps[1:-1]) if self.channels_last else tuple(steps)

    def flatten(self, x: Any) -> Any:
        """Views x, of this layout's shape, as (n, c, s).

        A view where the strides of x allow one; a copy otherwise (say, a contiguous dy for a channels-last x).
        """
        n, c, s = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        x = x.reshape((n, c, s))
        return x.swapaxes(1, 2).reshape((n * s, c, 1)) if self.channels_last else x

    def restore(self, y: Any) -> Any:
        """Views y, of shape (n, c, s), in this layout's shape and memory format."""
        if self.channels_last:
            n, c, s = self.shape[0], self.shape[1], math.prod(self.shape[2:])
            y = y.reshape((n, s, c)).swapaxes(1, 2)
        return y.reshape(self.shape)


def layout_of(x: Any) -> Layout:
    """Returns the layout in which x is flattened without a copy, where there is one."""
    if callable(getattr(x, "stride", None)):
        contiguous, channel_stride = x.is_contiguous(), x.stride(1)
    else:
        contiguous, channel_stride = x.flags.c_contiguous, x.strides[1] // x.itemsize
    return Layout(tuple(x.shape), channels_last=not contiguous and channel_stride == 1)


def check_arguments(
    x: Any, num_features: int, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: Any
) -> None:
    """Refuses what is not a floating-point batch of shape (N, C, ...) with vectors of length C and sensible numbers.

    Args:
        x: a torch tensor or an ndarray.
        num_features: C, where none of the vectors says it; 0 where x does.
        weight, bias, running_mean, running_var: of x's library, or None.
        momentum: a number, or a 0-d array.
        eps: a number.

    Raises:
        TypeError: x or a vector is of none of the dtypes float16, bfloat16, float32, float64.
        ValueError: x has fewer than two axes, no channels, or a number of channels that does not fit the vectors; one
            of running_mean and running_var alone is given; eps is not above 0; momentum is not finite.
    """
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(
            f"expected an input of at least 2 axes, (N, C, ...); got {len(shape)}, shape {shape}: "
            "reshape it so that axis 1 holds the channels"
        )
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    given = {name: tuple(v.shape) for name, v in vectors.items() if v is not None}
    expected = next(iter(given.values()), (num_features or shape[1],))
    for name, got in given.items():
        if len(got) != 1 or got != expected:
            raise ValueError(
                f"expected weight, bias, running_mean and running_var of one shape, (C,); got {name} of shape {got} "
                f"for {expected}: was it replaced, or loaded from another layer?"
            )
    if shape[1] == 0 or (shape[1],) != expected:
        raise ValueError(
            f"expected an input with {expected[0] or 'at least 1'} channels on axis 1; got {shape[1]}, shape {shape}: "
            "check num_features against the layer before this one"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var, or neither; got one: pass both, or None for both")
    for name, v in {"an input": x, **vectors}.items():
        dtype = None if v is None else str(v.dtype).removeprefix("torch.")
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"expected {name} of dtype {', '.join(FLOATING)}; got {dtype}: convert it first")
    if not float(eps) > 0:
        raise ValueError(f"expected eps above 0; got {eps}: a channel of equal values would be divided by 0")
    if isinstance(momentum, (str, bytes)) or (isinstance(momentum, float) and not math.isfinite(momentum)):
        raise ValueError(f"expected momentum to be a finite number; got {momentum!r}")
