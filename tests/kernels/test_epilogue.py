"""The kernels' epilogue: activation, residual and in-place work, every implementation against the reference."""

import itertools

import numpy as np
import pytest
import torch
from support.implementations import filled, normalised
from support.tolerances import ELEMENT, SUM
from test_contract import SHAPES

from syncbn.kernels import Epilogue, aten, cpu, reference
from syncbn.kernels.epilogue import weight_floor

EPILOGUES = [Epilogue(), Epilogue("relu"), Epilogue("leaky_relu", 0.25), Epilogue("silu")]
IN_PLACE = [Epilogue("none", 0.0, True), Epilogue("leaky_relu", 0.25, True)]


def case(shape, seed=0):
    """x, dy and residual, statistics, weight and bias, such that no z is so near 0 that rounding decides its sign."""
    n, c, s = shape
    rng = np.random.default_rng(seed)
    x, dy, residual = rng.standard_normal((3, n, c, s)).astype(np.float32)
    weight, bias = rng.uniform(0.5, 1.5, (2, c)).astype(np.float32)
    weight[::2] *= -1
    statistics = np.append(rng.uniform(0.5, 1.5, 2 * c), max(n * s, 1))
    for other in (0.0, residual):
        z = normalised(reference, x, statistics, weight, bias) + other
        assert (abs(z) > 1e-6).all()
    return x, dy, residual, statistics, weight, bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda t: t.activation)
@pytest.mark.parametrize("with_residual", [False, True])
def test_normalise(implementation, shape, epilogue, with_residual):
    x, _, residual, *vectors = case(shape)
    options = {"epilogue": epilogue, "residual": residual if with_residual else None}
    found_options = options | {"residual": implementation.arrays(options["residual"])[0]}
    expected = normalised(reference, x, *vectors, **options)
    found = normalised(implementation, *implementation.arrays(x, *vectors), **found_options)
    np.testing.assert_allclose(found, expected, **ELEMENT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES[1:], ids=lambda t: t.activation)
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward(implementation, shape, epilogue, with_residual):
    x, dy, residual, *vectors = case(shape)
    y = normalised(reference, x, *vectors, epilogue=epilogue, residual=residual if with_residual else None)
    gate = (residual if epilogue.activation == "silu" else y) if with_residual else None
    g, found_g = np.empty_like(x), implementation.arrays(np.full_like(x, np.nan))[0]
    gates = (gate, g) if with_residual else ()
    found_gates = (*implementation.arrays(gate), found_g) if with_residual else ()
    sums = reference.backward_reduce(dy, x, *vectors, None, None, epilogue, *gates)
    found = implementation.backward_reduce(*implementation.arrays(dy, x, *vectors), None, None, epilogue, *found_gates)
    # silu's derivative is of float32; the sums have up to 500 terms of order 1.
    tolerance = {"rtol": 1e-6, "atol": 500 * 2.0**-23} if epilogue.activation == "silu" else SUM
    np.testing.assert_allclose(found, sums, **tolerance)
    if with_residual:
        np.testing.assert_allclose(found_g, g, **ELEMENT)
        return
    expected = filled(reference.backward_elemt, dy, x, *vectors, sums, epilogue=epilogue)
    arrays = implementation.arrays(dy, x, *vectors, sums)
    np.testing.assert_allclose(
        filled(implementation.backward_elemt, *arrays, epilogue=epilogue), expected, rtol=2.0**-20, atol=2.0**-20
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", IN_PLACE, ids=lambda t: t.activation)
def test_in_place(implementation, shape, epilogue):
    x, dy, _, statistics, weight, bias = case(shape)
    vectors = statistics, weight, bias
    ordinary = epilogue._replace(in_place=False)
    sums = reference.backward_reduce(dy, x, *vectors, epilogue=ordinary)
    dx = filled(reference.backward_elemt, dy, x, *vectors, sums, epilogue=ordinary)
    z = normalised(reference, x, *vectors)
    (found,) = implementation.arrays(x)
    arrays = implementation.arrays(*vectors)
    normalised(implementation, found, *arrays, epilogue, y=found)
    np.testing.assert_allclose(found, normalised(reference, x, *vectors, epilogue=ordinary), **ELEMENT)
    (found_dy,) = implementation.arrays(dy)
    found_sums = implementation.backward_reduce(found_dy, found, *arrays, epilogue=epilogue)
    # z is known from y to a roundoff of its terms and one more of z itself.
    scale = abs(statistics[x.shape[1] : -1] * weight)[:, None]
    xmu_off = 6 * 2.0**-24 * (abs(z) + 2 * abs(bias[:, None])) / scale
    np.testing.assert_array_less(
        abs(np.asarray(found_sums) - sums)[x.shape[1] :], (abs(dy) * xmu_off).sum((0, 2)) + 1e-12
    )
    np.testing.assert_allclose(np.asarray(found_sums)[: x.shape[1]], sums[: x.shape[1]], **SUM)
    slope = abs(sums[x.shape[1] :] / statistics[-1] * statistics[x.shape[1] : -1] ** 2)[:, None]
    found_dx = filled(
        implementation.backward_elemt, found_dy, found, *arrays, *implementation.arrays(sums), epilogue=epilogue
    )
    off = scale * slope * xmu_off + 2.0**-20 * (1 + abs(dx))
    assert (abs(np.asarray(found_dx) - dx) <= off).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_smallest_weight_in_place(implementation, dtype):
    """Weights of 0 or near it count as that far from it, with their sign."""
    if implementation.library == "numpy" and dtype == "bfloat16":
        return  # NumPy has no such dtype
    (x,) = implementation.arrays(np.array([[[1.0, -2.0]] * 4]))
    x = x.to(getattr(torch, dtype)) if implementation.library == "torch" else x.astype(dtype)
    weight = np.array([0.0, 1e-9, -1e-9, 0.5], np.float64 if dtype == "float64" else np.float32)
    arguments = implementation.arrays(np.array([0.0] * 4 + [1.0] * 4 + [2.0]), weight, None)
    floor = weight_floor(x.dtype)
    assert floor == (2.0**-10 if dtype in ("bfloat16", "float16") else 2.0**-17)
    normalised(implementation, x, *arguments, IN_PLACE[0], y=x)
    assert x[0, :, 0].tolist() == [floor, floor, -floor, 0.5]
    sums = implementation.backward_reduce(x * 0 + 1, x, *arguments, epilogue=IN_PLACE[0])
    np.testing.assert_allclose(sums, [2.0] * 4 + [-1.0] * 4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 67), (67, 37, 1), (4, 1, 300)], ids=str)
def test_cpu_and_aten_give_the_same_bits(shape, dtype):
    torch.manual_seed(0)
    x, dy, residual = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(3))
    statistics = torch.rand(2 * shape[1] + 1, dtype=torch.float64)
    statistics[-1] = x[:, 0].numel()
    weight, bias = torch.rand(2, shape[1], dtype=torch.float64 if dtype == "float64" else torch.float32) - 0.5
    vectors = statistics, weight, bias
    sums = torch.rand(2 * shape[1], dtype=torch.float64) * x[:, 0].numel()
    for epilogue, r in itertools.product([*EPILOGUES[:3], *IN_PLACE], [None, residual]):
        y, expected = (normalised(k, x, *vectors, epilogue=epilogue, residual=r) for k in (cpu, aten))
        assert torch.equal(y, expected), epilogue
        if r is not None and not epilogue.in_place and epilogue.activation != "none":
            g, expected = torch.empty_like(x), torch.empty_like(x)
            for kernels, out in ((cpu, g), (aten, expected)):
                kernels.backward_reduce(dy, x, *vectors, None, None, epilogue, y, out)
            assert torch.equal(g, expected), epilogue
        seen = y if epilogue.in_place else x
        dx, expected = (filled(k.backward_elemt, dy, seen, *vectors, sums, epilogue=epilogue) for k in (cpu, aten))
        assert torch.equal(dx, expected), epilogue


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_silu_is_accurate_everywhere(dtype):
    """Within 4 roundoffs of the largest factor, and finite for every finite input."""
    z = torch.cat([torch.linspace(-120, 120, 40_001, dtype=torch.float64), torch.tensor([-1e30, 1e30, 0.0, -0.0])])
    x = z.to(getattr(torch, dtype)).reshape(1, 1, -1)
    statistics = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    u = torch.finfo(x.dtype).eps / 2
    y, dy = normalised(cpu, x, statistics, None, None, epilogue=Epilogue("silu")), torch.ones_like(x)
    exact = x.double()
    # 88 is where exp is clamped: beyond it silu is below 1e-35.
    torch.testing.assert_close(y.double(), torch.nn.functional.silu(exact), rtol=16 * u, atol=1e-6 * 2.0**-100)
    dx = filled(
        cpu.backward_elemt,
        dy,
        x,
        statistics,
        None,
        None,
        torch.zeros(2, dtype=torch.float64),
        epilogue=Epilogue("silu"),
    )
    p = exact.sigmoid()
    terms = p * (1 + abs(exact) * (1 - p))
    assert (abs(dx.double() - p * (1 + exact * (1 - p))) <= 32 * u * terms + 1e-36).all()


@pytest.mark.parametrize("epilogue", EPILOGUES[1:3], ids=lambda t: t.activation)
def test_infinity_and_nan_go_through_as_in_torch(epilogue):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, -1.0]).reshape(1, 1, 5)
    statistics = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    function = (
        torch.relu if epilogue.activation == "relu" else lambda v: torch.nn.functional.leaky_relu(v, epilogue.slope)
    )
    for kernels in (cpu, aten):
        y = normalised(kernels, x, statistics, None, None, epilogue=epilogue)
        torch.testing.assert_close(y, function(x), rtol=0, atol=0, equal_nan=True)
