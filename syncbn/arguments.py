"""What a batch, its vectors and its mask must be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

FLOATING = ("float16", "bfloat16", "float32", "float64")
_known_dtypes: set[Any] = set()  # dtypes of both libraries that were found to be floating: looked up in nanoseconds


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
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(
            f"expected an input of at least 2 axes, (N, C, ...); got {len(shape)}, shape {tuple(shape)}: "
            "reshape it so that axis 1 holds the channels"
        )
    expected = None
    for v in (weight, bias, running_mean, running_var):
        if v is not None:
            expected = expected or v.shape
            if v.shape != expected or len(expected) != 1 or v.dtype not in _known_dtypes:
                vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
                _check_vector(next(name for name, vector in vectors.items() if vector is v), v, expected)
    channels = expected[0] if expected else num_features or shape[1]
    if shape[1] == 0 or shape[1] != channels:
        raise ValueError(
            f"expected an input with {channels or 'at least 1'} channels on axis 1; got {shape[1]}, shape "
            f"{tuple(shape)}: check num_features against the layer before this one"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var, or neither; got one: pass both, or None for both")
    if x.dtype not in _known_dtypes:
        _check_dtype("an input", x.dtype)
    if not _is_number(eps) or not float(eps) > 0:
        raise ValueError(f"expected eps above 0; got {eps!r}: a channel of equal values would be divided by 0")
    if not _is_number(momentum) or (isinstance(momentum, float) and not math.isfinite(momentum)):
        raise ValueError(f"expected momentum to be a finite number; got {momentum!r}")


def full_mask(mask: Any, x: Any) -> Any:
    """Returns the mask of a batch in the shape that kernels take, (N, 1, *), of tensors as a view; None for None.

    Args:
        mask: bool, of x's library and device, True at valid positions: of shape (N, 1, *), (N, *), or one that
            broadcasts to (N, 1, *) by the rules of torch and NumPy; or None.
        x: (N, C, *).

    Raises:
        TypeError: mask is no array of x's library, or not of bool.
        ValueError: mask has a shape that does not fit, or is on another device.
    """
    if mask is None:
        return None
    is_tensor = hasattr(x, "as_strided")
    if not hasattr(mask, "as_strided" if is_tensor else "strides"):
        wanted = "torch.Tensor" if is_tensor else "numpy.ndarray"
        raise TypeError(f"expected mask to be a {wanted} of bool, or None; got {type(mask).__name__}: convert it first")
    if str(mask.dtype).removeprefix("torch.") != "bool":
        raise TypeError(f"expected mask of dtype bool, True at valid positions; got {mask.dtype}: pass mask != 0, say")
    if is_tensor and (mask.device, mask.layout) != (x.device, x.layout):
        raise ValueError(
            f"expected a {x.layout} mask on the input's device, {x.device}; got {mask.layout} on {mask.device}: move it"
        )
    n, _, *spatial = x.shape
    shape, full = tuple(mask.shape), (n, 1, *spatial)
    if shape == (n, *spatial) and len(shape) == len(full) - 1:
        return mask[:, None]
    axes = zip(reversed(shape), reversed(full), strict=False)
    if len(shape) > len(full) or any(size not in (1, wanted) for size, wanted in axes):
        raise ValueError(
            f"expected a mask of shape (N, 1, *), (N, *), or one that broadcasts to (N, 1, *), for an input of shape "
            f"{tuple(x.shape)}; got {shape}: it says for each position, of all channels, whether it is valid"
        )
    if shape == full:
        return mask
    if is_tensor:
        return mask.expand(full)
    mask = mask.reshape((1,) * (len(full) - len(shape)) + shape)
    for axis, size in enumerate(full):
        mask = mask if mask.shape[axis] == size else mask.repeat(size, axis)
    return mask


def _is_number(v: Any) -> bool:
    """Whether v is a number or a 0-d array."""
    return isinstance(v, (float, int, Real)) or getattr(v, "shape", None) == ()


def _check_vector(name: str, v: Any, expected: tuple[int, ...]) -> None:
    if v.shape != expected or len(expected) != 1:
        raise ValueError(
            f"expected weight, bias, running_mean and running_var of one shape, (C,); got {name} of shape "
            f"{tuple(v.shape)} for {tuple(expected)}: was it replaced, or loaded from another layer?"
        )
    _check_dtype(name, v.dtype)


def _check_dtype(name: str, dtype: Any) -> None:
    plain = str(dtype).removeprefix("torch.")
    if plain not in FLOATING:
        raise TypeError(f"expected {name} of dtype {', '.join(FLOATING)}; got {plain}: convert it first")
    _known_dtypes.add(dtype)
