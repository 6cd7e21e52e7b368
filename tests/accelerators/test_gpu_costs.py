"""What a layer costs on a GPU by the Triton kernels, counted on fake tensors: launches, messages, copies, bytes."""

import importlib.util

import pytest
import torch
from support.fake_layers import step_costs

from syncbn.kernels import Epilogue, gpu, selection
from syncbn.kernels.gpu.blocks import Device

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SHAPE = (32, 256, 56, 56)
# Passes over the batch, the least there can be: forward x; x, y. Backward dy, x; dy, x, dx. With residual and relu also
# the residual, and y and the gradient of the residual.
PASSES = {
    "plain": ({}, 3, 5),
    "contiguous": ({"channels_last": False}, 3, 5),
    "float32": ({"dtype": torch.float32}, 3, 5),
    "relu": ({"epilogue": Epilogue("relu")}, 3, 5),
    "silu": ({"epilogue": Epilogue("silu")}, 3, 5),
    "in place": ({"epilogue": Epilogue("leaky_relu", 0.1, in_place=True)}, 3, 5),
    "residual": ({"epilogue": Epilogue("relu"), "residual": True}, 4, 7),
    "residual, silu": ({"epilogue": Epilogue("silu"), "residual": True}, 4, 7),
}


class Launches:
    """In place of Kernel.launch: the functions, and the bytes of the arrays, each of which is read or written once."""

    def __init__(self):
        self.names, self.bytes = [], []

    def __call__(self, kernel, arrays):
        self.names.append(kernel.function.fn.__name__)
        self.bytes.append(sum(v.nbytes for v in arrays if v is not None))


@pytest.fixture
def launches(monkeypatch):
    from syncbn.kernels.gpu import calls, launch

    found = Launches()
    monkeypatch.setattr(selection, "_FORCED", "gpu")
    monkeypatch.setattr(gpu.presence, "serves", lambda x: True)
    monkeypatch.setattr(gpu.presence, "absence", lambda: "")
    monkeypatch.setattr(calls, "_device", lambda device: Device(programs=264, warp_threads=32))
    # A build without CUDA has no streams.
    monkeypatch.setattr(calls, "scratch_of", launch._allocate)
    monkeypatch.setattr(launch.Kernel, "launch", lambda kernel, device, blocks, arrays, *_: found(kernel, arrays))
    return found


@pytest.fixture(params=["eager", "operators"])
def way(request):
    return request.param


@pytest.mark.parametrize("kind", PASSES)
def test_two_launches_and_one_message_each_way(kind, launches, way):
    options, *_ = PASSES[kind]
    if way == "operators" and options.get("epilogue", Epilogue()).in_place:
        return  # graphs leave memory to the compiler
    forward, backward, _ = step_costs(SHAPE, way=way, **options)
    expected = ["stats_kernel", "normalise_kernel", "backward_reduce_kernel", "backward_elemt_kernel"]
    assert launches.names == expected
    for found, elements in ((forward, 2 * 256 + 1), (backward, 2 * 256)):
        assert [m.bytes for m in found.messages] == [8 * elements]
        assert (found.waits, found.uploads) == ({}, [])
        # zeros: of the counters, which calls after the first do without. clone: operators keep their moments.
        assert set(found.launches) <= {"zeros"} | ({"clone"} if way == "operators" else set())
    assert (forward.downloads, backward.downloads) == (1, 0)  # the count, which nobody waits for


@pytest.mark.parametrize("kind", PASSES)
def test_bytes_are_at_most_a_tenth_more_than_needed(kind, launches):
    options, forward, backward = PASSES[kind]
    *_, input_bytes = step_costs(SHAPE, **options)
    assert forward <= sum(launches.bytes[:2]) / input_bytes <= 1.1 * forward
    assert backward <= sum(launches.bytes[2:]) / input_bytes <= 1.1 * backward


def test_resnet50_takes_212_launches_a_step(launches):
    """Its 53 layers, batch 32, bfloat16, channels last, of which plain torch operations took 8,004."""
    shapes = [(64, 112)] + [(64, 56)] * 6 + [(256, 56)] * 4 + [(128, 56)] + [(128, 28)] * 7 + [(512, 28)] * 5
    shapes += [(256, 28)] + [(256, 14)] * 11 + [(1024, 14)] * 7 + [(512, 14)] + [(512, 7)] * 5 + [(2048, 7)] * 4
    assert len(shapes) == 53
    moved = 0
    for c, s in shapes:
        *_, input_bytes = step_costs((32, c, s, s))
        moved += input_bytes
    assert len(launches.names) == 212
    assert 8 * moved <= sum(launches.bytes) <= 1.1 * 8 * moved
