"""The arithmetic of batch normalisation, as five kernels with one contract.

Every module of this package implements exactly these functions. x, y, dy, dx, residual, gate and g have one shape,
(N, C, ...), with everything but C possibly 0; what is read has any strides, what is written is dense, contiguous or
channels last. Kernels see all of it as (n, c, s), of which layout.py tells; sizes below are meant so. `weight` and
`bias` have shape (c,) or are None. The accumulate dtype is float64 for float64 input and float32 otherwise.

    stats(x, center)                             -> moments
        (2c + 1,) float64 = [sum of x - center | sum of (x - center)^2 | n * s]; center is (c,) float64 or None for 0.
    combine(moments, center, running_mean, running_var, num_batches_tracked, momentum, eps)  -> count
        Turns the moments of all ranks, in place, into statistics, (2c + 1,) float64 = [mean | invstd | count].
        Updates running_mean and running_var, in their own dtype, and counts the batch in num_batches_tracked, () int64,
        each unless it is None; nothing unless count is a whole number of at least 2. Returns count as a float, or None
        on accelerators, where reading it would stall the device.
    elemt(x, statistics, weight, bias, y, tail, residual)
        Writes activation(z) into y, of x's dtype, with z = (x - mean) * (invstd * weight) + bias + residual.
    backward_reduce(dy, x, statistics, weight, bias, grad_weight, grad_bias, tail, gate, g)  -> sums
        (2c,) float64 = [sum of g | sum of g * (x - mean)], g = dy * activation'(z) being the gradient of z. Writes the
        gradients of weight and bias, invstd times the second and the first, into (c,) arrays of any floating dtype,
        unless they are None. Where there was a residual it needs as `gate` the y of relu and leaky_relu, which has z's
        sign, or the residual of silu, and writes g into an array of that name.
    backward_elemt(dy, x, statistics, weight, bias, sums, dx, tail)
        Writes the gradient into dx, of x's dtype, from the sums of all ranks.

Element-wise work is in the accumulate dtype, for which mean and invstd * weight are rounded. After in-place work (see
Tail) backward's x is forward's y.

| module    | arrays        | what it is                                                   |
|-----------|---------------|--------------------------------------------------------------|
| reference | ndarray       | NumPy, in float64, written like the formulas: the oracle     |
| aten      | torch.Tensor  | plain torch operations, on any device that has float64       |
| cpu       | both, on CPUs | C++: one pass over memory per kernel                         |

What Tail says is in tail.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from . import cpu
from .tail import ACTIVATIONS as ACTIVATIONS
from .tail import PLAIN as PLAIN
from .tail import Tail as Tail
from .tail import check_tail as check_tail

Epilogue, check_epilogue = Tail, check_tail


def select(x: Any) -> ModuleType:
    """Returns the fastest kernels that serve x, a torch tensor or an ndarray."""
    if cpu.serves(x):
        return cpu
    if isinstance(x, np.ndarray):
        from . import reference

        return reference
    from . import aten

    return aten
