"""The numbers that the library promises, against a two-pass oracle in float64."""

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import oracle
from support.implementations import combined
from support.ranks import run_ranks
from support.steps import batch, in_format

from syncbn import core
from syncbn.comm import LocalCommunicator, as_communicator
from syncbn.kernels import aten, cpu, select

EVEN = {1: [24], 2: [12, 12], 3: [8, 8, 8], 7: [4] * 7}
UNEVEN = {1: [24], 2: [1, 23], 3: [2, 3, 19], 7: [1, 9, 2, 5, 3, 1, 4]}
EMPTY = {1: [24], 2: [0, 24], 3: [9, 0, 15], 7: [0, 9, 0, 5, 0, 1, 4]}


@pytest.fixture(params=["compiled", "plain"])
def kernels_in_use(request, monkeypatch):
    """The compiled kernels, or those that serve without them."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "_library", None)


def _forward(rank, group, parts, make):
    """Runs the algorithm on (n, c, s) parts and returns mean, invstd, y and the running statistics."""
    x = make(parts[rank])
    y = x * 0
    c = x.shape[1]
    running_mean, running_var = make(np.zeros(c)), make(np.ones(c))
    kernels = select(x)
    comm = as_communicator(group)
    running = core.Running(running_mean, running_var, None, 0.1)
    statistics = core.forward(x, y, None, None, running, 1e-5, kernels, comm)
    return [np.asarray(v) for v in (statistics[:c], statistics[c:-1], y, running_mean, running_var)]


def as_float32_tensor(v):
    return torch.from_numpy(np.asarray(v, np.float32))


def as_float64_tensor(v):
    return torch.from_numpy(np.asarray(v, np.float64))


def as_float32_ndarray(v):
    return np.asarray(v, np.float32)


def as_float64_ndarray(v):
    return np.asarray(v, np.float64)


def parts_of(seed, sizes, ratio, dtype, spread=1.0):
    """(n, 5, 33) parts of one batch with mean/std around ratio."""
    rng = np.random.default_rng(seed)
    whole = rng.standard_normal((sum(sizes), 5, 33)) * spread + ratio * spread
    return np.split(whole.astype(dtype).astype(np.float64), np.cumsum(sizes)[:-1])


def ulps(got, truth):
    """Distance in units of the spacing of float32 numbers at the truth."""
    return abs(got.astype(np.float32).astype(np.float64) - truth) / np.spacing(abs(truth).astype(np.float32)).astype(
        np.float64
    )


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("make", [as_float32_tensor, as_float32_ndarray])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_float32_mean_and_invstd_are_within_1_ulp_and_y_within_4(world_size, sizes, make):
    for ratio in (0, 1, 10, 100, 1e3, 1e4):
        parts = parts_of(1, sizes[world_size], ratio, np.float32)
        truth, _ = oracle.batch_norm(parts, parts)
        invstd = 1 / np.sqrt(truth.var + 1e-5)
        results = run_ranks(_forward, world_size, "thread", parts, make)
        for (mean, got_invstd, y, _, _), x, expected in zip(results, parts, truth.y, strict=True):
            assert ulps(mean, truth.mean).max() <= 1, f"mean at mean/std {ratio}"
            assert ulps(got_invstd, invstd).max() <= 1, f"invstd at mean/std {ratio}"
            largest = np.maximum(abs(x), abs(truth.mean)[:, None]) * invstd[:, None]
            assert (abs(y - expected) <= 4 * np.spacing(largest.astype(np.float32))).all(), f"y at mean/std {ratio}"


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("make", [as_float32_tensor, as_float32_ndarray])
@pytest.mark.parametrize("shape", [(1_000_000, 2, 1), (600, 20_000, 1), (64, 32, 196), (2, 3, 300_000)], ids=str)
def test_float32_invstd_is_within_1_ulp_of_many_elements_too(shape, make):
    """Sums of so many terms need more than adding one after the other."""
    x = (np.random.default_rng(4).standard_normal(shape) + 1e4).astype(np.float32)
    truth, _ = oracle.batch_norm([x], [x])
    mean, invstd, *_ = _forward(0, LocalCommunicator(), [x], make)
    assert ulps(mean, truth.mean).max() <= 1
    assert ulps(invstd, 1 / np.sqrt(truth.var + 1e-5)).max() <= 1


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("make", [as_float32_tensor, as_float32_ndarray])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_float32_variance_is_within_1e_3_at_mean_over_std_1e6(world_size, make):
    for sizes in (EVEN, UNEVEN, EMPTY):
        parts = parts_of(2, sizes[world_size], 1e6, np.float32)
        truth, _ = oracle.batch_norm(parts, parts)
        for _, invstd, _, _, running_var in run_ranks(_forward, world_size, "thread", parts, make):
            np.testing.assert_allclose(1 / invstd.astype(np.float64) ** 2 - 1e-5, truth.var, rtol=1e-3)
            np.testing.assert_allclose(running_var, truth.running_var, rtol=1e-3)


def test_float32_sums_of_squares_would_fail_at_mean_over_std_1e4():
    """The negative control: what the accuracy tests above would see of the usual way."""
    x = np.concatenate(parts_of(1, EVEN[3], 1e4, np.float32)).astype(np.float32)
    truth, _ = oracle.batch_norm([x], [x])
    naive = (x * x).mean((0, 2)) - x.mean((0, 2)) ** 2
    assert (abs(naive - truth.var) > 0.1).all()


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("make", [as_float64_tensor, as_float64_ndarray])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_float64_is_within_1e_12_at_mean_over_std_1e6(world_size, make):
    for sizes in (EVEN, UNEVEN, EMPTY):
        parts = parts_of(3, sizes[world_size], 1e6, np.float64)
        truth, _ = oracle.batch_norm(parts, parts, dtype="float64")
        results = run_ranks(_forward, world_size, "thread", parts, make)
        for (mean, invstd, y, running_mean, running_var), expected in zip(results, truth.y, strict=True):
            np.testing.assert_allclose(mean, truth.mean, rtol=1e-12)
            np.testing.assert_allclose(invstd, 1 / np.sqrt(truth.var + 1e-5), rtol=1e-12)
            np.testing.assert_allclose(running_mean, truth.running_mean, rtol=1e-12)
            np.testing.assert_allclose(running_var, truth.running_var, rtol=1e-12)
            # Of y's largest term, x * invstd: float64 cannot hold x itself better than 1e-16 * 1e6 of y.
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * 1e6)


def test_float64_sums_of_squares_without_a_center_would_fail_at_mean_over_std_1e6():
    """The negative control of the second message of float64 input."""
    x = torch.from_numpy(np.concatenate(parts_of(3, EVEN[3], 1e6, np.float64)))
    moments = aten.stats(x, None)
    combined(aten, moments)
    assert (abs(moments[x.shape[1] : -1] ** -2 / x.var((0, 2), correction=0) - 1) > 1e-6).all()


def _bits(rank, group, xs, dtype, formats):
    x = in_format(torch.from_numpy(xs[rank]).to(dtype), formats[rank])
    x = x.flatten(2)
    running_mean, running_var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    comm = as_communicator(group)
    y = torch.empty_like(x)
    running = core.Running(running_mean, running_var, None, 0.1)
    statistics = core.forward(x, y, None, None, running, 1e-5, select(x), comm)
    return {
        "mean": statistics[: x.shape[1]].float(),
        "invstd": statistics[x.shape[1] : -1].float(),
        "running_mean": running_mean,
        "running_var": running_var,
    }, y


def _assert_same_bits(case, launcher, world_sizes):
    rng = np.random.default_rng(case)
    dtype = ["float32", "bfloat16", "float16"][case % 3]
    c, n, side = int(rng.integers(1, 301)), int(rng.integers(7, 25)), int(rng.integers(1, 8))
    (whole,), _ = batch(case, [(n, c, side, side)], dtype, mean=rng.uniform(-10, 10))
    whole_results = None
    for world_size in world_sizes:
        cuts = np.sort(rng.integers(0, n + 1, world_size - 1))
        xs = np.split(whole, cuts)
        formats = [("contiguous", "channels_last")[rng.integers(2)] for _ in xs]
        results = run_ranks(_bits, world_size, launcher, xs, getattr(torch, dtype), formats)
        y = torch.cat([y for _, y in results])
        if whole_results is None:
            whole_results, whole_y = results[0][0], y
        assert torch.equal(y, whole_y), f"y of case {case}, {dtype}, at {cuts}"
        for rank, (found, _) in enumerate(results):
            for name, value in found.items():
                assert torch.equal(value, whole_results[name]), (
                    f"{name} of case {case}, {dtype}, rank {rank}, at {cuts}"
                )


@pytest.mark.usefixtures("kernels_in_use")
@pytest.mark.parametrize("case", range(50))
def test_bits_do_not_depend_on_the_split(case):
    _assert_same_bits(case, "thread", (1, 2, 3, 4, 7))


@pytest.mark.parametrize("case", [50, 51, 52])
def test_bits_do_not_depend_on_the_split_over_gloo(case):
    _assert_same_bits(case, "gloo", (1, 2, 3, 4, 7))


def test_float32_sums_would_depend_on_the_split():
    """The negative control of the two tests above."""
    (x,), _ = batch(0, [(24, 300, 7, 7)], mean=10.0)
    x = torch.from_numpy(x).float()
    parts = sum(part.sum((0, 2, 3)) for part in x.split([5, 8, 11]))
    assert not torch.equal(parts / x[:, 0].numel(), x.sum((0, 2, 3)) / x[:, 0].numel())


def _sum_over_a_group_made_past_torch(rank, _):
    store = dist.PrefixStore("past", dist.distributed_c10d._get_default_store())
    group = dist.ProcessGroup(store, rank, 2)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, 2, timedelta(seconds=30))
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    buffer = torch.tensor([1.0, rank], dtype=torch.float64)
    as_communicator(group).all_reduce(buffer)
    return buffer.tolist()


def test_a_group_that_torch_distributed_does_not_know_is_summed_over():
    assert run_ranks(_sum_over_a_group_made_past_torch, 2, "gloo") == [[2.0, 1.0]] * 2
