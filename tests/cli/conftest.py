"""What tests of several commands are given."""

import pytest

from syncbn.kernels import cpu
from syncbn.nn import fused


@pytest.fixture
def without_cpu_kernels(monkeypatch):
    """Each frontend then has kernels of its own."""
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(fused, "_fused", None)
