"""What has gone wrong in the arithmetic of other libraries; the number is that of the trap in the project's list."""

import numpy as np
import pytest
import torch
from support import oracle
from support.implementations import combined
from support.parity import STEPS, assert_control, batch_norm_step
from support.ranks import rank_errors, run_ranks
from support.steps import assert_equals_whole_batch, batch, torch_step
from torch import nn

import syncbn
from syncbn.comm import LocalCommunicator
from syncbn.kernels import Running, aten, reference


def assert_equal(step, xs, dys, dtype="float32"):
    """The parity assertion on threads, with its control: a rank's own statistics do not pass it."""
    assert_equals_whole_batch(run_ranks(step, len(xs), "thread", xs, dys, dtype), xs, dys, dtype)
    rank = max(range(len(xs)), key=lambda r: xs[r].size)
    if xs[rank].size < sum(x.size for x in xs):
        alone = step(rank, LocalCommunicator(), xs, dys, dtype)
        truth, allowed = oracle.batch_norm(xs, dys, dtype=dtype)
        assert oracle.worst(alone["running_var"], truth.running_var, allowed.running_var) > 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exponent", range(7))
def test_trap_01_variance_survives_a_large_mean(step, exponent):
    rng = np.random.default_rng(exponent)
    xs = [(rng.standard_normal(s) + 10.0**exponent).astype(np.float32) for s in ((2, 3, 10), (1, 3, 1), (8, 3, 16))]
    dys = [rng.standard_normal(x.shape) for x in xs]
    dys = [dy.astype(np.float32).astype(np.float64) for dy in dys]
    assert_equal(step, xs, dys)
    if exponent >= 4:
        x = np.concatenate([x.swapaxes(0, 1).reshape(3, -1) for x in xs], 1)
        assert (abs((x * x).mean(1) - x.mean(1) ** 2 - x.var(1)) > 0.1).all()


@pytest.mark.parametrize("step", STEPS)
def test_trap_02_float16_does_not_overflow(step):
    xs, dys = batch(2, [(1, 2, 200, 200), (1, 2, 200, 150)], "float16")
    xs = [8 * x for x in xs]
    assert_equal(step, xs, dys, "float16")
    x = torch.from_numpy(xs[0]).half()
    assert (x * x).sum().isinf()
    assert torch.tensor(xs[0][0, 0].size + xs[1][0, 0].size).half().isinf()


def test_trap_03_bfloat16_statistics_keep_their_precision():
    xs, dys = batch(3, [(4, 3, 8, 8), (2, 3, 8, 8)], "bfloat16", mean=20.0)
    assert_equal(torch_step, xs, dys, "bfloat16")
    x = torch.from_numpy(np.concatenate(xs)).bfloat16()
    naive = (x * x).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2
    assert (naive.double() / x.double().var((0, 2, 3)) - 1).abs().max() > 0.2


def _messages(rank, group, xs, dys, dtype):
    torch_step(rank, group, xs, dys, dtype)
    return group.messages


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_trap_04_an_empty_rank_sends_what_its_peers_send(dtype):
    xs, dys = batch(4, [(3, 2, 5), (0, 2, 5), (1, 2, 5)], dtype)
    assert_equal(torch_step, xs, dys, dtype)
    messages = run_ranks(_messages, 3, "thread", xs, dys, dtype)
    assert messages[0] == messages[1] == messages[2] == [(torch.float64, 5), (torch.float64, 4)]


def _cast_layer_running_mean(rank, group, xs, cast):
    layer = cast(syncbn.SyncBatchNorm(1, momentum=1.0, process_group=group))
    layer(torch.from_numpy(xs[rank]).to(layer.weight.dtype))
    return layer.running_mean.double().item(), layer.running_mean.dtype


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_trap_05_counts_are_not_cast_to_the_dtype_of_the_buffers(cast):
    # n elements of 1 and one of about -n: the mean is near 0, and n rounded to the dtype would move it.
    n = 2**11 + 1 if cast is nn.Module.half else 2**8 + 1
    xs = [np.full((n, 1), 1.0), np.full((1, 1), 4.0 - n)]
    results = run_ranks(_cast_layer_running_mean, 2, "thread", xs, cast)
    dtype = results[0][1]
    assert dtype == (torch.float16 if cast is nn.Module.half else torch.bfloat16)
    parts = [torch.from_numpy(x).to(dtype).double() for x in xs]
    expected = sum(p.sum().item() for p in parts) / (n + 1)
    unit = torch.finfo(dtype).eps / 2
    assert all(abs(mean - expected) <= 2 * unit * abs(expected) for mean, _ in results)
    rounded = torch.tensor(float(n)).to(dtype).item()
    naive = (parts[0].mean() * rounded + parts[1].sum()) / (rounded + 1)
    assert abs(naive - expected) > 4 * unit * abs(expected)


@pytest.mark.parametrize("step", STEPS)
def test_trap_06_unequal_ranks_weigh_by_their_samples(step):
    rng = np.random.default_rng(6)
    xs = [(rng.standard_normal((n, 2, 4)) + shift).astype(np.float32) for n, shift in ((2, 3.0), (14, 0.0))]
    dys = [rng.standard_normal(x.shape).astype(np.float32) for x in xs]
    assert_equal(step, xs, dys)
    truth, _ = oracle.batch_norm(xs, dys)
    mean_of_means = np.mean([x.mean((0, 2)) for x in xs], 0)
    assert (abs(mean_of_means - truth.mean) / np.sqrt(truth.var) > 0.4).all()


@pytest.mark.parametrize("step", STEPS)
def test_trap_07_unequal_sizes_weigh_by_their_elements(step):
    rng = np.random.default_rng(7)
    xs = [(rng.standard_normal((3, 2, side, side)) + side).astype(np.float32) for side in (4, 16)]
    dys = [rng.standard_normal(x.shape).astype(np.float32) for x in xs]
    assert_equal(step, xs, dys)
    truth, _ = oracle.batch_norm(xs, dys)
    assert (abs(np.mean([x.mean((0, 2, 3)) for x in xs], 0) - truth.mean) > 1).all()


@pytest.mark.parametrize("step", STEPS)
def test_trap_08_one_empty_rank(step):
    for spatial in ((4, 4), (0, 4)):
        xs, dys = batch(8, [(3, 2, 4, 4), (0, 2, *spatial)])
        assert_equal(step, xs, dys)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_trap_08_all_ranks_empty(momentum):
    def step(rank, group):
        layer = syncbn.SyncBatchNorm(2, momentum=momentum, process_group=group)
        layer.running_mean.fill_(3)
        x = torch.zeros(0, 2, 4, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        return y, x.grad, layer

    for y, dx, layer in run_ranks(step, 2, "thread"):
        assert y.shape == dx.shape == (0, 2, 4)
        assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0]
        assert layer.running_mean.tolist() == [3, 3]
        assert layer.running_var.tolist() == [1, 1]
        assert layer.num_batches_tracked == 0


def test_trap_08_all_ranks_empty_with_numpy():
    def step(rank, group):
        layer = syncbn.numpy.SyncBatchNorm(2, comm=group)
        y = layer.forward(np.zeros((0, 2, 4), np.float32))
        return y, layer.backward(y), layer

    for y, dx, layer in run_ranks(step, 2, "thread"):
        assert y.shape == dx.shape == (0, 2, 4)
        assert layer.grad_weight.tolist() == layer.grad_bias.tolist() == layer.running_mean.tolist() == [0, 0]
        assert layer.running_var.tolist() == [1, 1]
        assert layer.num_batches_tracked == 0


def _one_element(rank, group, shapes):
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    try:
        layer(torch.ones(shapes[rank]))
    finally:
        assert layer.running_mean.tolist() == [0, 0]
        assert layer.running_var.tolist() == [1, 1]
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("launcher", ["thread", "gloo"])
def test_trap_09_one_element_over_all_ranks_is_an_error_on_all_ranks(launcher):
    errors = rank_errors(_one_element, 2, launcher, [(1, 2), (0, 2)])
    for rank, error in enumerate(errors):
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"[rank {rank}/2] expected more than 1 value per channel when training")


@pytest.mark.parametrize("step", STEPS)
def test_trap_10_one_element_on_this_rank_and_more_on_others_works(step):
    xs, dys = batch(10, [(1, 3), (1, 3), (2, 3)])
    assert_equal(step, xs, dys)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.from_numpy(xs[0]).float())


@pytest.mark.parametrize("step", STEPS)
def test_trap_26_running_var_is_not_recovered_from_invstd(step):
    xs, dys = batch(26, [(30, 4, 5), (20, 4, 5)])
    xs = [(x / np.concatenate(xs).std((0, 2))[:, None] * 1e-9**0.5).astype(np.float32) for x in xs]
    truth, _ = oracle.batch_norm(xs, dys)
    assert (truth.var < 2e-9).all()

    def running_var(rank, group):
        if step is torch_step:
            layer = syncbn.SyncBatchNorm(4, momentum=1.0, process_group=group)
            layer(torch.from_numpy(xs[rank]))
            return layer.running_var.numpy()
        layer = syncbn.numpy.SyncBatchNorm(4, momentum=1.0, comm=group)
        layer.forward(xs[rank])
        return layer.running_var

    n = 50 * 5
    for found in run_ranks(running_var, 2, "thread"):
        np.testing.assert_allclose(found, truth.var * n / (n - 1), rtol=2 * 2.0**-24)
    invstd = (1 / np.sqrt(truth.var + 1e-5)).astype(np.float32)
    assert (abs(1 / invstd**2 - np.float32(1e-5) - truth.var) > 1e-3 * truth.var).any()


@pytest.mark.parametrize("count", [2**24 + 1, 2**31 + 1, 2**40 + 1])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_trap_27_large_counts_are_exact(library, count):
    # Per element a mean of 1/2 and a mean square of 1: var 3/4. Counts in float32 or int32 would be off, or wrap.
    moments = np.array([count / 2, count, count], np.float64)
    running_mean, running_var = np.zeros(1), np.zeros(1)
    if library == "torch":
        moments, running_mean, running_var = map(torch.from_numpy, (moments, running_mean, running_var))
    combined(aten if library == "torch" else reference, moments, running=Running(running_mean, running_var, None, 1.0))
    mean, invstd, n = moments
    assert float(n) == count
    assert float(mean) == 0.5
    assert float(invstd) == pytest.approx(0.75**-0.5, rel=1e-15)
    assert float(running_var[0]) == pytest.approx(0.75 * count / (count - 1), rel=1e-15)
    assert int(np.float32(count)) != count


def test_trap_31_the_parity_assertion_fails_without_synchronisation():
    assert_control("thread", [3, 2], batch_norm_step)
