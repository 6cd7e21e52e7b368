"""Second derivatives, torch.func and forward mode: right by every way of asking, or refused by every way."""

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.steps import batch
from torch import nn
from torch.autograd.functional import hessian, hvp, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import syncbn
from syncbn.comm import LocalCommunicator, as_communicator

# torch's own decompositions for forward mode use it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")
ACTS = ["none", "relu", "leaky_relu", "silu"]


def pair(c=3, **options):
    """A layer and nn.BatchNorm1d with the same parameters, in float64."""
    torch.manual_seed(c)
    ours = syncbn.SyncBatchNorm(c, dtype=torch.float64, **options)
    theirs = nn.BatchNorm1d(c, dtype=torch.float64, **options)
    with torch.no_grad():
        ours.weight.normal_(), ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def cubed(layer):
    return lambda v: layer(v).pow(3).sum()


X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "ask",
    [
        lambda f: hessian(f, X),
        lambda f: hessian(f, X, vectorize=True),
        lambda f: hvp(f, X, V)[1],
        lambda f: jacobian(lambda v: torch.autograd.grad(f(v), v, create_graph=True)[0], X),
    ],
    ids=["hessian", "hessian-vectorize", "hvp", "jacobian-of-grad"],
)
def test_trap_38_second_derivatives_equal_batch_norm(ask):
    ours, theirs = pair()
    torch.testing.assert_close(ask(cubed(ours)), ask(cubed(theirs)))
    assert ask(cubed(theirs)).abs().max() > 0.1


def _backward_inputs(loss, x):
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    dx.pow(2).sum().backward(inputs=[x])
    return x.grad


def _allow_unused(loss, x):
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x, allow_unused=True)[0]


def _full_backward(loss, x):
    loss(x).backward(create_graph=True)
    first, x.grad = x.grad, None
    first.pow(2).sum().backward()
    return x.grad


WAYS = [_backward_inputs, _allow_unused, _full_backward]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", WAYS)
def test_trap_38_second_derivatives_by_every_way_of_asking(way):
    ours, theirs = pair()
    got, expected = (way(cubed(layer), X.clone().requires_grad_()) for layer in (ours, theirs))
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", [*WAYS, lambda f, x: hessian(f, x.detach()), lambda f, x: grad(f)(x.detach())])
@pytest.mark.parametrize("act", ["none", "leaky_relu"])
def test_trap_38_in_place_every_way_of_asking_is_refused(way, act):
    layer = syncbn.SyncBatchNormAct(3, act, inplace=True, track_running_stats=False, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError), match="inplace"):
        way(lambda v: layer(v * 1).pow(3).sum(), X.clone().requires_grad_())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradgradcheck(act, with_residual, affine):
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNormAct(2, act, negative_slope=0.125, affine=affine, dtype=torch.float64)
    x, residual = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = {name: torch.randn(2, dtype=torch.float64, requires_grad=True) for name, _ in layer.named_parameters()}

    def run(x, residual, *values):
        arguments = (x, residual) if with_residual else (x,)
        return functional_call(layer, dict(zip(parameters, values, strict=True)), arguments)

    inputs = x, residual.requires_grad_(with_residual), *parameters.values()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("ask", [grad, jacrev, jacfwd, torch.func.hessian])
def test_torch_func_equals_batch_norm(ask):
    ours, theirs = pair(track_running_stats=False)
    torch.testing.assert_close(ask(cubed(ours))(X), ask(cubed(theirs))(X))


def test_vjp_jvp_and_vmap_equal_batch_norm():
    ours, theirs = pair(track_running_stats=False)
    torch.testing.assert_close(vjp(ours, X)[1](V), vjp(theirs, X)[1](V))
    torch.testing.assert_close(jvp(ours, (X,), (V,)), jvp(theirs, (X,), (V,)))
    torch.testing.assert_close(vmap(ours)(torch.stack([X, V])), vmap(theirs)(torch.stack([X, V])))


def test_several_gradients_at_once_equal_batch_norm():
    ours, theirs = pair()
    x, several = X.clone().requires_grad_(), torch.randn(4, 5, 3, dtype=torch.float64)
    got, expected = (torch.autograd.grad(layer(x), x, several, is_grads_batched=True) for layer in (ours, theirs))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transform", [lambda f: grad(lambda v: f(v).sum())(X), lambda f: vmap(f)(torch.stack([X, V]))])
def test_torch_func_refuses_running_statistics_that_are_no_argument_as_for_batch_norm(transform):
    for layer in pair():
        with pytest.raises(RuntimeError):
            transform(layer)


def test_torch_func_updates_running_statistics_that_are_arguments():
    ours, theirs = pair()

    def state_after(layer):
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        gradient = grad(lambda p, b: functional_call(layer, (p, b), (X,)).pow(3).sum())
        return gradient(dict(layer.named_parameters()), buffers), buffers

    torch.testing.assert_close(state_after(ours), state_after(theirs))


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_equals_batch_norm(training):
    ours, theirs = pair()
    found = []
    for layer in (ours, theirs):
        layer.train(training)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, V)
            found.append(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent)
    torch.testing.assert_close(*found)


def _second_derivatives(rank, group, xs, act):
    """Of the sum of all ranks' losses, for the input of this rank, along a direction: dx and H v."""
    layer = syncbn.SyncBatchNormAct(3, act, negative_slope=0.125, process_group=group, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5])), layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    x = torch.from_numpy(xs[rank]).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.pow(2).sum(), x)
    return dx.detach().numpy(), second.numpy()


@pytest.mark.parametrize("launcher", ["thread", "gloo"])
@pytest.mark.parametrize("act", ACTS)
def test_trap_24_second_derivatives_on_several_ranks_equal_one_process(launcher, act):
    xs, _ = batch(0, [(4, 3), (2, 3), (1, 3)], "float64")
    whole = [np.concatenate(xs)]
    results = run_ranks(_second_derivatives, 3, launcher, xs, act)
    (expected,) = [_second_derivatives(0, LocalCommunicator(), whole, act)]
    alone = [_second_derivatives(0, LocalCommunicator(), [x], act)[1] for x in xs[:2]]
    for got, wanted in zip(zip(*results, strict=True), expected, strict=True):
        np.testing.assert_allclose(np.concatenate(got), wanted, rtol=1e-9, atol=1e-9)
    assert abs(np.concatenate(alone) - expected[1][:6]).max() > 1e-3, "unsynchronised layers must differ"


def _maml(rank, group, xs):
    """An outer gradient through an inner step of SGD; over ranks, of the mean of their losses."""
    layer = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64, track_running_stats=False)
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3))).requires_grad_()
    x = torch.from_numpy(xs[rank])
    weights = [matrix, layer.weight]

    def loss(weight, scale):
        z = nn.functional.linear(x, weight)
        return functional_call(layer, {"weight": scale}, (z,)).pow(3).sum()

    comm = as_communicator(group)

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            v = v.clone()
            comm.all_reduce(v.view(-1))
            return v

        @staticmethod
        def backward(ctx, g):
            return Sum.apply(g)

    inner = [Sum.apply(g) for g in torch.autograd.grad(loss(*weights), weights, create_graph=True)]
    outer = torch.autograd.grad(loss(*(w - 0.01 * g for w, g in zip(weights, inner, strict=True))), weights)
    return [Sum.apply(g).numpy() for g in outer]


def test_trap_38_maml_on_two_ranks_equals_one_process():
    xs, _ = batch(1, [(4, 3), (3, 3)], "float64")
    (expected,) = [_maml(0, LocalCommunicator(), [np.concatenate(xs)])]
    for result in run_ranks(_maml, 2, "thread", xs):
        for got, wanted in zip(result, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
