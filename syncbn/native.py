"""Finds what of this package is compiled: libraries with a plain C interface, for ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def load(name: str) -> ctypes.CDLL | None:
    """Returns the library of that name in the package, as "kernels._cpu", or None where it was not compiled."""
    # Where the import system finds it: in an editable install that is not beside this file.
    spec = importlib.util.find_spec(f".{name}", __package__)
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def is_source_folder() -> bool:
    """Whether this package was imported from a folder with its sources, as Python does in a clone's top folder."""
    return (Path(__file__).parent / "csrc").is_dir()


def absence() -> str:
    """Returns why the libraries are not there, where they are not, and what to do."""
    if is_source_folder():
        return (
            "imported from a source folder, where pip install --editable builds it with GCC or Clang; an installed "
            "package is imported from any other folder"
        )
    return "installed without a C++ compiler (GCC or Clang); with one, install again"
