"""What a message is for: communicators get it beside the message, to name it in reports."""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .local import LocalCommunicator

if TYPE_CHECKING:
    from . import Communicator


TAG_BYTES = 112  # as in csrc/shared_memory.cpp


@dataclass(eq=False, slots=True)
class Label:
    """Which sum a layer asks for.

    The object is the layer's own, one a direction, for making one a message would cost a small layer a percent of its
    time: who keeps it copies `call`, which goes on.

    Attributes:
        layer: the module's path in the model that was converted; else class and channels.
        direction: "forward", "backward", or "derivatives": sums of second derivatives and of torch.func.
        call: which call of the layer in this direction, counted from 0; -1 before the first, and in derivatives. Both
            messages of float64 input have one number.
        address: what tag returned, or 0 before.
    """

    layer: str
    direction: str
    call: int = -1
    address: int = field(default=0, repr=False)
    _tag: Any = field(default=None, repr=False)

    def tag(self) -> int:
        """Returns the address of TAG_BYTES bytes, the text of layer and direction, for messages in shared memory."""
        if not self.address:
            text = f"{self.direction} of {self.layer}".encode()
            if len(text) >= TAG_BYTES:  # the ends of paths are what differs
                text = b"..." + text[4 - TAG_BYTES :]
            self._tag = ctypes.create_string_buffer(text, TAG_BYTES)
            self.address = ctypes.addressof(self._tag)
        return self.address

    def __str__(self) -> str:
        return f"{self.direction} of {self.layer}" + (f", call {self.call}" if self.call >= 0 else "")

    def __getstate__(self) -> tuple[str, str, int]:
        return self.layer, self.direction, self.call

    def __setstate__(self, state: tuple[str, str, int]) -> None:
        self.layer, self.direction, self.call = state
        self.address, self._tag = 0, None


class Labels(NamedTuple):
    """The labels of one layer."""

    forward: Label
    backward: Label
    derivatives: Label

    @classmethod
    def of(cls, layer: str) -> Labels:
        """Returns new ones, before the first call."""
        return cls(Label(layer, "forward"), Label(layer, "backward"), Label(layer, "derivatives"))


# Of the message by which the ranks agree on a layer's noise.
AGREEMENT = Label("a noisy layer", "agreement on seed and count")


def counted(label: Label | None, comm: Communicator) -> Label | None:
    """Returns the label, of one call more over comm; a world of one has nothing to count."""
    if label is not None and type(comm) is not LocalCommunicator:
        label.call += 1
    return label


def taking_labels(comm: Communicator) -> Communicator:
    """Returns a communicator whose all_reduce takes a label: this one if it does."""
    try:
        takes_label = "label" in inspect.signature(comm.all_reduce).parameters
    except (TypeError, ValueError):  # of a builtin, say
        takes_label = False
    return comm if takes_label else _Unlabelled(comm)


class _Unlabelled:
    """Sends over a communicator whose all_reduce takes no label."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def world_size(self) -> int:
        return self._comm.world_size

    def all_reduce(self, buffer: Any, label: Label | None = None) -> None:  # noqa: ARG002
        self._comm.all_reduce(buffer)
