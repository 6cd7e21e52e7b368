"""Layers under torch.compile, which goes around the C++ kernels."""

import copy

import pytest
import torch

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
