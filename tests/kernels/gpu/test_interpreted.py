"""What the contract's tests do not show of the GPU kernels: accuracy, order, far offsets, whole layers.

By Triton's interpreter, on the CPU: see the marker.
"""

import mmap

import numpy as np
import pytest
import torch
from support.implementations import IMPLEMENTATIONS, combined, normalised
from support.ranks import run_ranks
from support.steps import assert_equals_whole_batch, batch, distances, torch_layer, torch_step
from torch import nn

from syncbn.kernels import Epilogue, Running, aten, selection
from syncbn.layout import layout_of

pytestmark = pytest.mark.interpreted


@pytest.fixture(params=["gpu", "gpu-error_free"])
def kernels(request, monkeypatch):
    return IMPLEMENTATIONS[request.param].set_up(monkeypatch, request)


def ulps(found, truth):
    """Of float32, of what float64 numbers become when rounded to it."""
    return (abs(found - truth) / np.spacing(abs(truth).astype(np.float32)).astype(np.float64)).max()


def mean_and_invstd(kernels, x):
    """In float64, from moments of the parts of a batch."""
    moments = sum(kernels.stats(part, None) for part in x)
    combined(kernels, moments, eps=1e-5)
    return np.split(moments[:-1].numpy(), 2)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4])
def test_statistics_are_good_to_an_ulp_and_do_not_depend_on_the_split(kernels, ratio, last):
    """The same bits of float32 to a mean of 100 standard deviations; beyond, an ulp."""
    n, c, s = 12, 20, 49
    x = (np.random.default_rng(1).standard_normal((n, s, c)) + ratio).astype(np.float32).swapaxes(1, 2)
    exact = x.astype(np.float64)
    mean = exact.mean((0, 2))
    mean += (exact - mean[:, None]).mean((0, 2))
    invstd = 1 / np.sqrt(((exact - mean[:, None]) ** 2).mean((0, 2)) + 1e-5)
    x = torch.from_numpy(x.swapaxes(1, 2).reshape(n * s, c, 1).copy() if last else x.copy())
    step = s if last else 1
    whole = mean_and_invstd(kernels, [x])
    assert ulps(whole[0], mean) <= 1
    assert ulps(whole[1], invstd) <= 1
    for cut in (1, 5, 11):
        split = mean_and_invstd(kernels, [x[: cut * step], x[cut * step :]])
        for a, b in zip(split, whole, strict=True):
            if ratio <= 100:
                np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))
            assert ulps(a, b) <= 1


def test_float32_sums_would_not_be_good_enough():
    """The negative control of the test above."""
    x = (np.random.default_rng(1).standard_normal(588) + 1e4).astype(np.float32)
    naive = np.float64((x * x).mean(dtype=np.float32)) - np.float64(x.mean(dtype=np.float32)) ** 2
    exact = x.astype(np.float64).var()
    assert ulps(np.array([1 / np.sqrt(abs(naive) + 1e-5)]), np.array([1 / np.sqrt(exact + 1e-5)])) > 100


@pytest.mark.parametrize("outlier", [3e3, 1e6])
def test_error_free_sums_survive_an_element_far_from_the_mean(outlier, monkeypatch, request):
    """The shift is the first element of a part, which may be anything."""
    kernels = IMPLEMENTATIONS["gpu-error_free"].set_up(monkeypatch, request)
    x = np.random.default_rng(2).standard_normal((200, 3, 40)).astype(np.float32)
    x[0, :, 0] = outlier
    exact = x.astype(np.float64)
    _, invstd = mean_and_invstd(kernels, [torch.from_numpy(x)])
    assert ulps(invstd, 1 / np.sqrt(exact.var((0, 2)) + 1e-5)) <= 1


@pytest.mark.parametrize("shape", [(300, 70, 1), (400, 3, 49)], ids=str)
def test_the_order_in_which_programs_come_changes_no_bit(kernels, shape, monkeypatch):
    from triton.runtime import interpreter

    from syncbn.kernels.gpu import calls

    device = calls._device(None)
    monkeypatch.setattr(calls, "_device", lambda _: device._replace(programs=40))
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape)
    weight, bias = torch.rand(2, shape[1])

    def run():
        moments = kernels.stats(x, None)
        statistics, y, running = moments.clone(), torch.empty_like(x), torch.ones(2, shape[1])
        kernels.normalise(x, statistics, None, Running(*running, None, 0.3), 0.1, weight, bias, y)
        sums = kernels.backward_reduce(dy, x, statistics, weight, bias)
        return moments, statistics, y, running, sums

    expected = run()
    blocks = calls._blocks(x, layout_of(x), "sum")
    assert blocks.grid[1] > 3  # or there would be no order to change
    index, size = interpreter.interpreter_builder.set_grid_idx, interpreter.interpreter_builder.set_grid_dim
    sizes = []
    monkeypatch.setattr(
        interpreter.interpreter_builder, "set_grid_dim", lambda *dims: (sizes.append(dims), size(*dims))[1]
    )
    for order in (lambda i, parts: parts - 1 - i, lambda i, parts: (i * 7 + 3) % parts if parts % 7 else parts - 1 - i):
        monkeypatch.setattr(
            interpreter.interpreter_builder,
            "set_grid_idx",
            lambda a, b, d, order=order: index(a, order(b, sizes[-1][1]), d),
        )
        for found, wanted in zip(run(), expected, strict=True):
            assert torch.equal(found, wanted)
    from syncbn.kernels.gpu import launch

    assert all(not scratch.counter.any() for scratch in launch._scratches.values())


@pytest.mark.parametrize("shape", [((1 << 25) + 100, 64, 1), (1, 2, (1 << 30) + 500)], ids=str)
def test_offsets_beyond_32_bits(kernels, shape, monkeypatch):
    """2^31 elements and more, whose pages are there where they are written; the last program alone is run."""
    from triton.runtime import interpreter

    from syncbn.kernels.gpu import calls

    n, c, s = shape
    x = torch.frombuffer(mmap.mmap(-1, n * c * s * 2), dtype=torch.float16).view(shape)
    x[(slice(-70, None),) if s == 1 else (0, 1, slice(-70, None))] = 2.0
    blocks = calls._blocks(x, layout_of(x), "sum")
    *geometry, tiles, in_row, _, _ = blocks.geometry
    parts = -(-tiles // 50)
    builder = interpreter.interpreter_builder
    index = builder.set_grid_idx
    size, grid = builder.set_grid_dim, blocks.grid[0]
    monkeypatch.setattr(builder, "set_grid_dim", lambda a, b, d: size(grid, parts, d))
    monkeypatch.setattr(builder, "set_grid_idx", lambda a, b, d: index(grid - 1, parts - 1, d))
    partial, counter = torch.zeros(parts, 2, c, dtype=torch.float64), torch.zeros(c, dtype=torch.int32)
    constants = *blocks.shape, blocks.added, kernels.error_free
    arrays = x, None, None, torch.zeros(2 * c + 1, dtype=torch.float64), partial.view(-1), counter
    calls._STATS.launch(
        x.device, blocks._replace(grid=(1, 1)), arrays, (*geometry, tiles, in_row, 50, parts), constants
    )
    channels = range(c) if s == 1 else [1]
    assert [partial[-1, :, i].tolist() for i in channels] == [[140.0, 280.0] for _ in channels]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_elementwise_results_have_aten_s_bits(kernels, dtype, activation):
    torch.manual_seed(0)
    x, dy, residual = (torch.randn(6, 5, 21).to(getattr(torch, dtype)) for _ in range(3))
    statistics = torch.rand(11, dtype=torch.float64) + 0.5
    weight, bias, sums = torch.randn(5), torch.randn(5), torch.randn(10, dtype=torch.float64)
    epilogue = Epilogue(activation, 0.25 if activation == "leaky_relu" else 0.0)
    for r in (None, residual):
        y, expected = (normalised(k, x, statistics, weight, bias, epilogue, r) for k in (kernels, aten))
        assert torch.equal(y, expected)
    dx, expected = torch.empty_like(x), torch.empty_like(x)
    for k, out in ((kernels, dx), (aten, expected)):
        k.backward_elemt(dy, x, statistics, weight, bias, sums, out, epilogue)
    assert torch.equal(dx, expected)


def test_the_interpreters_own_rounding_to_bfloat16_would_differ():
    """The control: were it right, arithmetic.narrow would not be needed."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast(a, out):
        i = tl.arange(0, 64)
        tl.store(out + i, tl.load(a + i).to(tl.bfloat16))

    a, out = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    cast[(1,)](a, out)
    assert not torch.equal(out, a.bfloat16())


def test_momentum_may_be_a_tensor(kernels):
    """As a layer's with momentum=None is on an accelerator."""
    moments = torch.tensor([3.0, 4.0, 9.0, 16.0, 8.0], dtype=torch.float64)
    found, expected = torch.ones(2, 2), torch.ones(2, 2)
    combined(kernels, moments.clone(), running=Running(*found, None, torch.tensor(0.25, dtype=torch.float64)))
    combined(aten, moments.clone(), running=Running(*expected, None, 0.25))
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.ones(2, 2))


def take_gpu_kernels(monkeypatch):
    """As SYNCBN_KERNELS=gpu does when it is set before the import."""
    monkeypatch.setattr(selection, "_FORCED", "gpu")
    monkeypatch.setattr("syncbn.nn.fused._fused", None)


SPLITS = [[(2, 3, 3, 5), (1, 3, 4, 4)], [(2, 8, 3), (0, 8, 3), (3, 8, 1)], [(5, 4)]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shapes", SPLITS, ids=str)
def test_layers_equal_the_whole_batch(kernels, shapes, dtype, monkeypatch):
    take_gpu_kernels(monkeypatch)
    xs, dys = batch(1, shapes, dtype, mean=2.0)
    results = run_ranks(torch_step, len(xs), "thread", xs, dys, dtype)
    assert_equals_whole_batch(results, xs, dys, dtype)


def _unsynchronised_step(rank, group, xs, dys):
    return torch_step(rank, group, xs, dys, layer=torch_layer(xs[0].shape[1], "float32", nn.BatchNorm2d))


def test_unsynchronised_layers_differ():
    """The control of the test above."""
    xs, dys = batch(1, SPLITS[0])
    worst = distances(run_ranks(_unsynchronised_step, 2, "thread", xs, dys), xs, dys)
    assert all(worst[name] > 1000 for name in ("y", "dx", "grad_weight", "running_mean", "running_var")), worst


@pytest.mark.parametrize(
    "formats", [(a, b) for a in ("contiguous", "channels_last") for b in ("strided", "channels_last")]
)
def test_gradients_come_in_any_memory_format(kernels, formats, monkeypatch):
    take_gpu_kernels(monkeypatch)
    xs, dys = batch(4, [(3, 7, 9, 5), (2, 7, 9, 5)])
    assert_equals_whole_batch(run_ranks(torch_step, 2, "thread", xs, dys, "float32", None, formats), xs, dys)
