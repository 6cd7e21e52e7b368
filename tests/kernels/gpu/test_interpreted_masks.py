"""What the contract's tests do not show of the GPU kernels with masks: accuracy, order, splits, far offsets, launches.

By Triton's interpreter, on the CPU: see the marker.
"""

import mmap

import numpy as np
import pytest
import torch
from support.implementations import IMPLEMENTATIONS, combined, filled, normalised
from support.masks import assert_masked_parity, torch_masked_step
from test_interpreted import take_gpu_kernels

from syncbn.kernels import Epilogue, Running
from syncbn.layout import layout_of

pytestmark = pytest.mark.interpreted


@pytest.fixture(params=["gpu", "gpu-error_free"])
def kernels(request, monkeypatch):
    return IMPLEMENTATIONS[request.param].set_up(monkeypatch, request)


def padded(n, c, s, last, ratio=0.0, pads=np.nan):
    """A batch of sequences, as (n * s, c, 1) with `last`, and its mask, which starts at an odd address.

    The first samples have no valid position, so that parts of the batch begin with tiles that have none.
    """
    rng = np.random.default_rng(1)
    valid = np.arange(s) < rng.integers(0, s + 1, (n, 1)) * (np.arange(n)[:, None] > 2)
    x = (rng.standard_normal((n, s, c)) + ratio).astype(np.float32)
    x[~valid] = pads
    x = torch.from_numpy(x) if last else torch.from_numpy(x.swapaxes(1, 2).copy())
    buffer = torch.zeros(n * s + 1, dtype=torch.bool)
    buffer[1:] = torch.from_numpy(valid.reshape(-1))
    return (x.view(n * s, c, 1), buffer[1:].view(n * s, 1, 1)) if last else (x, buffer[1:].view(n, 1, s))


def valid_of(x, mask):
    """(c, valid positions) in float64."""
    return x.movedim(1, -1)[mask.movedim(1, -1)[..., 0]].T.double().numpy()


def ulps(found, truth):
    """Of float32, of what float64 numbers become when rounded to it."""
    return (abs(found - truth) / np.spacing(abs(truth).astype(np.float32)).astype(np.float64)).max()


def mean_and_invstd(kernels, parts):
    """In float64, from moments of the parts of a batch, each with a mask or None."""
    moments = sum(kernels.stats(x, None, mask) for x, mask in parts)
    combined(kernels, moments, eps=1e-5)
    return np.split(moments[:-1].numpy(), 2)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("ratio", [1, 1e4])
def test_statistics_are_those_of_the_valid_positions_whatever_the_split(kernels, ratio, last):
    """To an ulp of float32, and to the same bits at a mean of one standard deviation; one rank without a mask."""
    n, s = 12, 49
    x, mask = padded(n, 20 if last else 2, s, last, ratio)
    exact = valid_of(x, mask)
    mean = exact.mean(1)
    mean += (exact - mean[:, None]).mean(1)
    invstd = 1 / np.sqrt(((exact - mean[:, None]) ** 2).mean(1) + 1e-5)
    whole = mean_and_invstd(kernels, [(x, mask)])
    assert ulps(whole[0], mean) <= 1
    assert ulps(whole[1], invstd) <= 1
    step = s if last else 1
    gathered = torch.from_numpy(valid_of(x[5 * step :], mask[5 * step :]).astype(np.float32))
    unmasked = (gathered.T[:, :, None].contiguous() if last else gathered[None]), None
    # The interpreter adds a tile's rows one by one, GPUs by pairs: at a mean of 1e4 hundreds of rows cost it more.
    for rest in ((x[5 * step :], mask[5 * step :]), *([unmasked] if ratio == 1 else [])):
        split = mean_and_invstd(kernels, [(x[: 5 * step], mask[: 5 * step]), rest])
        for found, expected, truth in zip(split, whole, (mean, invstd), strict=True):
            assert ulps(found, truth) <= 1
            if ratio == 1:
                np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("last", [True, False])
def test_without_the_mask_statistics_differ(kernels, last):
    """The negative control of the test above."""
    x, mask = padded(12, 2, 49, last, pads=3.0)
    masked, unmasked = (mean_and_invstd(kernels, [(x, m)]) for m in (mask, None))
    assert all(ulps(a, b) > 1000 for a, b in zip(masked, unmasked, strict=True))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_a_batch_with_zeros_for_pads(kernels, last, gated):
    """Bit by bit: elements whose gradient is 0 change no sum."""
    x, mask = padded(7, 5, 49, last)
    dy, gate = (torch.where(mask, torch.randn_like(x), torch.inf) for _ in range(2))
    statistics, weight, bias = torch.rand(11, dtype=torch.float64) + 0.5, torch.rand(5), torch.rand(5)
    zeros = [v.masked_fill(~mask, 0.0) for v in (dy, x, gate)]
    results = []
    for (d, v, z), m in ((zeros, None), ((dy, x, gate), mask)):
        vectors, g = torch.full((2, 5), torch.nan), torch.full_like(x, torch.nan) if gated else None
        epilogue = Epilogue("relu") if gated else Epilogue()
        arguments = d, v, statistics, weight, bias
        sums = kernels.backward_reduce(*arguments, *vectors, epilogue, z if gated else None, g, m)
        dx = filled(kernels.backward_elemt, *arguments, sums, mask=m)
        results.append((sums, vectors, dx.masked_fill(~mask, 0.0), g if gated else sums))
        assert m is None or (dx.masked_fill(mask, 0.0) == 0).all()
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("last", [True, False])
def test_the_order_in_which_programs_come_changes_no_bit(kernels, last, monkeypatch):
    """Of the count neither, which programs of one block hand on beside their sums."""
    from triton.runtime import interpreter

    from syncbn.kernels.gpu import calls

    device = calls._device(None)
    monkeypatch.setattr(calls, "_device", lambda _: device._replace(programs=12))
    x, mask = padded(150, 2, 49, last)

    def run():
        moments = kernels.stats(x, None, mask)
        y = torch.empty_like(x)
        kernels.normalise(x, moments.clone(), None, Running(), 0.1, None, None, y, mask=mask)
        return moments, y, kernels.backward_reduce(x, y, moments, None, None, mask=mask)

    expected = run()
    assert expected[0][-1] == mask.sum()
    parts = calls._blocks(x, layout_of(x), "sum", mask).grid[1]
    assert parts > 3  # or there would be no order to change
    builder = interpreter.interpreter_builder
    index, size, sizes = builder.set_grid_idx, builder.set_grid_dim, []
    monkeypatch.setattr(builder, "set_grid_dim", lambda *dims: (sizes.append(dims), size(*dims))[1])
    monkeypatch.setattr(builder, "set_grid_idx", lambda a, b, d: index(a, sizes[-1][1] - 1 - b, d))
    for found, wanted in zip(run(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [((1 << 25) + 100, 64, 1), (1, 2, (1 << 30) + 500)], ids=str)
def test_offsets_beyond_32_bits(kernels, shape, monkeypatch):
    """Of x; the last program alone is run, which finds its first valid element itself."""
    from triton.runtime import interpreter

    from syncbn.kernels.gpu import calls

    n, c, s = shape
    x = torch.frombuffer(mmap.mmap(-1, n * c * s * 2), dtype=torch.float16).view(shape)
    x[(slice(-70, None),) if s == 1 else (0, 1, slice(-70, None))] = 2.0
    mask = torch.frombuffer(mmap.mmap(-1, n * s), dtype=torch.bool)
    mask[-60:-10] = True
    blocks = calls._blocks(x, layout_of(x), "sum", mask)
    *geometry, tiles, in_row, _, _ = blocks.geometry
    parts = -(-tiles // 50)
    builder = interpreter.interpreter_builder
    index, size, grid = builder.set_grid_idx, builder.set_grid_dim, blocks.grid[0]
    monkeypatch.setattr(builder, "set_grid_dim", lambda a, b, d: size(grid, parts, d))
    monkeypatch.setattr(builder, "set_grid_idx", lambda a, b, d: index(grid - 1, parts - 1, d))
    partial, counter = torch.zeros(parts * (2 * c + 1), dtype=torch.float64), torch.zeros(c, dtype=torch.int32)
    arrays = x, mask, None, torch.zeros(2 * c + 1, dtype=torch.float64), partial, counter
    numbers, constants = (*geometry, tiles, in_row, 50, parts), (*blocks.shape, blocks.added, kernels.error_free)
    calls._STATS.launch(x.device, blocks._replace(grid=(1, 1)), arrays, numbers, constants)
    found = partial[: parts * 2 * c].view(parts, 2, c)[-1]
    channels = range(c) if s == 1 else [1]
    assert [found[:, i].tolist() for i in channels] == [[100.0, 200.0] for _ in channels]
    if s == 1:  # block 0 is the only one, and hands on the count
        assert partial[-1] == 50


def test_a_dense_mask_is_not_copied_and_any_other_is(kernels, monkeypatch):
    from syncbn.kernels.gpu import calls

    x, mask = padded(7, 5, 9, last=False)
    given, launch = [], calls.Kernel.launch

    def kept(kernel, device, blocks, arrays, *rest):
        given.append(arrays[3])
        launch(kernel, device, blocks, arrays, *rest)

    monkeypatch.setattr(calls.Kernel, "launch", kept)
    for m in (mask, mask[3:4].expand(mask.shape)):
        normalised(kernels, x, torch.ones(11, dtype=torch.float64), None, None, mask=m)
        assert given[-1].is_contiguous()
        assert torch.equal(given[-1], m)
    assert [v.data_ptr() == mask.data_ptr() for v in given] == [True, False]


@pytest.mark.parametrize(
    ("dtype", "format"), [("float32", "channels_last"), ("bfloat16", "contiguous"), ("float64", "contiguous")]
)
def test_layers_equal_the_gathered_valid_positions(kernels, dtype, format, monkeypatch):
    """On three ranks, of which one has no valid position, and one no mask; tests/test_masks.py has the control."""
    take_gpu_kernels(monkeypatch)
    assert_masked_parity("thread", [2, 3, 1], ["padding", "nothing", None], torch_masked_step, dtype, format)
