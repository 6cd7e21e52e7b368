"""The contract of the kernels: every implementation against the reference, on every kind of shape."""

import inspect

import numpy as np
import pytest
import torch
from steps import rounded

from syncbn.kernels import aten, reference, select

SHAPES = [(5, 3, 7), (1, 1, 1), (4, 1, 9), (9, 6, 1), (1, 300, 2), (0, 4, 3), (3, 4, 0), (2, 2, 49)]
NAMES = ["stats", "combine", "elemt", "backward_reduce", "backward_elemt"]
# Element-wise results in float32 from six operations; sums in float64 of at most 500 terms of order 1.
ELEMENT = {"rtol": 8 * 2.0**-24, "atol": 8 * 2.0**-24}
SUM = {"rtol": 1e-13, "atol": 1e-13}


@pytest.fixture(params=SHAPES, ids=str)
def arrays(request):
    """x, dy, mean, invstd, weight, bias of float32 for one shape, and their torch twins."""
    rng = np.random.default_rng(0)
    n, c, s = request.param
    x, dy = rng.standard_normal((2, n, c, s)).astype(np.float32)
    mean, invstd, weight, bias = rng.uniform(0.5, 1.5, (4, c)).astype(np.float32)
    return [x, dy, mean, invstd, weight, bias]


def tensors(*arrays):
    return [None if a is None else torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]


@pytest.fixture(autouse=True, params=[1 << 17, 5], ids=["one_tile", "many_tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(aten, "_TILE_CPU", request.param)


@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_has_the_contracts_signature(name):
    parameters = [list(inspect.signature(getattr(kernels, name)).parameters) for kernels in (reference, aten)]
    assert parameters[0] == parameters[1]


def test_no_implementation_has_public_functions_beside_the_contract():
    for kernels in (reference, aten):
        public = {n for n, v in vars(kernels).items() if inspect.isfunction(v) and not n.startswith("_")}
        assert {n for n in public if vars(kernels)[n].__module__ == kernels.__name__} == set(NAMES)


def test_select_goes_by_the_kind_of_array():
    assert select(np.ones(1)) is reference
    assert select(torch.ones(1)) is aten


@pytest.mark.parametrize("centred", [False, True])
def test_stats(arrays, centred):
    x, _, mean, *_ = arrays
    center = mean.astype(np.float64) if centred else None
    expected = reference.stats(x, center)
    found = aten.stats(*tensors(x, center))
    assert found.dtype == torch.float64
    assert found[-1] == x.shape[0] * x.shape[2]
    np.testing.assert_allclose(found, expected, **SUM)


def test_stats_leave_a_float64_input_as_it_is():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    before = x.clone()
    aten.stats(x, None), aten.stats(x, torch.ones(3, dtype=torch.float64))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("buffers", ["float16", "float32", "float64", None])
@pytest.mark.parametrize("center", [None, np.array([0.25, -0.5])])
def test_combine(dtype, buffers, center):
    moments = np.array([3.0, 4.0, 9.0, 16.0, 8.0])
    running = [None, None] if buffers is None else [np.array([1, 2], buffers), np.array([3, 4], buffers)]
    running_too = tensors(*[None if r is None else r.copy() for r in running])
    expected = reference.combine(moments, center, np.dtype(dtype), *running, 0.25, 1e-3)
    found = aten.combine(*tensors(moments, center), getattr(torch, dtype), *running_too, 0.25, 1e-3)
    accumulate = "float64" if dtype == "float64" else "float32"
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2.0**-23 if accumulate == "float32" else 1e-15)
    assert [str(v.dtype) for v in expected] == [accumulate, accumulate, "float64"]
    assert [str(v.dtype) for v in found] == [f"torch.{accumulate}", f"torch.{accumulate}", "torch.float64"]
    if buffers is not None:
        offset = 0.0 if center is None else center
        mean, var = offset + np.array([3, 4]) / 8, np.array([9, 16]) / 8 - (np.array([3, 4]) / 8) ** 2
        np.testing.assert_allclose(running[0], 0.75 * np.array([1, 2]) + 0.25 * mean, rtol=1e-3)
        np.testing.assert_allclose(running[1], 0.75 * np.array([3, 4]) + 0.25 * var * 8 / 7, rtol=1e-3)
        for a, b in zip(running_too, running, strict=True):
            assert str(a.dtype) == f"torch.{buffers}"
            np.testing.assert_allclose(a, b, rtol=2 * np.finfo(buffers).eps)


@pytest.mark.parametrize("count", [0.0, 1.0, float("nan")])
@pytest.mark.parametrize("kernels", [aten, reference])
def test_combine_leaves_running_statistics_of_no_variance_untouched(kernels, count):
    arrays = [np.array([2.0, 4.0, count]) if count else np.zeros(3), np.array([5.0]), np.array([6.0])]
    moments, running_mean, running_var = tensors(*arrays) if kernels is aten else arrays
    dtype = torch.float32 if kernels is aten else np.dtype("f4")
    mean, invstd, _ = kernels.combine(moments, None, dtype, running_mean, running_var, 0.5, 1e-5)
    assert (running_mean.item(), running_var.item()) == (5.0, 6.0)
    if count == count:
        assert np.isfinite([mean.item(), invstd.item()]).all()


@pytest.mark.parametrize("kernels", [aten, reference])
def test_combine_never_takes_the_root_of_a_negative_variance(kernels):
    moments = np.array([3 * 0.1, 3 * 0.1 * 0.1 * (1 - 1e-15), 3.0])
    moments, dtype = (torch.from_numpy(moments), torch.float32) if kernels is aten else (moments, np.dtype("f4"))
    assert kernels.combine(moments, None, dtype, None, None, 0.1, 1e-12)[1].item() == np.float32(1e6)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
def test_elemt(arrays, affine):
    x, _, mean, invstd, weight, bias = arrays
    weight, bias = weight if affine in ("both", "weight") else None, bias if affine in ("both", "bias") else None
    expected = reference.elemt(x, mean, invstd, weight, bias)
    np.testing.assert_allclose(aten.elemt(*tensors(x, mean, invstd, weight, bias)), expected, **ELEMENT)


def test_backward_reduce(arrays):
    x, dy, mean, *_ = arrays
    np.testing.assert_allclose(
        aten.backward_reduce(*tensors(dy, x, mean)), reference.backward_reduce(dy, x, mean), **SUM
    )


@pytest.mark.parametrize("affine", [True, False])
def test_backward_elemt(arrays, affine):
    x, dy, mean, invstd, weight, _ = arrays
    sums = np.random.default_rng(1).standard_normal(2 * x.shape[1])
    for count in (np.array(12.0), np.array(0.0)):
        arguments = dy, x, mean, invstd, count, weight if affine else None, sums
        expected = reference.backward_elemt(*arguments)
        np.testing.assert_allclose(aten.backward_elemt(*tensors(*arguments)), expected, rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_results_have_the_inputs_dtype_and_one_rounding(arrays, dtype):
    x, dy, mean, invstd, weight, bias = arrays
    u = torch.finfo(getattr(torch, dtype)).eps / 2
    x, dy = rounded(x, dtype), rounded(dy, dtype)
    narrow_x, narrow_dy = (torch.from_numpy(v).to(getattr(torch, dtype)) for v in (x, dy))
    y = aten.elemt(narrow_x, *tensors(mean, invstd, weight, bias))
    sums, count = np.ones(2 * x.shape[1]), np.array(7.0)
    dx = aten.backward_elemt(narrow_dy, narrow_x, *tensors(mean, invstd, count, weight, sums))
    assert y.dtype == dx.dtype == narrow_x.dtype
    for found, expected in (
        (y, reference.elemt(x, mean, invstd, weight, bias)),
        (dx, reference.backward_elemt(dy, x, mean, invstd, count, weight, sums)),
    ):
        np.testing.assert_allclose(found.double(), expected, rtol=u + 1e-6, atol=1e-6)


def test_temporaries_do_not_grow_with_the_input():
    """Peak memory while an output of 16 MB is computed: the output itself and a few tiles."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and func.overloadpacket.__name__[-1] != "_":
                sizes.append((out.numel(), str(func)))
            return out

    aten._TILE_CPU = 1 << 10
    x = torch.randn(4, 16, 4096)
    vector = torch.ones(16)
    for call in (
        lambda: aten.stats(x, None),
        lambda: aten.elemt(x, vector, vector, vector, vector),
        lambda: aten.backward_reduce(x, x, vector),
        lambda: aten.backward_elemt(x, x, vector, vector, torch.tensor(9.0), vector, torch.ones(32)),
    ):
        sizes = []
        with Largest():
            call()
        large = [name for numel, name in sizes if numel > 1 << 10]
        assert all("empty_like" in name for name in large), large
        assert len(large) <= 1
        assert len(sizes) > 10
