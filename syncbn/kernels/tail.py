"""What follows the affine step of batch normalisation in the same pass over memory."""

from __future__ import annotations

from typing import Any, NamedTuple

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


class Tail(NamedTuple):
    """What follows the affine step in the same pass over memory.

    Attributes:
        activation: one of ACTIVATIONS.
        slope: of leaky_relu below 0; at least 0, and in place above it. 0 makes it relu.
        in_place: y overwrites x, and backward recovers x - mean from y. A weight closer to 0 than `weight_floor` then
            counts as that far from it, for at 0 y tells nothing about x.
    """

    activation: str = "none"
    slope: float = 0.0
    in_place: bool = False


PLAIN = Tail()


def weight_floor(dtype: Any) -> float:
    """Returns the smallest absolute weight of in-place work, for arrays of that dtype.

    Of |y| near |bias| rounding leaves x - mean an error of roundoff * |bias / weight| standard deviations, which the
    floor bounds; and it changes y by at most floor standard deviations of x.
    """
    return 2.0**-10 if dtype.itemsize == 2 else 2.0**-17
