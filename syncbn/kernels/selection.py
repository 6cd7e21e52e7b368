"""Which implementation of the kernels serves an array."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """One implementation of the kernels, whose module is imported when it is first asked.

    Attributes:
        name: of its module, and what SYNCBN_KERNELS calls it.
    """

    name: str

    @cached_property
    def module(self) -> ModuleType:
        """The module, with the kernels."""
        return importlib.import_module(f".{self.name}", __package__)

    @property
    def description(self) -> str:
        """What it takes and how it computes."""
        description: str = self.module.description()
        return description

    def absence(self) -> str:
        """Returns why it cannot be used in this process, and what to do, or "" where it can."""
        try:
            absence: str = self.module.absence()
        except Exception as error:  # of a library that it needs: missing, or broken
            return f"it cannot be imported ({type(error).__name__}: {error})"
        return absence

    def serves(self, x: Any) -> bool:
        """Whether it can be used in this process and takes x, a torch tensor or an ndarray."""
        serves: bool = self.module.serves(x)
        return serves


# The fastest first; but reference before what needs torch, which need not be imported for an ndarray.
_IMPLEMENTATIONS = tuple(map(Implementation, ("cpu", "reference", "gpu", "aten")))

# Which one to use whatever is fastest, or "".
_FORCED = os.environ.get("SYNCBN_KERNELS", "")


def available() -> tuple[Implementation, ...]:
    """Returns all implementations, in the order of preference, with those that cannot be used in this process."""
    return _IMPLEMENTATIONS


def select(x: Any) -> Any:
    """Returns the module with the kernels for x, a torch tensor or an ndarray. See choose."""
    return choose(x).module


def choose(x: Any) -> Implementation:
    """Returns the implementation that serves x, a torch tensor or an ndarray.

    That is the fastest, or the one that the environment variable SYNCBN_KERNELS named when this package was imported.

    Raises:
        ValueError: SYNCBN_KERNELS names none.
        RuntimeError: the one that it names cannot be used in this process, or does not take x.
        TypeError: x is of neither library, or on a device without float64.
    """
    if _FORCED:
        return _forced_for(x)
    for implementation in _IMPLEMENTATIONS:
        if implementation.serves(x):
            return implementation
    if hasattr(x, "is_cpu"):
        raise TypeError(
            f"expected a tensor on a device with float64, in which statistics are summed; got one on {x.device}, which "
            "has none: train this layer on the CPU or another device, or use nn.BatchNorm"
        )
    raise TypeError(f"expected a torch tensor or an ndarray; got {type(x).__name__}: convert it first")


def forced() -> Implementation | None:
    """Returns the implementation that SYNCBN_KERNELS names, or None where it is not set.

    Raises:
        ValueError: it names none.
    """
    if not _FORCED:
        return None
    for implementation in _IMPLEMENTATIONS:
        if implementation.name == _FORCED:
            return implementation
    names = ", ".join(implementation.name for implementation in _IMPLEMENTATIONS)
    raise ValueError(
        f"expected the environment variable SYNCBN_KERNELS to be one of {names}; got {_FORCED!r}: set it to one of "
        "them, or unset it"
    )


def _forced_for(x: Any) -> Implementation:
    implementation = forced()
    assert implementation is not None
    if reason := implementation.absence():
        raise RuntimeError(
            f"expected the {implementation.name} kernels, for SYNCBN_KERNELS={implementation.name}; they are not "
            f"available: {reason}"
        )
    if not implementation.serves(x):
        where = f" on {x.device}" if hasattr(x, "is_cpu") else ""
        raise RuntimeError(
            f"expected what the {implementation.name} kernels take, for SYNCBN_KERNELS={implementation.name}: "
            f"{implementation.description}; got a {type(x).__module__.partition('.')[0]}.{type(x).__name__}{where}: "
            "unset SYNCBN_KERNELS"
        )
    return implementation


def instruction_set() -> str | None:
    """Returns the instruction set of the compiled kernels (avx512, avx2 or baseline), or None without them."""
    from . import cpu

    return cpu.instruction_set()
