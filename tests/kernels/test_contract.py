"""The contract of the kernels: every implementation against the reference, on every kind of shape."""

import importlib.util
import inspect

import numpy as np
import pytest
import torch
from support.implementations import combined, filled, normalised
from support.steps import rounded
from support.tolerances import ELEMENT, SUM

from syncbn.kernels import Running, aten, cpu, gpu, reference

SHAPES = [(5, 3, 7), (1, 1, 1), (4, 1, 9), (9, 6, 1), (1, 300, 2), (0, 4, 3), (3, 4, 0), (2, 2, 49)]
SHAPES += [(9, 2, 601), (5, 48, 1)]  # of which results may go past the caches
SHAPES += [(150, 3, 1), (70, 12, 1)]  # narrow rows, which are taken together, with some left over
NAMES = ["stats", "normalise", "backward_reduce", "backward_elemt"]


@pytest.fixture(params=SHAPES, ids=str)
def arrays(request):
    """x, dy, weight and bias of float32 for one shape, and statistics."""
    rng = np.random.default_rng(0)
    n, c, s = request.param
    x, dy = rng.standard_normal((2, n, c, s)).astype(np.float32)
    weight, bias = rng.uniform(0.5, 1.5, (2, c)).astype(np.float32)
    return [x, dy, np.append(rng.uniform(0.5, 1.5, 2 * c), 12.0), weight, bias]


def test_the_compiled_kernels_are_there():
    """Where a compiler was missing the package works without them, but then these tests have not tested them."""
    assert cpu.instruction_set() in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_has_the_contracts_signature(name):
    modules = [reference, aten, cpu, *([gpu] if importlib.util.find_spec("triton") else [])]
    parameters = [list(inspect.signature(getattr(kernels, name)).parameters) for kernels in modules]
    assert all(found == parameters[0] for found in parameters)


def test_no_implementation_has_public_functions_beside_the_contract():
    for kernels in (reference, aten, cpu):
        public = {n for n, v in vars(kernels).items() if inspect.isfunction(v) and not n.startswith("_")}
        own = {n for n in public if vars(kernels)[n].__module__ == kernels.__name__}
        assert own - {"serves", "absence", "description", "instruction_set", "prefer_huge_pages"} == set(NAMES)


@pytest.mark.parametrize("centred", [False, True])
def test_stats(implementation, arrays, centred):
    x, _, statistics, *_ = arrays
    center = statistics[: x.shape[1]] if centred else None
    expected = reference.stats(x, center)
    found = implementation.stats(*implementation.arrays(x, center))
    assert found.dtype == implementation.dtype("float64")
    assert found[-1] == x.shape[0] * x.shape[2]
    np.testing.assert_allclose(found, expected, **SUM)


def test_stats_leave_a_float64_input_as_it_is(implementation):
    (x,) = implementation.arrays(np.random.default_rng(0).standard_normal((2, 3, 4)))
    before = x + 0
    implementation.stats(x, None), implementation.stats(x, *implementation.arrays(np.ones(3)))
    assert (x == before).all()


@pytest.mark.parametrize("buffers", ["float16", "float32", "float64", None])
@pytest.mark.parametrize("center", [None, np.array([0.25, -0.5])])
def test_statistics_and_running_statistics(implementation, buffers, center):
    moments = np.array([3.0, 4.0, 9.0, 16.0, 8.0])
    running = [None, None] if buffers is None else [np.array([1, 2], buffers), np.array([3, 4], buffers)]
    batches = None if buffers is None else np.array(6)
    found, center_, batches, *running = implementation.arrays(moments, center, batches, *running)
    assert combined(implementation, found, center_, Running(*running, batches, 0.25), 1e-3) == 8.0
    mean = (0.0 if center is None else center) + np.array([3, 4]) / 8
    var = np.array([9, 16]) / 8 - (np.array([3, 4]) / 8) ** 2
    np.testing.assert_allclose(found, [*mean, *(1 / np.sqrt(var + 1e-3)), 8.0], rtol=1e-15)
    if buffers is not None:
        assert [v.dtype for v in running] == [implementation.dtype(buffers)] * 2
        half = np.finfo(buffers).eps
        np.testing.assert_allclose(running[0], 0.75 * np.array([1, 2]) + 0.25 * mean, rtol=half)
        np.testing.assert_allclose(running[1], 0.75 * np.array([3, 4]) + 0.25 * var * 8 / 7, rtol=half)
        assert (batches, batches.dtype) == (7, implementation.dtype("int64"))


def test_running_buffers_have_any_strides_and_two_dtypes(implementation):
    moments, wide = implementation.arrays(np.array([3.0, 4.0, 9.0, 16.0, 8.0]), np.ones((2, 2), np.float32))
    running_mean, (running_var,) = wide[:, 0], implementation.arrays(np.ones(2, np.float16))
    combined(implementation, moments, running=Running(running_mean, running_var, None, 1.0))
    np.testing.assert_allclose(wide, [[3 / 8, 1], [4 / 8, 1]])
    np.testing.assert_allclose(running_var, (np.array([9, 16]) / 8 - np.array([9, 16]) / 64) * 8 / 7, rtol=2.0**-11)


@pytest.mark.parametrize("buffers", ["float32", "float16"])
@pytest.mark.parametrize("count", [1.0, 8.5, -2.0, 2.0**-20, float("nan"), float("inf"), 8.0])
def test_nothing_is_written_at_a_refused_count(implementation, count, buffers):
    """Neither moments nor running statistics nor y, bit by bit; with a count of 8, the negative control, all are."""
    x = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    arrays = [np.array([3.0, 4.0, 9.0, 16.0, count]), np.array([[5.0, 0], [6.0, 0]], buffers), np.array([6.0, 7.0])]
    x, moments, wide, running_var, batches, counter, y = written = implementation.arrays(
        x, *arrays, np.array(7), np.array(7.0), np.full_like(x, 3.0)
    )
    before = implementation.arrays(*map(np.asarray, written))
    for tracked in (batches, counter):
        arguments = moments, None, Running(wide[:, 0], running_var, tracked, 0.5), 1e-5, None, None, y
        found = implementation.normalise(x, *arguments)
        assert found == count or (found != found and count != count)
        if count == 8.0:
            moments[:] = before[1]
    same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(written, before, strict=True)]
    assert same == ([True, True, *[False] * 5] if count == 8.0 else [True] * 7)


def test_a_count_of_0_leaves_the_running_statistics_and_is_no_error(implementation):
    moments, *running = implementation.arrays(np.zeros(3), np.array([5.0]), np.array([6.0]), np.array(7))
    assert combined(implementation, moments, running=Running(*running, 0.5), eps=0.25) == 0.0
    assert [v.item() for v in running] == [5.0, 6.0, 7]
    assert [float(v) for v in moments] == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
def test_batches_are_counted_in_a_counter_of_any_dtype(implementation, dtype):
    """As averages of checkpoints leave one; nothing beside it is written."""
    moments, counters = implementation.arrays(np.array([3.0, 9.0, 8.0]), np.array([-1, 7], dtype))
    combined(implementation, moments, running=Running(None, None, counters[:1].reshape(()), 0.1))
    assert counters.tolist() == [0, 7]


def test_sums_of_infinities_are_infinite(implementation):
    x, dy = np.ones((2, 3, 40), np.float32), np.ones((2, 3, 40), np.float32)
    x[0, 1, 7], dy[1, 2, 8] = np.inf, -np.inf
    x, dy, statistics = implementation.arrays(x, dy, np.array([0.0] * 3 + [1.0] * 4))
    moments, sums = implementation.stats(x, None), implementation.backward_reduce(dy, x, statistics, None, None)
    assert [float(v) for v in moments[:3]] == [80, np.inf, 80]
    assert [float(v) for v in sums[:3]] == [80, 80, -np.inf]


def test_the_root_of_a_negative_variance_is_never_taken(implementation):
    (moments,) = implementation.arrays(np.array([3 * 0.1, 3 * 0.1 * 0.1 * (1 - 1e-15), 3.0]))
    combined(implementation, moments, eps=1e-12)
    assert moments[1] == pytest.approx(1e6, rel=1e-12)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
def test_normalise(implementation, arrays, affine):
    x, _, statistics, weight, bias = arrays
    weight, bias = weight if affine in ("both", "weight") else None, bias if affine in ("both", "bias") else None
    expected = normalised(reference, x, statistics, weight, bias)
    found = normalised(implementation, *implementation.arrays(x, statistics, weight, bias))
    np.testing.assert_allclose(found, expected, **ELEMENT)


def test_backward_reduce(implementation, arrays):
    x, dy, statistics, *_ = arrays
    found = implementation.backward_reduce(*implementation.arrays(dy, x, statistics), None, None)
    np.testing.assert_allclose(found, reference.backward_reduce(dy, x, statistics, None, None), **SUM)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_of_weight_and_bias(implementation, arrays, dtype):
    x, dy, statistics, *_ = arrays
    c = x.shape[1]
    wanted = implementation.arrays(*np.full((2, c), np.nan, dtype))
    sums = implementation.backward_reduce(*implementation.arrays(dy, x, statistics), None, None, *wanted)
    expected = np.asarray(sums)[c:] * statistics[c:-1], np.asarray(sums)[:c]
    for found, value in zip(wanted, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=np.finfo(dtype).eps, atol=np.finfo(dtype).smallest_subnormal)
    again = implementation.backward_reduce(*implementation.arrays(dy, x, statistics), None, None, None, wanted[1])
    np.testing.assert_array_equal(again, sums)


@pytest.mark.parametrize("affine", [True, False])
def test_backward_elemt(implementation, arrays, affine):
    x, dy, statistics, weight, _ = arrays
    sums = np.random.default_rng(1).standard_normal(2 * x.shape[1])
    for count in (12.0, 0.0):
        statistics[-1] = count
        arguments = dy, x, statistics, weight if affine else None, None, sums
        expected = filled(reference.backward_elemt, *arguments)
        found = filled(implementation.backward_elemt, *implementation.arrays(*arguments))
        np.testing.assert_allclose(found, expected, rtol=2.0**-20, atol=2.0**-20)


def test_the_rounding_of_the_mean_is_taken_out_of_the_gradient(implementation):
    rng = np.random.default_rng(0)
    x, dy = (
        (rng.standard_normal((50, 2, 3)) + 1e4).astype(np.float32),
        rng.standard_normal((50, 2, 3)).astype(np.float32),
    )
    mean, sums = x.astype(np.float64).mean((0, 2)), np.full(2 * 2, 1000.0)
    assert (abs(mean - mean.astype(np.float32)) > 1e-5).all()
    statistics = np.array([*mean, 1, 1, 150.0])
    arguments = dy, x, statistics, None, None, sums
    found = filled(implementation.backward_elemt, *implementation.arrays(*arguments))
    # The gradient has terms of 1000 / 150 = 7; without the correction it would be off by 7e-5 or more.
    np.testing.assert_allclose(found, filled(reference.backward_elemt, *arguments), rtol=0, atol=7 * 6 * 2.0**-22)
    expected_sums = [dy.sum((0, 2), np.float64), (dy * (x - mean[:, None])).sum((0, 2))]
    found_sums = implementation.backward_reduce(*implementation.arrays(dy, x, statistics), None, None)
    np.testing.assert_allclose(found_sums, np.concatenate(expected_sums), **SUM)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_results_have_the_inputs_dtype_and_one_rounding(implementation, arrays, dtype):
    if implementation.library == "numpy" and dtype == "bfloat16":
        return  # NumPy has no such dtype
    x, dy, statistics, weight, bias = arrays
    u = torch.finfo(getattr(torch, dtype)).eps / 2
    x, dy = rounded(x, dtype), rounded(dy, dtype)
    narrow = [torch.from_numpy(v).to(getattr(torch, dtype)) for v in (x, dy)]
    narrow_x, narrow_dy = narrow if implementation.library == "torch" else [v.numpy() for v in narrow]
    y = normalised(implementation, narrow_x, *implementation.arrays(statistics, weight, bias))
    sums = np.ones(2 * x.shape[1])
    arguments = implementation.arrays(statistics, weight, None, sums)
    dx = filled(implementation.backward_elemt, narrow_dy, narrow_x, *arguments)
    assert y.dtype == dx.dtype == narrow_x.dtype
    for found, expected in (
        (y, normalised(reference, x, statistics, weight, bias)),
        (dx, filled(reference.backward_elemt, dy, x, statistics, weight, None, sums)),
    ):
        found = found.double() if implementation.library == "torch" else found
        np.testing.assert_allclose(found, expected, rtol=u + 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 67), (67, 37, 1), (2, 3, 70000), (4, 1, 300), (20011, 6, 1), (11, 9, 1024), (703, 64, 1)], ids=str
)
@pytest.mark.parametrize("implementation", ["cpu-torch", "cpu-past_the_caches"], indirect=True)
def test_cpu_and_aten_give_the_same_bits(implementation, shape, dtype):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
    statistics = torch.rand(2 * shape[1] + 1, dtype=torch.float64)
    statistics[-1] = x[:, 0].numel()
    weight, bias = torch.rand(2, shape[1], dtype=torch.float64 if dtype == "float64" else torch.float32)
    sums = torch.rand(2 * shape[1], dtype=torch.float64) * x[:, 0].numel()
    assert torch.equal(*[normalised(kernels, x, statistics, weight, bias) for kernels in (aten, cpu)])
    arguments = dy, x, statistics, weight, bias, sums
    assert torch.equal(*[filled(kernels.backward_elemt, *arguments) for kernels in (aten, cpu)])
    for name, arguments in {"stats": (x, None), "backward_reduce": (dy, x, statistics, weight, bias)}.items():
        results = [getattr(kernels, name)(*arguments) for kernels in (aten, cpu)]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12 * x.numel())


@pytest.mark.parametrize("shape", [(3, 5, 67), (67, 37, 1)], ids=str)
def test_without_a_bias_zeros_keep_their_sign(shape):
    x, statistics = torch.ones(shape), torch.ones(2 * shape[1] + 1, dtype=torch.float64)
    y = normalised(cpu, x, statistics, -torch.ones(shape[1]), None)
    assert (y == 0).all()
    assert torch.equal(y.signbit(), normalised(aten, x, statistics, -torch.ones(shape[1]), None).signbit())
    assert y.signbit().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
def test_cpu_kernels_refuse_other_dtypes(dtype):
    x, statistics = torch.ones(2, 3, 4, dtype=dtype), torch.ones(7, dtype=torch.float64)
    for call in (
        lambda: cpu.stats(x, None),
        lambda: cpu.normalise(x, statistics, None, Running(), 0.1, None, None, x),
        lambda: cpu.backward_reduce(x, x, statistics, None, None),
        lambda: cpu.backward_elemt(x, x, statistics, None, None, torch.ones(6, dtype=torch.float64), x),
    ):
        with pytest.raises(ValueError, match="not in tuple"):
            call()


def test_the_default_device_is_not_that_of_the_sums():
    x = torch.randn(4, 3, 7)
    with torch.device("meta"):
        assert cpu.stats(x, None).is_cpu


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cpu_kernels_keep_nan_and_infinity(value, dtype):
    x = torch.ones(2, 3, 40).to(getattr(torch, dtype))
    x[0, 1, 7] = x[1, 1, 39] = value
    vector, statistics = torch.ones(3), torch.ones(7, dtype=torch.float64)
    y, expected = (normalised(kernels, x, statistics, vector, vector) for kernels in (cpu, aten))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.isfinite(y[0, 1, 7])
    assert torch.isfinite(y[:, ::2]).all()
    assert not torch.isfinite(cpu.stats(x, None)[1])
