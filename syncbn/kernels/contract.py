"""What the contract fixes for every implementation of the kernels; the contract itself is in __init__.py."""

from __future__ import annotations

from typing import Any, NamedTuple


class Running(NamedTuple):
    """The running statistics, which normalise updates in place.

    Attributes:
        mean, var: (c,), of any floating dtype, or both None.
        num_batches_tracked: (), the number of batches in them, or None.
        momentum: the weight of a new batch, a float or a 0-d array of x's library and device.
    """

    mean: Any = None
    var: Any = None
    num_batches_tracked: Any = None
    momentum: Any = 0.0

    @classmethod
    def of(cls, mean: Any, var: Any, num_batches_tracked: Any, momentum: Any) -> Running:
        """Returns a layer's running statistics; a momentum of None stands for their cumulative average.

        That average gives each batch the same weight: the next one 1 / (batches + 1).

        >>> Running.of(None, None, 3, None).momentum
        0.25
        """
        if momentum is None:
            batches = num_batches_tracked
            if batches is None:
                momentum = 0.0
            elif getattr(batches, "is_cpu", True):
                momentum = 1.0 / (float(batches) + 1.0)
            else:  # an accelerator's tensor stays there: reading it would stall the device
                momentum = 1.0 / (batches.double() + 1.0)
        return cls(mean, var, num_batches_tracked, momentum)


def is_refused(count: float) -> bool:
    """Whether normalise refuses to work with a count over all ranks.

    A count of 1 has no unbiased variance. One that is no whole number is a rank's way to say that something is wrong
    (see core.py). A count of 0, of ranks that are all empty, is fine: there is nothing to normalise.
    """
    return not (count == 0 or (count > 1 and count.is_integer()))
