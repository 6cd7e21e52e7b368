"""Launches of the GPU kernels by Triton's own launcher, on a CUDA driver that does nothing: host.py."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.kernels.gpu.blocks import Device, blocks_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("host.py"), tmp_path_factory.mktemp("driver")]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_a_layer_is_two_launches_each_way(launches):
    expected = ["stats_kernel", "normalise_kernel", "backward_reduce_kernel", "backward_elemt_kernel"]
    assert [launch["kernel"] for launch in launches["first"]] == expected


def test_what_was_compiled_is_launched_as_triton_launches_it(launches):
    """The second step goes past Triton's search: the same kernels, grids and arguments."""
    assert launches["second"] == launches["first"]
    assert launches["first"][0]["first"] == launches["x"]
    assert all(launch["threads"] == 256 and launch["grid"][1] > 1 for launch in launches["first"])


def test_a_mask_adds_no_launch(launches):
    assert launches["masked"] == launches["masked again"] == launches["first"]


@pytest.fixture
def launch():
    from syncbn.kernels.gpu import launch

    return launch


class Compiled:
    """A function of Triton's, and what it was launched with."""

    function, packed_metadata, __name__ = "function", "metadata", "compiled"

    def __init__(self):
        self.compiled, self.run_with = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return self

        return compile_and_launch

    def run(self, *arguments):
        self.run_with.append(arguments)


@pytest.fixture
def kernel(launch, monkeypatch):
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    return launch.Kernel(Compiled())


GPU = torch.device("cuda", 0)


def blocks(warps, registers):
    return blocks_of(5, 3, 7, 2, Device(3, 32), "sum")._replace(warps=warps, registers=registers)


def test_each_variant_is_compiled_once(kernel):
    """A variant is a dtype, an alignment, a constant, warps or registers; sizes are none."""
    x = torch.zeros(9, dtype=torch.float16)
    calls = [
        (GPU, blocks(4, 128), (x, None), (5, 0.5), (True,)),
        (GPU, blocks(4, 128), (x[1:], None), (5, 0.5), (True,)),
        (GPU, blocks(4, 128), (x.float(), None), (5, 0.5), (True,)),
        (GPU, blocks(4, 128), (x, x), (5, 0.5), (True,)),
        (GPU, blocks(4, 128), (x, None), (5, 0.5), (False,)),
        (GPU, blocks(8, 128), (x, None), (5, 0.5), (True,)),
        (GPU, blocks(4, 168), (x, None), (5, 0.5), (True,)),
    ]
    for call in calls:
        kernel.launch(*call)
    assert len(kernel.function.compiled) == len(calls)
    assert kernel.function.run_with == []
    assert kernel.function.compiled[0][2]["enable_fp_fusion"] is False
    kernel.launch(GPU, blocks(4, 128)._replace(grid=(3, 4)), (x, None), (6, 0.25), (True,))
    assert len(kernel.function.compiled) == len(calls)
    assert kernel.function.run_with == [(3, 4, 1, 70, "function", "metadata", None, None, None, x, None, 6, 0.25, True)]


def test_within_a_capture_nothing_is_compiled(kernel, monkeypatch):
    call = GPU, blocks(4, 128), (torch.zeros(8),), (), ()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a step before the capture .*float32 on cuda:0; .*: run a step"):
        kernel.launch(*call)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel.launch(*call)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel.launch(*call)
    assert (len(kernel.function.compiled), len(kernel.function.run_with)) == (1, 1)


def test_triton_before_3_3_finds_what_was_compiled_itself(kernel, launch, monkeypatch):
    monkeypatch.setattr(launch, "_IS_FOUND_HERE", False)
    for _ in range(2):
        kernel.launch(GPU, blocks(4, 128), (torch.zeros(8),), (), ())
    assert (len(kernel.function.compiled), len(kernel.function.run_with)) == (2, 0)


def test_a_tensor_of_another_device_is_worked_on_there(kernel, monkeypatch):
    """Triton launches on the current device, which it therefore has to be."""
    current = [0]

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    x = torch.zeros(8)
    for _ in range(2):
        kernel.launch(torch.device("cuda", 1), blocks(4, 128), (x,), (), ())
    assert current == [0]
    assert [arguments[3] for arguments in kernel.function.run_with] == [71]


def test_scratch_is_kept_for_each_stream_and_grows(launch, monkeypatch):
    monkeypatch.setattr(launch, "_scratches", {})
    cpu = torch.device("cpu")
    first = launch.scratch_of(cpu, 10, 3)
    assert launch.scratch_of(cpu, 4000, 3) is first
    assert not first.counter.any()
    more = launch.scratch_of(cpu, 5000, 3)
    assert more is not first
    assert len(more.partial) >= 5000
    assert launch.scratch_of(cpu, 10, 3) is more


def test_a_graph_has_scratch_of_its_own(launch, monkeypatch):
    """While it is captured; for it may be replayed beside other work."""
    monkeypatch.setattr(launch, "_scratches", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made = []
    monkeypatch.setattr(launch, "_allocate", lambda *arguments: made.append(arguments) or "scratch")
    assert [launch.scratch_of(GPU, 10, 3), launch.scratch_of(GPU, 10, 3)] == ["scratch"] * 2
    assert made == [(GPU, 10, 3)] * 2
    assert launch._scratches == {}
