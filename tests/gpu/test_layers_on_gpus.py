"""Layers on GPUs, NVIDIA's or AMD's: `python -m pytest tests/gpu`, on one to all devices that torch sees.

One process a device, over NCCL (RCCL of ROCm has its name); and two processes on the first device over Gloo, so that a
machine with one GPU tests sums over ranks, too.
"""

import pytest
import torch
from support.on_devices import EVERYWHERE, ON_GPUS, run

COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
WORLDS = [(size, "nccl") for size in sorted({1, min(2, COUNT), COUNT} - {0})] + [(2, "gloo")]
pytestmark = [
    pytest.mark.skipif(not COUNT, reason="torch sees no CUDA or ROCm device"),
    pytest.mark.timeout(400),  # the first call on a device compiles kernels
]


@pytest.mark.parametrize(("size", "backend"), WORLDS)
@pytest.mark.parametrize("function", EVERYWHERE, ids=lambda function: function.__name__)
def test_layers(function, size, backend):
    run(function, size, "cuda", backend)


@pytest.mark.parametrize("size", [size for size, backend in WORLDS if backend == "nccl"] or [1])
@pytest.mark.parametrize("function", ON_GPUS, ids=lambda function: function.__name__)
def test_layers_without_the_host(function, size):
    """Not over Gloo, whose sums are the host's."""
    run(function, size, "cuda", "nccl")
