"""Lightning's plugin for these layers: `Trainer(plugins=[syncbn.lightning.LayerSync()])`.

`LayerSync` is made when it is first asked for: it is a subclass of Lightning's, which is no requirement of syncbn. It
is of the package that is imported: lightning, else pytorch_lightning.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from .nn import convert_sync_batchnorm, revert_sync_batchnorm

_PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def __getattr__(name: str) -> Any:
    if name == "LayerSync":
        globals()[name] = found = _layer_sync()
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _layer_sync() -> Any:
    imported = [package for package in _PACKAGES if package in sys.modules]
    base: Any = None
    for package in imported or _PACKAGES:
        try:
            base = importlib.import_module(f"{_PACKAGES[package]}.plugins.layer_sync").LayerSync
            break
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
    if base is None:
        raise ModuleNotFoundError("expected Lightning, of which LayerSync is a plugin; got none: pip install lightning")

    class LayerSync(base):  # type: ignore[misc]
        """Synchronises a LightningModule's BatchNorm layers while it is trained: Lightning applies and reverts it.

        Leave out `Trainer(sync_batchnorm=True)`, which is another plugin: torch's layers, which refuse CPUs.

        Args:
            process_group, fuse: as syncbn.convert_sync_batchnorm.
        """

        def __init__(self, process_group: Any = None, fuse: bool = False) -> None:
            self.process_group, self.fuse = process_group, fuse

        def apply(self, model: nn.Module) -> nn.Module:
            """Converts the model, in place."""
            return convert_sync_batchnorm(model, self.process_group, self.fuse)

        def revert(self, model: nn.Module) -> nn.Module:
            """Reverts it, in place."""
            return revert_sync_batchnorm(model)

    LayerSync.__module__, LayerSync.__qualname__ = __name__, "LayerSync"  # where pickles find it
    return LayerSync
