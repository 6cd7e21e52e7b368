"""The kernels under test, each as the fixture `implementation` gives it."""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from syncbn.kernels import PLAIN, Running, aten, cpu, gpu, reference

NOTHING = Running()  # to update


def normalised(kernels, x, statistics, weight, bias, epilogue=PLAIN, residual=None, y=None, mask=None):
    """Calls normalise so that it works with these statistics, [mean | invstd | any count], and returns y."""
    c = x.shape[1]
    y = nan_like(x) if y is None else y
    moments = statistics * 0 + 2.0  # of two elements: the count changes nothing here
    moments[:c], moments[c:-1] = 0.0, 2.0 / statistics[c:-1] ** 2
    count = kernels.normalise(x, moments, statistics[:c], NOTHING, 0.0, weight, bias, y, epilogue, residual, mask)
    assert count == 2.0
    return y


def combined(kernels, moments, center=None, running=NOTHING, eps=0.0):
    """Calls normalise with an empty x, for what it makes of moments and running; returns the count."""
    c = len(moments) // 2
    x = moments[:0].reshape(0, c, 1)
    return kernels.normalise(x, moments, center, running, eps, None, None, x)


def nan_like(x):
    return torch.full_like(x, torch.nan) if isinstance(x, torch.Tensor) else np.full(x.shape, np.nan, x.dtype)


def filled(kernel, *arguments, **options):
    """Calls a kernel that writes into an array like its first argument, and returns that."""
    out = nan_like(arguments[0])
    assert kernel(*arguments, out, **options) is None
    return out


class Implementation(NamedTuple):
    """Kernels under test, and the library whose arrays they get."""

    kernels: ModuleType
    library: str
    tile: int = 1 << 17
    cache_bytes: int | None = None
    error_free: bool = False

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def arrays(self, *arrays):
        """Copies of ndarrays, of the library; other things as they are."""
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
        return [torch.from_numpy(a) if self.library == "torch" and isinstance(a, np.ndarray) else a for a in copies]

    def set_up(self, monkeypatch, request):
        """Makes this the way in which the kernels work, until the test's end."""
        monkeypatch.setattr(aten, "_TILE_CPU", self.tile)
        if self.kernels is gpu:
            assert gpu.presence.is_interpreted(), "set TRITON_INTERPRET=1 for the tests marked as interpreted"
            if "(1, 300, 2)" in request.node.name:
                pytest.skip("interpreted, 300 programs take seconds each; tests/kernels/gpu has 70 channels and more")
            left_out = "(5, 3, 7)-all", "(3, 5, 67)-float16", "leaky_relu-(9, 2, 601)-random"
            if any(case in request.node.name for case in left_out):
                pytest.skip("interpreted, as much is shown by its neighbours")
            from syncbn.kernels.gpu import calls

            device = calls._INTERPRETED._replace(slow_float64=self.error_free)
            monkeypatch.setattr(calls, "_device", lambda _: device)
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
    "gpu": Implementation(gpu, "torch"),
    "gpu-error_free": Implementation(gpu, "torch", error_free=True),
}
