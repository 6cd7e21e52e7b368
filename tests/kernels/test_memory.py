"""What memory the kernels take, any format and any ndarray, how little they use, and how threads share it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.implementations import filled, normalised
from support.tolerances import ELEMENT, SUM

from syncbn.kernels import Epilogue, aten, cpu, reference


def as_stored(array, order):
    """A copy of an (N, C, H, W) array in that memory format; 'gaps' has them between its elements."""
    if order == "contiguous":
        return array.copy()
    if order == "channels_last":
        return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1)
    if order == "transposed":
        return array.swapaxes(2, 3).copy().swapaxes(2, 3)
    return np.repeat(array, 2, 3)[..., ::2]


@pytest.mark.parametrize("order_of_dy", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("order", ["contiguous", "channels_last", "transposed", "gaps"])
def test_batches_are_taken_in_any_memory_format(implementation, order, order_of_dy):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 5, 4, 3)).astype(np.float32)
    statistics, sums = np.append(rng.uniform(0.5, 1.5, 10), 24.0), rng.standard_normal(10)
    flat_x, flat_dy = x.reshape(2, 5, 12), dy.reshape(2, 5, 12)
    stored = []
    for array, axes in ((x, order), (dy, order_of_dy)):
        stored.append(as_stored(array, axes))
        if implementation.library == "torch":
            stored[-1] = torch.from_numpy(stored[-1])  # keeps the strides
    found_x, found_dy = stored
    statistics_, sums_ = implementation.arrays(statistics, sums)
    np.testing.assert_allclose(implementation.stats(found_x, None), reference.stats(flat_x, None), **SUM)
    np.testing.assert_allclose(
        implementation.backward_reduce(found_dy, found_x, statistics_, None, None),
        reference.backward_reduce(flat_dy, flat_x, statistics, None, None),
        **SUM,
    )
    for written in ("contiguous", "channels_last"):
        y, dx = (as_stored(np.full_like(x, np.nan), written) for _ in range(2))
        if implementation.library == "torch":
            y, dx = torch.from_numpy(y), torch.from_numpy(dx)
        normalised(implementation, found_x, statistics_, None, None, y=y)
        implementation.backward_elemt(found_dy, found_x, statistics_, None, None, sums_, dx)
        expected = normalised(reference, flat_x, statistics, None, None)
        np.testing.assert_allclose(np.asarray(y).reshape(2, 5, 12), expected, **ELEMENT)
        expected = filled(reference.backward_elemt, flat_dy, flat_x, statistics, None, None, sums)
        np.testing.assert_allclose(np.asarray(dx).reshape(2, 5, 12), expected, rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("make", ["strided", "fortran", "readonly", "misaligned", "negative"])
def test_cpu_kernels_take_every_ndarray(make):
    plain = np.random.default_rng(0).standard_normal((4, 3, 6)).astype(np.float32)
    statistics = np.ones(7)
    x = {
        "strided": lambda: np.repeat(plain, 2, 2)[:, :, ::2],
        "fortran": lambda: np.asfortranarray(plain),
        "readonly": lambda: np.frombuffer(plain.tobytes(), np.float32).reshape(plain.shape),
        "misaligned": lambda: np.frombuffer(b"x" + plain.tobytes(), np.float32, offset=1).reshape(plain.shape),
        "negative": lambda: np.flip(np.flip(plain, (0, 2)).copy(), (0, 2)),
    }[make]()
    np.testing.assert_array_equal(x, plain)
    np.testing.assert_array_equal(normalised(cpu, x, statistics, None, None), plain - 1)
    y = np.zeros((3, 8, 6), np.float32).swapaxes(0, 1)[::2]
    normalised(cpu, x, statistics, None, None, y=y)
    np.testing.assert_array_equal(y, plain - 1)
    np.testing.assert_allclose(cpu.stats(x, None), reference.stats(plain, None), **SUM)


def test_temporaries_do_not_grow_with_the_input(monkeypatch):
    """No operation on the way makes an array larger than a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and func.overloadpacket.__name__[-1] != "_":
                sizes.append((out.numel(), str(func)))
            return out

    monkeypatch.setattr(aten, "_TILE_CPU", 1 << 10)
    x = torch.randn(4, 16, 4096)
    vector, statistics, out = torch.ones(16), torch.ones(33, dtype=torch.float64), torch.empty_like(x)
    for call in (
        lambda: aten.stats(x, None),
        lambda: normalised(aten, x, statistics, vector, vector, y=out),
        lambda: normalised(aten, x, statistics, vector, vector, Epilogue("silu"), x, out),
        lambda: aten.backward_reduce(x, x, statistics, vector, vector),
        lambda: aten.backward_reduce(x, x, statistics, vector, vector, vector, vector, Epilogue("silu"), x, out),
        lambda: aten.backward_elemt(x, x, statistics, vector, vector, torch.ones(32), out),
        lambda: aten.backward_elemt(
            x, x, statistics, vector, vector, torch.ones(32), out, Epilogue("leaky_relu", 0.1, True)
        ),
    ):
        sizes = []
        with Largest():
            call()
        assert [name for numel, name in sizes if numel > 1 << 10] == []
        assert len(sizes) > 10


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue("relu")], ids=lambda epilogue: epilogue.activation)
@pytest.mark.parametrize("shape", [(3, 25, 1001), (70, 1031, 1), (2, 3, 30011), (30011, 3, 1), (1, 1, 70001)], ids=str)
def test_threads_share_the_work_and_change_no_result(shape, epilogue, dtype, threads):
    """By channels, by parts of rows of few channels, and by rows of all channels."""
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
    c = shape[1]
    statistics, sums = torch.rand(2 * c + 1, dtype=torch.float64), torch.rand(2 * c, dtype=torch.float64)
    statistics[-1] = x[:, 0].numel()
    weight, bias = torch.rand(2, c)
    y = normalised(cpu, x, statistics, weight, bias, epilogue=epilogue)
    dx = filled(cpu.backward_elemt, dy, x, statistics, weight, bias, sums, epilogue=epilogue)
    found = cpu.stats(x, None), cpu.backward_reduce(dy, x, statistics, weight, bias, epilogue=epilogue)
    torch.set_num_threads(1)
    assert torch.equal(y, normalised(cpu, x, statistics, weight, bias, epilogue=epilogue))
    assert torch.equal(dx, filled(cpu.backward_elemt, dy, x, statistics, weight, bias, sums, epilogue=epilogue))
    alone = cpu.stats(x, None), cpu.backward_reduce(dy, x, statistics, weight, bias, epilogue=epilogue)
    for several, one in zip(found, alone, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-14, atol=1e-12)  # 70,000 terms of order 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_kernels_work_in_as_many_threads_as_torch():
    """A process of its own, in which nothing has made the threads before; of a small array none are made."""
    count = (
        "import os, numpy as np, torch; from syncbn.kernels import cpu; torch.set_num_threads(3);"
        "threads = lambda: len(os.listdir('/proc/self/task')); before = threads();"
        "cpu.stats(np.ones((4, 8, 100)), None); print(threads() - before);"
        "cpu.stats(np.ones((40, 8, 1000)), None); print(threads() - before)"
    )
    result = subprocess.run([sys.executable, "-I", "-c", count], capture_output=True, text=True, timeout=100)
    assert result.stdout.split() == ["0", "2"], result.stderr
