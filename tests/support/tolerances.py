"""How far results may be from the truth, where one bound serves all elements. Those of parity are in oracle.py."""

import torch

# Element-wise results of order 1 in float32 from six operations; sums in float64 of at most 500 terms of order 1.
ELEMENT = {"rtol": 8 * 2.0**-24, "atol": 8 * 2.0**-24}
SUM = {"rtol": 1e-13, "atol": 1e-13}


def rounding(dtype, operations, terms):
    """How far two orders of the same computation may be apart, for elements of order 1, as arguments of assert_close.

    Each of `operations` that follow one another adds u sqrt(terms) for a sum of that many terms of order 1 in another
    order: roundoffs differ in sign, so that they grow as the square root of their number. A margin of 3.
    """
    error = 3 * operations * torch.finfo(dtype).eps / 2 * terms**0.5
    return {"rtol": error, "atol": error}


# Training in float64, of up to ten steps, each some ten operations deep, of relative error 2^-53 sqrt(1000 terms): that
# is 3.5e-13, and a margin of 3. For `difference`.
TRAINING = 1e-12
# That of layers that are not synchronised must be beyond this.
UNSYNCHRONISED = 1e-3


def difference(state, whole):
    """The largest difference of a tensor from another run's, relative to that tensor's largest element."""
    assert state.keys() == whole.keys()
    pairs = [(state[name].double(), value.double()) for name, value in whole.items()]
    return max(((got - value).abs().max() / value.abs().max().clamp(min=1e-3)).item() for got, value in pairs)
