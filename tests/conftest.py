"""One thread per rank in every test: ranks share the machine's cores. And what tests of several files are given."""

import pytest
import torch
from implementations import IMPLEMENTATIONS

torch.set_num_threads(1)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """Each implementation of the kernels, in each way in which it works."""
    return IMPLEMENTATIONS[request.param].set_up(monkeypatch, request)
