"""The host's side of the GPU kernels, on a CUDA driver that does nothing (driver.c), with Triton's own launcher.

    python tests/kernels/gpu/host.py FOLDER          a layer's launches, forward and backward, twice, then with a mask,
                                                     twice, as JSON
    python tests/kernels/gpu/host.py FOLDER --time   microseconds of a layer on the host, and of torch.nn.SyncBatchNorm

FOLDER takes the compiled driver. Tensors are on the CPU and keep what they have: no kernel runs. Of
torch.nn.SyncBatchNorm all that computes is replaced by functions that return at once, so that its time here is less
than it takes.
"""

import argparse
import ctypes
import json
import os
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

import syncbn
from syncbn import core
from syncbn.kernels import selection
from syncbn.kernels.gpu import calls, presence
from syncbn.kernels.gpu.blocks import Device
from syncbn.nn import fused


class Driver(CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


class Local:
    """A communicator of one rank that says it is of two, so that nothing is left out."""

    rank, world_size = 0, 2

    def all_reduce(self, buffer, label=None):
        pass


def load_driver(folder):
    """Compiles the driver and has Triton take it for CUDA's."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([*command, Path(__file__).with_name("driver.c")], check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # Triton before 3.6 links with it
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.driver_name.restype, stub.driver_first.restype = ctypes.c_char_p, ctypes.c_void_p
    stub.driver_launches.restype = ctypes.c_long
    driver.set_active(Driver())
    return stub


def take_gpu_kernels():
    """Makes the GPU kernels serve tensors on the CPU, which is enough where nothing runs."""
    torch.cuda.current_device = lambda: None  # the index of the CPU
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    calls._device = lambda device: Device(programs=264, warp_threads=32)
    calls.is_refused = lambda count: False  # moments are whatever memory holds
    core.check_count = lambda *_: None
    selection._FORCED, fused._fused = "gpu", None
    presence.serves = lambda x: True
    presence.absence = lambda: ""
    torch.set_num_threads(1)


def step_of(layer, x, dy, *mask):
    def step():
        torch.autograd.grad(layer(x, *mask), [x, layer.weight, layer.bias], dy)

    return step


def launches(stub):
    count = stub.driver_launches()
    found = [
        {
            "kernel": stub.driver_name(i).decode(),
            "grid": [stub.driver_grid(i, axis) for axis in range(3)],
            "threads": stub.driver_grid(i, 3),
            "first": stub.driver_first(i),
        }
        for i in range(count)
    ]
    stub.driver_reset()
    return found


def best_us(step, calls=400, rounds=9):
    for _ in range(50):
        step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(times), 1)


def torchs_layer(x):
    """torch.nn.SyncBatchNorm's autograd function on a fake group of two ranks, with kernels that return at once."""
    from torch.nn.modules._functions import SyncBatchNorm

    c = x.shape[1]
    vector, y = torch.ones(c), torch.empty_like(x)
    torch.batch_norm_stats = lambda *_: (vector, vector)
    torch.batch_norm_gather_stats_with_counts = lambda *_: (vector, vector)
    torch.batch_norm_elemt = lambda *_: y.view_as(y)
    torch.batch_norm_backward_reduce = lambda *_: (vector, vector, vector, vector)
    torch.batch_norm_backward_elemt = lambda *_: y
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    # The fake backend refuses the shapes of its gather; a sum costs the host the same.
    dist.all_gather_into_tensor = dist.all_gather_single = lambda out, v, *_, **__: dist.all_reduce(
        v, group=dist.group.WORLD
    )
    module = torch.nn.SyncBatchNorm(c)

    def layer(v):  # as its forward, but for the check that v is on a GPU
        module.num_batches_tracked.add_(1)
        return SyncBatchNorm.apply(
            v, module.weight, module.bias, module.running_mean, module.running_var, 1e-5, 0.1, dist.group.WORLD, 2
        )

    layer.weight, layer.bias = module.weight, module.bias
    return layer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    stub = load_driver(options.folder)
    take_gpu_kernels()
    x = torch.randn(8, 64, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    layer = syncbn.SyncBatchNorm(64, process_group=Local())
    dy = torch.randn_like(x)
    step = step_of(layer, x, dy)
    step()
    first = launches(stub)
    step()
    if not options.time:
        found = {"first": first, "second": launches(stub), "x": x.data_ptr()}
        masked_step = step_of(layer, x, dy, torch.ones(8, 1, 14, 14, dtype=torch.bool))
        for name in ("masked", "masked again"):
            masked_step()
            found[name] = launches(stub)
        print(json.dumps(found))
        return
    ours = best_us(step)
    theirs = best_us(step_of(torchs_layer(x), x, torch.randn_like(x)))
    print(json.dumps({"syncbn_us": ours, "torch_us": theirs, "ratio": round(ours / theirs, 2)}))


if __name__ == "__main__":
    main()
