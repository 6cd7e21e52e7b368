"""What a message is for: communicators get it beside the message, to name it in reports."""

from __future__ import annotations

from typing import NamedTuple


class Label(NamedTuple):
    """Which sum a layer asks for.

    Attributes:
        layer: the layer's name, as its model knows it.
        direction: "forward" or "backward".
        call: which call of the layer in this direction, counted from 0. Both messages of float64 input have one number.
    """

    layer: str
    direction: str
    call: int
