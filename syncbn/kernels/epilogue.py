"""Activation and in-place work, fused into normalise and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


class Epilogue(NamedTuple):
    """What normalise does with z = (x - mean) * invstd * weight + bias + residual; backward differentiates it.

    Attributes:
        activation: one of ACTIVATIONS.
        slope: of leaky_relu below 0; at least 0, in place at least 2^-10. 0 for the others.
        in_place: y overwrites x, and backward recovers x - mean from y. A weight closer to 0 than `weight_floor` then
            counts as that far from it, for with a weight of 0 y would not depend on x.
    """

    activation: str = "none"
    slope: float = 0.0
    in_place: bool = False


PLAIN = Epilogue()


def weight_floor(dtype: Any) -> float:
    """Returns the smallest absolute weight of in-place work, for arrays of that dtype.

    Where y is about as large as bias, x - mean is recovered from it with an error of roundoff * |bias / weight|
    standard deviations of x, which the floor bounds. The floor changes y by at most floor standard deviations of x.
    """
    return 2.0**-10 if dtype.itemsize == 2 else 2.0**-17


def check_epilogue(epilogue: Epilogue) -> None:
    """Refuses an epilogue that the kernels do not have.

    Raises:
        TypeError: a slope that is no number.
        ValueError: an unknown activation, one that cannot be inverted in place, or a slope that does not fit.
    """
    activation, slope, in_place = epilogue
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected act to be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if in_place and activation not in ("none", "leaky_relu"):
        raise ValueError(
            "expected an act that can be inverted, none or leaky_relu, with inplace=True; got "
            f"{activation!r}: use one of them, or inplace=False"
        )
    if not isinstance(slope, (int, float)):
        raise TypeError(f"expected negative_slope to be a number; got {type(slope).__name__}")
    least = 2.0**-10 if in_place and activation == "leaky_relu" else 0.0
    if not least <= slope < float("inf"):
        raise ValueError(
            f"expected a negative_slope of at least {'2^-10 with inplace=True' if least else '0'}; got {slope}"
        )
