"""What a message is for: communicators get it beside the message, to name it in reports."""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from .local import LocalCommunicator
from .structures import Tag

if TYPE_CHECKING:
    from . import Communicator


REFUSED = "refused its input"


class Facts(NamedTuple):
    """What a layer was told that all ranks must be told alike, for P ranks to equal one.

    Attributes:
        dtype: of the input.
        eps: added to the variance.
        momentum: of the running statistics; None where none are updated, as in evaluation.
        has_weight, has_bias: whether there are those.
    """

    dtype: Any
    eps: float
    momentum: float | None
    has_weight: bool
    has_bias: bool

    def __str__(self) -> str:
        vectors = " and ".join(["weight"] * self.has_weight + ["bias"] * self.has_bias) or "no weight or bias"
        momentum = "no running statistics to update" if self.momentum is None else f"momentum {self.momentum}"
        return f"{str(self.dtype).removeprefix('torch.')}, eps {self.eps}, {momentum}, {vectors}"


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
        facts: of the call; REFUSED where there was none; or None for nothing to compare. Set by know.
        address: what tag returned, or 0 before, and where the facts have changed.
    """

    layer: str
    direction: str
    call: int = -1
    facts: Facts | str | None = field(default=None, repr=False)
    address: int = field(default=0, repr=False)
    _tag: Any = field(default=None, repr=False)

    def know(self, facts: Facts | tuple[Any, ...] | str | None) -> None:
        """Sets the facts of this call; a tuple is that of Facts."""
        if facts != self.facts:
            self.facts = Facts(*facts) if isinstance(facts, tuple) else facts
            self.address = 0

    def tag(self) -> int:
        """Returns the address of a Tag with layer, direction and facts; valid until the facts change."""
        if not self.address:
            text = f"{self.direction} of {self.layer}".encode()
            facts = str(self.facts).encode() if isinstance(self.facts, Facts) else b""
            self._tag = Tag(crc32(text + b"\0" + facts), _end(text, Tag.text.size), facts[: Tag.facts.size - 1])
            self.address = ctypes.addressof(self._tag)
        return self.address

    def __str__(self) -> str:
        return self.of_call(self.call)

    def of_call(self, call: int) -> str:
        """Returns layer, direction and that call, for people."""
        return f"{self.direction} of {self.layer}" + (f", call {call}" if call >= 0 else "")

    def __getstate__(self) -> tuple[str, str, int]:
        return self.layer, self.direction, self.call

    def __setstate__(self, state: tuple[str, str, int]) -> None:
        self.layer, self.direction, self.call = state
        self.facts, self.address, self._tag = None, 0, None


def _end(text: bytes, size: int) -> bytes:
    """Returns a text that fits in so many bytes with a zero: of a longer one the end, for the ends of paths differ."""
    return text if len(text) < size else b"..." + text[4 - size :]


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


def know(
    label: Label | None, x: Any, eps: float, momentum: float | None, running_mean: Any, weight: Any, bias: Any
) -> None:
    """Gives a label the facts of a forward call of x, with that running_mean, weight and bias or None."""
    if label is not None:
        label.know((x.dtype, eps, None if running_mean is None else momentum, weight is not None, bias is not None))


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
