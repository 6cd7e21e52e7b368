"""The kernels' masks: every implementation against the reference, without a mask, on the valid positions alone.

Positions that are not valid hold NaN and infinity in all that is read, and NaN in all that is written.
"""

import numpy as np
import pytest
import torch
from support.implementations import filled, nan_like, normalised
from support.tolerances import ELEMENT, SUM
from test_epilogue import EPILOGUES, IN_PLACE, case

from syncbn.kernels import PLAIN, Running, reference

SHAPES = [(5, 3, 7), (9, 6, 1), (4, 1, 9), (9, 2, 601), (70, 12, 1), (5, 48, 1), (0, 4, 3), (2, 3, 0)]
# Shapes, each with a kind of mask.
CASES = [(shape, "random") for shape in SHAPES]
CASES += [(shape, kind) for shape in SHAPES[:2] for kind in ("padding", "all", "none")]


@pytest.fixture(autouse=True)
def _of_few_tiles(implementation, request):
    if implementation.tile < 100 and any(size in request.node.name for size in ("601", "67")):
        pytest.skip("a thousand tiles take seconds; smaller batches have many, too")


def mask_of(kind, shape):
    n, _, s = shape
    rng = np.random.default_rng(1)
    if kind == "random":
        return rng.random((n, 1, s)) < 0.6
    if kind == "padding":  # as of sequences, one of which has no valid position
        return np.arange(s) < rng.integers(0, s + 1, (n, 1, 1)) * (np.arange(n)[:, None, None] > 0)
    return np.full((n, 1, s), kind == "all")


def spoilt(v, mask):
    """A copy of v with NaN, infinities and the largest number where the mask says that nothing is valid."""
    bad = np.resize(np.array([np.nan, np.inf, -np.inf, np.finfo(v.dtype).max], v.dtype), v.shape)
    return np.where(mask, v, bad)


def gathered(v, mask):
    """The valid positions of v, (n, c, s), as (1, c, valid)."""
    return np.ascontiguousarray(v.swapaxes(0, 1)[:, mask[:, 0]])[None]


def select(v, mask):
    return np.where(mask, v, v.dtype.type(0))


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_stats(implementation, shape, kind, centred):
    x, _, _, statistics, *_ = case(shape)
    mask, center = mask_of(kind, shape), statistics[: x.shape[1]] if centred else None
    found = implementation.stats(*implementation.arrays(spoilt(x, mask), center, mask))
    assert found.dtype == implementation.dtype("float64")
    assert found[-1] == mask.sum()
    np.testing.assert_allclose(found, reference.stats(gathered(x, mask), center), **SUM)


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda t: t.activation)
def test_normalise(implementation, shape, epilogue, kind):
    x, _, residual, *vectors = case(shape)
    mask = mask_of(kind, shape)
    for r in (None, residual):
        expected = select(normalised(reference, x, *vectors, epilogue=epilogue, residual=r), mask)
        bad = spoilt(x, mask), None if r is None else spoilt(r, mask)
        found_x, found_r, found_mask, *found_vectors = implementation.arrays(*bad, mask, *vectors)
        found = normalised(
            implementation, found_x, *found_vectors, epilogue=epilogue, residual=found_r, mask=found_mask
        )
        np.testing.assert_allclose(found, expected, **ELEMENT)
        assert not np.asarray(found)[~mask.repeat(x.shape[1], 1)].any()


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda t: t.activation)
def test_backward(implementation, shape, epilogue, kind):
    x, dy, residual, *vectors = case(shape)
    mask, c = mask_of(kind, shape), x.shape[1]
    for r in (None, residual) if epilogue.activation != "none" else (None,):
        y = normalised(reference, x, *vectors, epilogue=epilogue, residual=r)
        gate = None if r is None else r if epilogue.activation == "silu" else y
        g = None if r is None else nan_like(x)
        gradients = np.full((2, c), np.nan, np.float32)
        valid_gates = () if r is None else (gathered(gate, mask), np.zeros_like(gathered(x, mask)))
        expected = reference.backward_reduce(
            gathered(dy, mask), gathered(x, mask), *vectors, None, None, epilogue, *valid_gates
        )
        bad = [None if v is None else spoilt(v, mask) for v in (dy, x, gate)]
        bad_dy, bad_x, bad_gate, found_g, found_mask, *found_vectors = implementation.arrays(*bad, g, mask, *vectors)
        of_weight, of_bias = implementation.arrays(*gradients)
        arguments = bad_dy, bad_x, *found_vectors
        sums = implementation.backward_reduce(
            *arguments, of_weight, of_bias, epilogue, bad_gate, found_g, mask=found_mask
        )
        tolerance = {"rtol": 1e-6, "atol": 500 * 2.0**-23} if epilogue.activation == "silu" else SUM
        np.testing.assert_allclose(sums, expected, **tolerance)
        invstd = vectors[0][c:-1]
        np.testing.assert_allclose(of_weight, np.asarray(sums)[c:] * invstd, rtol=2.0**-23, atol=2.0**-140)
        np.testing.assert_allclose(of_bias, np.asarray(sums)[:c], rtol=2.0**-23, atol=2.0**-140)
        if r is not None:
            reference.backward_reduce(dy, x, *vectors, None, None, epilogue, gate, g)
            np.testing.assert_allclose(found_g, select(g, mask), **ELEMENT)
            continue
        dx = filled(reference.backward_elemt, dy, x, *vectors, expected, epilogue=epilogue)
        (expected,) = implementation.arrays(expected)
        found = filled(implementation.backward_elemt, *arguments, expected, epilogue=epilogue, mask=found_mask)
        np.testing.assert_allclose(found, select(dx, mask), rtol=2.0**-20, atol=2.0**-20)
        assert not np.asarray(found)[~mask.repeat(c, 1)].any()


@pytest.mark.parametrize("shape", [(5, 3, 7), (9, 6, 1), (9, 2, 601)], ids=str)
@pytest.mark.parametrize("epilogue", IN_PLACE, ids=lambda t: t.activation)
def test_in_place(implementation, shape, epilogue):
    x, dy, _, *vectors = case(shape)
    mask, ordinary = mask_of("random", shape), epilogue._replace(in_place=False)
    y = normalised(reference, x, *vectors, epilogue=ordinary)
    found, bad_dy, found_mask, *found_vectors = implementation.arrays(spoilt(x, mask), spoilt(dy, mask), mask, *vectors)
    normalised(implementation, found, *found_vectors, epilogue, y=found, mask=found_mask)
    np.testing.assert_allclose(found, select(y, mask), **ELEMENT)
    sums = implementation.backward_reduce(bad_dy, found, *found_vectors, epilogue=epilogue, mask=found_mask)
    # What is recovered of x depends on y's roundings, so that the oracle gets that y, too.
    valid_y, valid_dy = gathered(np.asarray(found), mask), gathered(dy, mask)
    expected = reference.backward_reduce(valid_dy, valid_y, *vectors, epilogue=epilogue)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=500 * 2.0**-22)
    dx = gathered(filled(reference.backward_elemt, dy, np.asarray(found), *vectors, expected, epilogue=epilogue), mask)
    (of_all,) = implementation.arrays(expected)
    found_dx = filled(
        implementation.backward_elemt, bad_dy, found, *found_vectors, of_all, epilogue=epilogue, mask=found_mask
    )
    np.testing.assert_allclose(gathered(np.asarray(found_dx), mask), dx, rtol=1e-5, atol=1e-5)
    assert not np.asarray(found_dx)[~mask.repeat(x.shape[1], 1)].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 67), (67, 37, 1), (20, 2, 1), (70, 24, 1)], ids=str)
def test_valid_positions_are_what_they_are_without_a_mask(implementation, dtype, shape):
    """Bit by bit, in every dtype; so that a mask of all positions changes nothing."""
    if implementation.library == "numpy" and dtype == "bfloat16":
        return  # NumPy has no such dtype
    x, dy, _, statistics, weight, bias = case(shape)
    wide = np.float64 if dtype == "float64" else np.float32
    vectors = implementation.arrays(statistics, weight.astype(wide), bias.astype(wide))
    mask = mask_of("random", shape)
    sums, found_mask, x, dy = implementation.arrays(
        np.ones(2 * x.shape[1]), mask, *(np.where(mask, v, np.nan).astype(np.float32) for v in (x, dy))
    )
    if implementation.library == "torch":
        x, dy = x.to(getattr(torch, dtype)), dy.to(getattr(torch, dtype))
    else:
        x, dy = x.astype(dtype), dy.astype(dtype)
    for epilogue in (PLAIN, EPILOGUES[1], EPILOGUES[3]):
        y = [normalised(implementation, x, *vectors, epilogue, mask=m) for m in (None, found_mask)]
        arguments = dy, x, *vectors, sums
        dx = [filled(implementation.backward_elemt, *arguments, epilogue=epilogue, mask=m) for m in (None, found_mask)]
        for unmasked, masked in (y, dx):
            assert masked.dtype == x.dtype
            if implementation.library == "torch":
                unmasked, masked = unmasked.double(), masked.double()
            np.testing.assert_array_equal(masked, select(np.asarray(unmasked), mask))


@pytest.mark.parametrize("channels", [2, 3, 5, 7, 8, 12, 16, 24, 48, 64, 96, 128])
@pytest.mark.parametrize("left", [0, 1, 13])
def test_short_rows_that_are_taken_together(implementation, channels, left):
    """Kernels in C++ take up to 32 rows as one, which have several bytes of the mask; and some are left over."""
    if implementation.tile < 100:
        pytest.skip("a thousand tiles take seconds; smaller batches have many, too")
    x, dy, _, *vectors = case(shape := (160 + left, channels, 1))
    mask = mask_of("random", shape)
    sums = np.arange(2.0 * channels)
    bad_x, bad_dy, mask_, sums_, *vectors_ = implementation.arrays(
        spoilt(x, mask), spoilt(dy, mask), mask, sums, *vectors
    )
    found = implementation.stats(bad_x, None, mask_)
    np.testing.assert_allclose(found, reference.stats(gathered(x, mask), None), **SUM)
    found = implementation.backward_reduce(bad_dy, bad_x, *vectors_, mask=mask_)
    expected = reference.backward_reduce(gathered(dy, mask), gathered(x, mask), *vectors)
    np.testing.assert_allclose(found, expected, **SUM)
    good_x, good_dy = implementation.arrays(x, dy)
    masked = normalised(implementation, bad_x, *vectors_, mask=mask_)
    np.testing.assert_array_equal(masked, select(np.asarray(normalised(implementation, good_x, *vectors_)), mask))
    masked = filled(implementation.backward_elemt, bad_dy, bad_x, *vectors_, sums_, mask=mask_)
    plain = filled(implementation.backward_elemt, good_dy, good_x, *vectors_, sums_)
    np.testing.assert_array_equal(masked, select(np.asarray(plain), mask))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(5, 3, 7), (9, 6, 1), (9, 2, 601)], ids=str)
def test_nan_at_a_valid_position_is_not_hidden(implementation, shape, value):
    x, dy, _, *vectors = case(shape)
    mask = mask_of("random", shape)
    i = np.argwhere(mask[:, 0])[3]
    x[i[0], 1, i[1]] = value
    bad_x, bad_dy, mask_, *vectors_ = implementation.arrays(spoilt(x, mask), spoilt(dy, mask), mask, *vectors)
    moments = implementation.stats(bad_x, None, mask_)
    sums = implementation.backward_reduce(bad_dy, bad_x, *vectors_, mask=mask_)
    c = x.shape[1]
    for of, first in ((moments, 1), (moments, c + 1), (sums, c + 1)):
        finite = np.isfinite(np.asarray(of))
        assert not finite[first]
    assert np.isfinite(np.asarray(moments))[[0, *range(2, c), c]].all()
    y = np.asarray(normalised(implementation, bad_x, *vectors_, mask=mask_))
    assert not np.isfinite(y[i[0], 1, i[1]])
    assert np.isfinite(y).sum() == y.size - 1


@pytest.mark.parametrize("strides", ["rows", "samples", "transposed", "one", "gaps"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_masks_and_batches_of_any_strides(implementation, strides, channels_last):
    """As broadcasting makes masks, beside batches of both memory formats."""
    n, c, h, w = 3, 4, 5, 6
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, n, c, h, w)).astype(np.float32)
    small = {"rows": (n, 1, 1, w), "samples": (1, 1, h, w), "one": (1, 1, 1, 1)}.get(strides, (n, 1, h, w))
    mask = rng.random(small) < (1.1 if strides == "one" else 0.5)
    if strides == "transposed":
        mask = np.ascontiguousarray(mask.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    full = np.broadcast_to(mask, (n, 1, h, w)).copy()
    statistics = np.append(rng.uniform(0.5, 1.5, 2 * c), full.sum())
    sums = rng.standard_normal(2 * c)
    flat = [v.reshape(n, c, h * w) for v in (x, dy)]
    flat_mask = full.reshape(n, 1, h * w)
    x, dy = spoilt(x, full), spoilt(dy, full)
    if channels_last:
        x, dy = (np.ascontiguousarray(np.moveaxis(v, 1, -1)) for v in (x, dy))
    x, dy, statistics_, sums_ = implementation.arrays(x, dy, statistics, sums)
    if channels_last:
        x, dy = (v.movedim(-1, 1) if implementation.library == "torch" else np.moveaxis(v, -1, 1) for v in (x, dy))
    if implementation.library == "torch":
        mask = torch.from_numpy(mask.copy() if strides != "transposed" else mask).expand(n, 1, h, w)
        if strides == "gaps":
            mask = torch.stack([mask, ~mask], -1)[..., 0]
    else:
        mask = np.broadcast_to(np.stack([mask, ~mask], -1)[..., 0] if strides == "gaps" else mask, (n, 1, h, w))
    found = implementation.stats(x, None, mask)
    np.testing.assert_allclose(found, reference.stats(gathered(flat[0], flat_mask), None), **SUM)
    y = np.asarray(normalised(implementation, x, statistics_, None, None, mask=mask)).reshape(n, c, -1)
    np.testing.assert_allclose(y, select(normalised(reference, flat[0], statistics, None, None), flat_mask), **ELEMENT)
    found = implementation.backward_reduce(dy, x, statistics_, None, None, mask=mask)
    valid = [gathered(v, flat_mask) for v in reversed(flat)]
    np.testing.assert_allclose(found, reference.backward_reduce(*valid, statistics, None, None), **SUM)
    dx = filled(implementation.backward_elemt, dy, x, statistics_, None, None, sums_, mask=mask)
    expected = filled(reference.backward_elemt, *reversed(flat), statistics, None, None, sums)
    np.testing.assert_allclose(
        np.asarray(dx).reshape(n, c, -1), select(expected, flat_mask), rtol=2.0**-20, atol=2.0**-20
    )


def test_a_batch_without_a_valid_position_is_an_empty_one(implementation):
    """Its messages are zeros, NaN in the statistics of the others or not; running statistics stay."""
    x = np.full((2, 3, 5), np.nan, np.float32)
    x, mask, running, statistics = implementation.arrays(
        x, np.zeros((2, 1, 5), bool), np.ones((2, 3)), np.append(np.full(6, np.nan), 4.0)
    )
    moments = implementation.stats(x, None, mask)
    assert moments.tolist() == [0.0] * 7
    assert implementation.backward_reduce(x, x, statistics, None, None, mask=mask).tolist() == [0.0] * 6
    arguments = moments, None, Running(*running, None, 0.5), 0.25, None, None
    y = nan_like(x)
    assert implementation.normalise(x, *arguments, y, mask=mask) == 0.0
    assert (y == 0).all()
    assert running.tolist() == [[1.0] * 3] * 2
    dx = filled(implementation.backward_elemt, x, x, moments, None, None, statistics[:6], mask=mask)
    assert (dx == 0).all()


def test_at_a_count_of_one_value_the_mask_changes_nothing(implementation):
    """It is refused, and nothing is written."""
    x, mask = implementation.arrays(np.ones((1, 1, 3), np.float32), np.array([[[True, False, False]]]))
    moments = implementation.stats(x, None, mask)
    assert moments.tolist() == [1.0, 1.0, 1.0]
    y = nan_like(x)
    assert implementation.normalise(x, moments, None, Running(), 0.1, None, None, y, mask=mask) == 1.0
    assert np.isnan(np.asarray(y)).all()
