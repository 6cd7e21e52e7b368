"""Noisy layers: what the formula says, the same noise on every rank, gradients, state, seeds and bad input."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support.noisy import (
    LEVELS,
    SPLITS,
    STEPS,
    assert_noisy_control,
    assert_noisy_parity,
    made,
    numpy_steps,
    torch_noisy,
    torch_steps,
    whole,
)
from support.ranks import rank_errors, run_ranks
from support.steps import parameters
from support.tolerances import TRAINING, difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
import syncbn.numpy
from syncbn import noise
from syncbn.comm import LocalCommunicator

EVERY = [(sizes, step) for splits in SPLITS.values() for sizes in splits.values() for step in STEPS]


@pytest.mark.parametrize(("sizes", "step"), EVERY)
def test_ranks_equal_one_process_on_the_whole_batch(sizes, step):
    assert_noisy_parity("thread", sizes, step)


def test_processes_over_gloo_equal_the_whole_batch():
    assert_noisy_parity("gloo", [1, 4], torch_steps)


def test_ranks_with_noise_of_their_own_differ():
    assert_noisy_control("thread", 2)


def test_numpy_equals_torch():
    xs, dys = made([5])
    assert difference(whole(xs, dys, numpy_steps), whole(xs, dys)) < TRAINING


def drawn(count, seed=11, c=3):
    return noise.normal(np.array([seed]), np.array([count]), np.arange(1, c + 1), np)


def test_the_layer_is_its_formula():
    layer, x = torch_noisy(None), made([5])[0][0]
    mean, var = x.mean((0, 2), keepdims=True), x.var((0, 2), keepdims=True)
    weight, bias = (v[:, None] for v in parameters(3))
    below = 0
    for count in range(8):
        e1, e2 = (v[:, None] for v in drawn(count))
        noisy_mean = mean + np.array(LEVELS["noise_mean"])[:, None] * e1 * np.sqrt(var + layer.eps)
        u = np.array(LEVELS["noise_var"])[:, None] * e2
        below += (u < -0.5).sum()
        noisy_var = (var + layer.eps) * np.where(u >= -0.5, 1 + u, 0.25 / np.abs(np.minimum(u, -0.5)))
        expected = (x - noisy_mean) / np.sqrt(noisy_var) * weight + bias
        np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=1e-12, atol=1e-12)
    assert below > 0


def test_the_variance_stays_positive_and_smooth():
    u = torch.linspace(-30, 3, 1321, dtype=torch.float64)
    *_, scale = noise.perturbed(None, None, u, u, torch.ones(()), torch.ones(()), torch)
    factor, step = scale**-2, 33 / 1320
    assert (factor > 0).all()
    assert (factor.diff() > 0).all()
    slope = factor.diff() / step
    assert slope.diff().abs().max() < 4.5 * step  # the second derivative is at most that of -1 / (4u) at -1/2, 4


def test_evaluation_and_running_statistics_have_no_noise():
    noisy, plain = torch_noisy(None), syncbn.SyncBatchNorm(3, dtype=torch.float64)
    plain.load_state_dict({name: v for name, v in noisy.state_dict().items() if "noise" not in name})
    x = torch.from_numpy(made([5])[0][0])
    assert (noisy(x) - plain(x)).abs().max() > 0.1
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(noisy, name), getattr(plain, name))
    assert torch.equal(noisy.eval()(x), plain.eval()(x))
    assert noisy.noise_count == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_by_finite_differences(check, affine):
    layer = torch_noisy(None, affine=affine) if affine else syncbn.NoisySyncBatchNorm(3, affine=False, seed=11)
    parameters = {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}
    parameters["noise_var"].data[1] = -0.9
    x = torch.from_numpy(made([3])[0][0]).requires_grad_()

    def call(x, *values):
        fresh = copy.deepcopy(layer.double())
        return torch.func.functional_call(fresh, dict(zip(parameters, values, strict=True)), (x,))

    assert check(call, (x, *parameters.values()))


def _second(rank, group, xs):
    layer = torch_noisy(group)
    x = torch.from_numpy(xs[rank]).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    inputs = x, layer.weight, layer.noise_mean, layer.noise_var
    return [v.detach() for v in torch.autograd.grad(dx.pow(2).sum(), inputs)]


def test_second_derivatives_over_ranks_equal_the_whole_batch():
    xs, _ = made([2, 3])
    found = run_ranks(_second, 2, "thread", xs)
    first, *others = (list(values) for values in zip(*found, strict=True))
    expected = _second(0, LocalCommunicator(), [np.concatenate(xs)])
    got = [torch.cat(first), *(sum(values) for values in others)]
    # dx of order 10, its derivatives of order 100.
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)


def test_noise_is_unit_normal_and_independent():
    e = np.stack(drawn(3, c=100_000))
    after = np.stack(drawn(4, c=100_000))
    other = np.stack(drawn(3, seed=12, c=100_000))
    deviation = 100_000**-0.5
    assert np.abs(e.mean(1)).max() < 5 * deviation
    assert np.abs((e**2).mean(1) - 1).max() < 5 * 2**0.5 * deviation
    assert np.abs((e**4).mean(1) - 3).max() < 5 * 96**0.5 * deviation
    for a, b in ((e[0], e[1]), (e[0], after[0]), (e[0], other[0]), (e[0, 1:], e[0, :-1]), (e[1], after[1])):
        assert abs((a * b).mean()) < 5 * deviation
    in_time = np.array([drawn(count, c=2)[0] for count in range(2000)])
    assert np.abs((in_time[1:] * in_time[:-1]).mean(0)).max() < 5 * 2000**-0.5


def test_the_numbers_are_the_same_in_every_version():
    e1, e2 = drawn(5, seed=2**62 + 1, c=2)
    np.testing.assert_allclose([e1, e2], PINNED, rtol=1e-12)
    in_torch = noise.normal(torch.tensor([2**62 + 1]), torch.tensor([5]), torch.arange(1, 3), torch)
    np.testing.assert_allclose(torch.stack(in_torch), PINNED, rtol=1e-12)


PINNED = [[0.9015624232724863, 2.4797549857583427], [0.520441011799142, -0.18982361128597708]]


# -- seeds ------------------------------------------------------------------------------------------------------------


def _seed_of(rank, group, frontend):
    if frontend == "numpy":
        layer = syncbn.numpy.NoisySyncBatchNorm(3, comm=group)
        ys = [layer.forward(np.ones((2, 3), np.float32)) for _ in range(3)]
    else:
        layer = syncbn.NoisySyncBatchNorm(3, process_group=group)
        ys = [layer(torch.ones(2, 3)).detach() for _ in range(3)]
    return int(layer.noise_seed), np.stack(ys).tolist(), [length for _, length in group.messages]


@pytest.mark.parametrize("frontend", ["torch", "numpy"])
def test_ranks_without_a_seed_agree_on_one_in_one_message(frontend):
    results = run_ranks(_seed_of, 3, "thread", frontend)
    assert results[0] == results[1] == results[2]
    assert results[0][2] == [22, 7, 7, 7]


def _with_seeds(rank, group, frontend, seeds):
    if frontend == "numpy":
        layer = syncbn.numpy.NoisySyncBatchNorm(3, comm=group, seed=seeds[rank])
        return layer.forward(np.ones((2, 3), np.float32))
    layer = syncbn.NoisySyncBatchNorm(3, process_group=group, seed=seeds[rank])
    return layer(torch.ones(2, 3))


@pytest.mark.parametrize("frontend", ["torch", "numpy"])
@pytest.mark.parametrize("seeds", [(1, 2, 1), (2**62, 2**62, 2**61), (None, 5, None)])
def test_different_seeds_are_an_error_on_every_rank(frontend, seeds):
    for rank, error in enumerate(rank_errors(_with_seeds, 3, "thread", frontend, seeds)):
        assert isinstance(error, ValueError)
        assert f"[rank {rank}/3] expected noise of one seed" in str(error)


def _with_counts(rank, group):
    layer = syncbn.NoisySyncBatchNorm(3, process_group=group, seed=1)
    layer.noise_count.fill_(rank)
    return layer(torch.ones(2, 3))


def test_different_counts_are_an_error_on_every_rank():
    errors = rank_errors(_with_counts, 2, "thread")
    assert all("got the number of forwards" in str(error) for error in errors)


def _refuses(rank, group):
    layer = syncbn.NoisySyncBatchNorm(3, process_group=group, seed=1)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.ones(2, 3 + rank))
    assert layer.noise_count == 0
    return layer(torch.arange(6.0).view(2, 3) + rank).tolist()


def test_a_forward_that_is_refused_draws_nothing():
    xs = [torch.arange(6.0).view(2, 3) + rank for rank in range(2)]
    whole = syncbn.NoisySyncBatchNorm(3, seed=1)(torch.cat(xs))
    torch.testing.assert_close(torch.tensor(run_ranks(_refuses, 2, "thread")).flatten(0, 1), whole.detach())


@pytest.mark.parametrize("cls", [syncbn.NoisySyncBatchNorm, syncbn.numpy.NoisySyncBatchNorm])
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"noise_mean": -0.1}, ValueError, "noise_mean to be finite and at least 0.*; got -0.1"),
        ({"noise_var": float("nan")}, ValueError, "noise_var to be finite and at least 0.*; got nan"),
        ({"noise_var": float("inf")}, ValueError, "noise_var to be finite"),
        ({"noise_mean": [0.1, 0.2]}, ValueError, r"one for each of 3 channels; got shape \(2,\)"),
        ({"noise_mean": "much"}, TypeError, "noise_mean to be a number or a vector"),
        ({"seed": -1}, ValueError, "seed to be from 0 to .*; got -1"),
        ({"seed": 2**63}, ValueError, "seed to be from 0"),
        ({"seed": 0.5}, TypeError, "seed to be a whole number or None; got float"),
    ],
)
def test_bad_noise_is_refused(cls, options, kind, message):
    with pytest.raises(kind, match=message):
        cls(3, **options)


def test_noise_of_another_shape_is_refused_at_the_forward():
    layer = syncbn.NoisySyncBatchNorm(3)
    layer.noise_mean = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"expected noise_mean of shape \(3,\)"):
        layer(torch.randn(4, 3))


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_state_dict_goes_on_with_the_same_noise():
    x = torch.randn(4, 3)
    layer, other = syncbn.NoisySyncBatchNorm(3, noise_var=0.3), syncbn.NoisySyncBatchNorm(3)
    layer(x)
    other.load_state_dict(layer.state_dict())
    in_numpy = syncbn.numpy.NoisySyncBatchNorm(3)
    in_numpy.load_state_dict({name: v.numpy() for name, v in layer.state_dict().items()})
    y = layer(x)
    assert torch.equal(other(x), y)
    torch.testing.assert_close(torch.from_numpy(in_numpy.forward(x.numpy())), y.detach())
    assert not torch.equal(layer(x), y)


def test_states_without_noise_load_and_leave_it():
    noisy = syncbn.NoisySyncBatchNorm(3, seed=5, noise_mean=0.7)
    plain = nn.BatchNorm1d(3)
    plain.weight.data.fill_(2.0)
    noisy.load_state_dict(plain.state_dict())
    assert (noisy.weight == 2).all()
    assert noisy.noise_seed == 5
    assert noisy.noise_mean.tolist() == pytest.approx([0.7] * 3)
    partly = {name: v for name, v in noisy.state_dict().items() if name != "noise_seed"}
    with pytest.raises(RuntimeError, match="noise_seed"):
        noisy.load_state_dict(partly)
    in_numpy = syncbn.numpy.NoisySyncBatchNorm(3, seed=5)
    in_numpy.load_state_dict({name: v.numpy() for name, v in plain.state_dict().items()})
    assert in_numpy.noise_seed == 5
    with pytest.raises(KeyError):
        in_numpy.load_state_dict({name: v.numpy() for name, v in partly.items()})


def test_copies_and_pickles_draw_the_same():
    layer, x = syncbn.NoisySyncBatchNorm(3, noise_mean=0.5), torch.randn(4, 3)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    y = layer(x)
    for other in copies:
        assert other._syncbn_noise is not layer._syncbn_noise
        assert torch.equal(other(x), y)


def test_reset_parameters_starts_again():
    layer, x = syncbn.NoisySyncBatchNorm(3, seed=1), torch.randn(4, 3)
    y = layer(x)
    layer.noise_mean.data.fill_(3)
    layer.reset_parameters()
    assert torch.equal(layer(x), y)


# -- training ---------------------------------------------------------------------------------------------------------


def _train(rank, group, sizes, is_distributed):
    torch.manual_seed(100 + rank)  # the layers' own seeds differ, and rank 0's serves
    net = nn.Sequential(nn.Linear(3, 4), syncbn.NoisySyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 1)).double()
    net.load_state_dict(torch.load(io.BytesIO(INITIAL), weights_only=True), strict=False)
    model = DistributedDataParallel(net) if is_distributed else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 3)))
    first = 4 * rank
    part = x[first : first + 4] if is_distributed else x
    for _ in range(3):
        optimizer.zero_grad()
        model(part).pow(2).mean().backward()
        optimizer.step()
    return {name: v.detach() for name, v in net.state_dict().items()}


def _initial():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 1)).double()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.getvalue()


INITIAL = _initial()


def test_ddp_equals_one_process():
    found = run_ranks(_train, 2, "gloo", None, True)
    expected = _train(0, None, None, False)
    for state in found:
        assert difference(state, expected) < TRAINING
        assert (state["1.noise_mean"] - 0.1).abs().max() > 1e-4  # it learns


def test_mixed_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), syncbn.NoisySyncBatchNorm(4, seed=1, noise_var=0.3))
    x = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(net)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().pow(3).sum().backward()
    assert y.dtype == torch.bfloat16
    assert net[1].noise_mean.grad.dtype == torch.float32
    # bfloat16 has 8 bits: a convolution's input, weight and result, and y, of size up to 4, are rounded.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=4 * 4 * 2.0**-8)
    half = syncbn.NoisySyncBatchNorm(4, seed=1).bfloat16()
    half(torch.randn(4, 4, 3).bfloat16()).float().pow(3).sum().backward()
    assert half.noise_var.grad.dtype == torch.bfloat16
    assert half.noise_var.grad.isfinite().all()
