"""The kernels under test, each as the fixture `implementation` gives it, and how near the reference they must come."""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from syncbn.kernels import aten, cpu, reference

# Element-wise results in float32 from six operations; sums in float64 of at most 500 terms of order 1.
ELEMENT = {"rtol": 8 * 2.0**-24, "atol": 8 * 2.0**-24}
SUM = {"rtol": 1e-13, "atol": 1e-13}


def filled(kernel, *arguments, **options):
    """Calls a kernel that writes into an array like its first argument, and returns that."""
    like = arguments[0]
    out = (
        torch.full_like(like, torch.nan) if isinstance(like, torch.Tensor) else np.full(like.shape, np.nan, like.dtype)
    )
    assert kernel(*arguments, out, **options) is None
    return out


class Implementation(NamedTuple):
    """Kernels under test, and the library whose arrays they get."""

    kernels: ModuleType
    library: str
    tile: int = 1 << 17
    cache_bytes: int | None = None

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def arrays(self, *arrays):
        """Copies of ndarrays, of the library; other things as they are."""
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
        return [torch.from_numpy(a) if self.library == "torch" and isinstance(a, np.ndarray) else a for a in copies]

    def set_up(self, monkeypatch, request):
        """Makes this the way in which the kernels work, until the test's end."""
        monkeypatch.setattr(aten, "_TILE_CPU", self.tile)
        if self.cache_bytes is not None:
            before = cpu._library.syncbn_set_cache_bytes(self.cache_bytes)
            request.addfinalizer(lambda: cpu._library.syncbn_set_cache_bytes(before))
        return self

    def dtype(self, name):
        return getattr(torch, name) if self.library == "torch" else np.dtype(name)


IMPLEMENTATIONS = {
    "reference": Implementation(reference, "numpy"),
    "aten": Implementation(aten, "torch"),
    "aten-many_tiles": Implementation(aten, "torch", tile=5),
    "cpu-torch": Implementation(cpu, "torch"),
    "cpu-past_the_caches": Implementation(cpu, "torch", cache_bytes=0),
    "cpu-numpy": Implementation(cpu, "numpy"),
}
