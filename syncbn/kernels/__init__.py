"""The arithmetic of batch normalisation, as five kernels with one contract.

Every module of this package implements exactly these functions. x, y, dy, dx have shape (n, c, s), with n and s
possibly 0; `weight` and `bias` have shape (c,) or are None. The accumulate dtype is float64 for float64 input and
float32 otherwise.

    stats(x, center)                             -> moments
        (2c + 1,) float64 = [sum of x - center | sum of (x - center)^2 | n * s]; center is (c,) float64 or None for 0.
    combine(moments, center, running_mean, running_var, num_batches_tracked, momentum, eps)
        Turns the moments of all ranks, in place, into statistics, (2c + 1,) float64 = [mean | invstd | count].
        Updates running_mean and running_var, in their own dtype, and counts the batch in num_batches_tracked, () int64,
        each unless it is None; nothing if count < 2.
    elemt(x, statistics, weight, bias, y, tail, residual)
        Writes activation(z) into y, of x's dtype, with z = (x - mean) * (invstd * weight) + bias + residual.
    backward_reduce(dy, x, statistics, weight, bias, tail, gate, g)  -> sums
        (2c,) float64 = [sum of g | sum of g * (x - mean)], g = dy * activation'(z) being the gradient of z. Where there
        was a residual it needs as `gate` the y of relu and leaky_relu, which has z's sign, or the residual of silu, and
        writes g into an array of that name.
    backward_elemt(dy, x, statistics, weight, bias, sums, dx, tail)
        Writes the gradient into dx, of x's dtype, from the sums of all ranks.

Element-wise work is in the accumulate dtype, for which mean and invstd * weight are rounded. After in-place work (see
Tail) backward's x is forward's y.

| module    | arrays        | what it is                                                   |
|-----------|---------------|--------------------------------------------------------------|
| reference | ndarray       | NumPy, in float64, written like the formulas: the oracle     |
| aten      | torch.Tensor  | plain torch operations, on any device that has float64       |
| cpu       | both, on CPUs | C++: one pass over memory per kernel                         |
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

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


def select(x: Any) -> ModuleType:
    """Returns the fastest kernels that serve x, a torch tensor or an ndarray."""
    from . import cpu

    if cpu.serves(x):
        return cpu
    if isinstance(x, np.ndarray):
        from . import reference

        return reference
    from . import aten

    return aten
