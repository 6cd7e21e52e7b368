"""Layers under torch.compile, which goes around the C++ kernels."""

import copy

import numpy as np
import pytest
import torch
from ranks import run_ranks
from steps import batch
from torch import nn

import syncbn


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def test_a_compiled_layer_takes_batches_of_several_sizes():
    layer = syncbn.SyncBatchNorm(4)
    compiled = torch.compile(layer, backend="eager")
    for n in (4, 5, 6):
        x = torch.randn(n, 4, 8, 8)
        torch.testing.assert_close(compiled(x), syncbn.SyncBatchNorm(4)(x))


NOT_DENSE = {
    "slice": lambda: torch.randn(2, 6, 80, 50)[:, :3],
    "channels": lambda: torch.randn(2, 80, 50, 6).permute(0, 3, 1, 2)[:, :3],
    "transposed": lambda: torch.randn(2, 3, 50, 80).mT,
    "negative": lambda: torch._neg_view(torch.randn(2, 3, 80, 50)),
}


@pytest.mark.parametrize(("act", "make"), [("none", "slice"), *(("silu", name) for name in NOT_DENSE)])
def test_copies_of_what_is_not_dense_live_as_long_as_the_kernels_read_them(act, make):
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNormAct(3, act=act)
    with torch.no_grad():
        layer.weight.data, layer.bias.data = torch.rand(2, 3).half()  # which are copies, too
    alone = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager")
    x, residual, dy = (NOT_DENSE[make]().requires_grad_() for _ in range(3))
    y, expected = compiled(x, residual), alone(x, residual)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y, [x, residual, layer.weight, layer.bias], dy)
    wanted = torch.autograd.grad(expected, [x, residual, alone.weight, alone.bias], dy)
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(layer.running_mean, alone.running_mean)
    torch.testing.assert_close(layer.running_var, alone.running_var)


def _compiled(rank, group, xs):
    """In the default group, of which layer and loss learn when they are called."""
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    scale = torch.compile(syncbn.scale_loss, backend="eager")
    with torch.no_grad():
        y = torch.compile(layer, backend="eager")(torch.from_numpy(xs[rank]))
        return y.numpy(), float(scale(torch.tensor(1.0), len(y)))


def test_compiled_layers_and_losses_sum_over_the_default_group():
    xs, _ = batch(6, [(3, 3), (5, 3)])
    whole = syncbn.SyncBatchNorm(3, dtype=torch.float64)(torch.from_numpy(np.concatenate(xs))).detach().numpy()
    ys, losses = zip(*run_ranks(_compiled, 2, "gloo", xs), strict=True)
    assert losses == (2 * 3 / 8, 2 * 5 / 8)
    np.testing.assert_allclose(np.concatenate(ys), whole, rtol=0, atol=1e-14 * np.abs(whole).max())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_compiled_autograd_goes_around_the_kernels_too():
    blocks = (nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), syncbn.SyncBatchNorm(8))
    model = nn.Sequential(*blocks)
    alone = copy.deepcopy(model)

    def step(model, x):
        model(x).square().sum().backward()

    compiled = torch.compile(step, backend="eager")
    for n in (4, 5, 6):
        x = torch.randn(n, 3, 16, 16)
        step(alone, x)
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(model, x)
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
