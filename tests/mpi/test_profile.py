"""syncbn.profile over MPI, without torch.distributed."""

import pytest
import torch
from mpi4py import MPI
from torch import nn

import syncbn

SIZE = MPI.COMM_WORLD.Get_size()
pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_gets_the_figures_of_all(dtype):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).to(dtype)
    syncbn.convert_sync_batchnorm(model, MPI.COMM_WORLD)
    with syncbn.profile(model) as report:
        for _ in range(3):
            model(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
    forward = 6 if dtype == torch.float64 else 3
    assert [(row.layer, row.messages, row.bytes) for row in report.rows] == [
        (layer, messages, messages * length) for layer in ("1", "3") for messages, length in ((forward, 72), (3, 64))
    ]
    assert report.is_complete
    figures = [(row.kernel_seconds, row.message_seconds, row.came_last) for row in report.rows]
    assert MPI.COMM_WORLD.bcast(figures) == figures
    assert all(len(seconds) == SIZE and min(seconds) > 0 for row in figures for seconds in row[:2])
