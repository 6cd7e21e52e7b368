"""The arithmetic of batch normalisation, as five kernels with one contract.

Every module of this package implements exactly these functions. x, y, dy, dx have shape (n, c, s), with n and s
possibly 0; `mean`, `invstd`, `weight` and `bias` have shape (c,). The accumulate dtype is float64 for float64 input
and float32 otherwise.

    stats(x, center)                             -> moments
        (2c + 1,) float64 = [sum of x - center | sum of (x - center)^2 | n * s]; center is (c,) float64 or None for 0.
    combine(moments, center, dtype, running_mean, running_var, momentum, eps)  -> mean, invstd, count
        From the moments of all ranks. mean and count () are float64, invstd is in the accumulate dtype of `dtype`.
        Updates running_mean and running_var in place, in their own dtype, unless both are None or count < 2.
    elemt(x, mean, invstd, weight, bias, y)
        Writes (x - mean) * (invstd * weight) + bias into y, of x's dtype; weight and bias may be None.
    backward_reduce(dy, x, mean)                 -> sums
        (2c,) float64 = [sum of dy | sum of dy * (x - mean)].
    backward_elemt(dy, x, mean, invstd, count, weight, sums, dx)
        Writes the gradient into dx, of x's dtype, from the sums of all ranks.

Element-wise work is in the accumulate dtype, for which mean is rounded.

| module    | arrays        | what it is                                                   |
|-----------|---------------|--------------------------------------------------------------|
| reference | ndarray       | NumPy, in float64, written like the formulas: the oracle     |
| aten      | torch.Tensor  | plain torch operations, on any device that has float64       |
| cpu       | both, on CPUs | C++: one pass over memory per kernel                         |
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


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
