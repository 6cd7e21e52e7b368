"""A communicator before each message of which the ranks compare what they are about to send: check mode.

It stands in place of another one: see syncbn.check_collectives, and the variable SYNCBN_CHECK.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from .agreement import check, said
from .labels import Label, taking_labels
from .local import LocalCommunicator

if TYPE_CHECKING:
    from . import Communicator

IS_ALWAYS_CHECKED = os.environ.get("SYNCBN_CHECK", "") not in ("", "0")


class CheckedCommunicator:
    """The same ranks.

    Args:
        comm: the communicator.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = taking_labels(comm)
        self.rank, self.world_size = comm.rank, comm.world_size

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:
        """Sums as comm does, once all ranks are found to send the same: layer, direction, call, length and facts.

        Collective:
            a sum of 8 float64 more.

        Raises:
            RuntimeError: ranks are about to send different messages, which every rank reports, and which are not sent.
        """

        def sums(numbers: list[float]) -> list[float]:
            if hasattr(buffer, "new_tensor"):
                total = buffer.new_tensor(numbers)
            else:
                total = sys.modules["numpy"].asarray(numbers)
            self.comm.all_reduce(total)
            return total.tolist()  # type: ignore[no-any-return]

        length = buffer.numel() if hasattr(buffer, "numel") else buffer.size
        check(said(length, label), self.rank, self.world_size, sums, is_call_compared=True)
        self.comm.all_reduce(buffer, label=label)


def checked(comm: Communicator) -> Communicator:
    """Returns a communicator that checks what that one sends: itself if it does, or is alone."""
    return comm if isinstance(comm, (CheckedCommunicator, LocalCommunicator)) else CheckedCommunicator(comm)


checked_graphs: Counter[str] = Counter()  # how many checks there are of graphs that send over the group of that name


def checked_in_graphs(name: str, comm: Communicator) -> Communicator:
    """Returns comm, the group of that name, checked where graphs are to be."""
    return checked(comm) if checked_graphs and checked_graphs[name] > 0 else comm
