"""The arithmetic of batch normalisation, as four kernels with one contract.

Every implementation is a module of this package with exactly these functions. x, y, dy, dx, residual, gate and g have
one shape, (N, C, ...), with everything but C possibly 0; what is read has any strides, what is written is dense,
contiguous or channels last. Kernels see all of it as (n, c, s), see layout.py; the sizes below mean that view. `weight`
and `bias` have shape (c,) or are None. The accumulate dtype is float64 for float64 input and float32 otherwise.

    stats(x, center, mask=None)  -> moments
        (2c + 1,) float64 = [sum of x - center | sum of (x - center)^2 | n * s, or the number of valid positions];
        center is (c,) float64 or None for 0.

    normalise(x, moments, center, running, eps, weight, bias, y, epilogue=PLAIN, residual=None, mask=None)  -> count
        Turns the moments of all ranks, in place, into statistics, (2c + 1,) float64 = [mean | invstd | count], updates
        `running`, and writes activation(z) into y, of x's dtype, with
            z = (x - mean) * (invstd * weight) + bias + residual.
        The members of `running` (see Running) are of any floating dtype, or None. With a count of 0, of ranks that are
        all empty, `running` stays as it is. Any other count that is not a whole number of at least 2 is refused: then
        nothing is written, neither moments, nor running, nor y. Returns the count as a float, or None on accelerators,
        where reading it would stall the device; there a refused count leaves `running` as it is, and y becomes
        activation(bias + residual) for a count of 1, and NaN for one of NaN.

    backward_reduce(dy, x, statistics, weight, bias, grad_weight=None, grad_bias=None, epilogue=PLAIN, gate=None,
                    g=None, mask=None)  -> sums
        (2c,) float64 = [sum of g | sum of g * (x - mean)], where g = dy * activation'(z) is the gradient of z. Writes
        the gradients of weight and bias, which are invstd times the second and the first, into (c,) arrays of any
        floating dtype, unless they are None. After a forward with activation and residual, `gate` is y (relu,
        leaky_relu: it has the sign of z) or the residual (silu), and g is written into the array of that name.

    backward_elemt(dy, x, statistics, weight, bias, sums, dx, epilogue=PLAIN, mask=None)
        Writes the gradient of x into dx, of x's dtype, from the sums of all ranks. After a forward with activation and
        residual it takes g as dy, and an epilogue without activation.

Element-wise arithmetic is in the accumulate dtype, to which mean and invstd * weight are rounded. After in-place work
(see Epilogue) backward's x is forward's y.

`mask` says which positions are valid (True); None: all. It is bool, of x's library and device, of shape (N, 1, ...)
with x's own N and spatial sizes, and of any strides, 0 included. Whatever stands elsewhere in x, dy, residual and gate,
NaN and infinity included, all sums are of valid positions, and y, g (where it is written) and dx are 0 elsewhere, with
every epilogue. NaN at a valid position is not hidden. Nothing in a message tells whether there was a mask, so ranks
with and without one can be summed; that of no valid position is an empty rank's. Kernels read x as often as without a
mask, and make no compacted copy of it; they may copy the mask.

| module    | arrays        | what it is                                                   |
|-----------|---------------|--------------------------------------------------------------|
| reference | ndarray       | NumPy, in float64, written like the formulas: the oracle     |
| aten      | torch.Tensor  | plain torch operations, on any device that has float64       |
| gpu       | torch.Tensor  | Triton, on CUDA and ROCm: one launch per kernel              |
| cpu       | both, on CPUs | C++: one pass over memory per kernel                         |

`select` chooses one for an array. No code outside this package names one, so that they can be added and removed here: a
new one gets a line in selection.py, and besides the kernels has

    serves(x)      -> whether it takes x, a torch tensor or an ndarray
    absence()      -> why it cannot be used in this process and what to do, or ""
    description()  -> what it takes and how it computes
"""

from __future__ import annotations

from .contract import Running as Running
from .contract import is_refused as is_refused
from .devices import has_float64 as has_float64
from .epilogue import ACTIVATIONS as ACTIVATIONS
from .epilogue import PLAIN as PLAIN
from .epilogue import Epilogue as Epilogue
from .epilogue import check_epilogue as check_epilogue
from .memory import empty as empty
from .selection import Implementation as Implementation
from .selection import available as available
from .selection import choose as choose
from .selection import forced as forced
from .selection import instruction_set as instruction_set
from .selection import select as select
