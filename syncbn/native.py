"""Loads the package's compiled libraries, which have a plain C interface, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def load(name: str) -> ctypes.CDLL | None:
    """Returns the library of that name, as "kernels._cpu", or None where it was not compiled."""
    # Found by the import system: in an editable install the library is not beside this file.
    spec = importlib.util.find_spec(f".{name}", __package__)
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def is_source_folder() -> bool:
    """Returns whether this package was imported from its source folder, as happens in the top folder of a clone."""
    return (Path(__file__).parent / "csrc").is_dir()


def absence() -> str:
    """Returns why the libraries are missing, and what to do about it. Call only where they are missing."""
    if is_source_folder():
        return (
            "imported from a source folder, where pip install --editable builds it with GCC or Clang; an installed "
            "package is imported from any other folder"
        )
    return "installed without a C++ compiler (GCC or Clang); with one, install again"
