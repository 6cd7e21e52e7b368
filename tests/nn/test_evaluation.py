"""Gradients of evaluation: of every order of axes of the gradient and of the input, where torch's own are wrong."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import syncbn


def orders(shape):
    """Tensors of that shape whose axes are in memory in every order."""
    for order in itertools.permutations(range(len(shape))):
        memory = torch.randn([shape[axis] for axis in order], dtype=torch.float64)
        yield memory.permute([order.index(axis) for axis in range(len(shape))])


def expected(layer, x, dy):
    axes = [0, *range(2, x.dim())]
    mean, var, weight, bias = (
        v.detach().view(-1, *[1] * (x.dim() - 2))
        for v in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    invstd = (var + layer.eps).rsqrt()
    xhat = (x - mean) * invstd
    return xhat * weight + bias, dy * weight * invstd, (dy * xhat).sum(axes), dy.sum(axes)


def layer_of(c):
    torch.manual_seed(c)
    layer = syncbn.SyncBatchNorm(c, dtype=torch.float64).eval()
    with torch.no_grad():
        for v in (layer.weight, layer.bias, layer.running_mean):
            v.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


SHAPES = [(1, 3), (4, 3), (1, 3, 5), (2, 3, 4), (4, 3, 1), (1, 3, 2, 2), (1, 3, 1, 4), (2, 3, 4, 1), (1, 3, 1, 1)]
SHAPES += [(1, 1, 2, 2), (2, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trap_39_every_order_of_axes_of_input_and_gradient(shape):
    layer = layer_of(shape[1])
    for x in orders(shape):
        x.requires_grad_()
        for dy in orders(shape):
            y = layer(x)
            got = y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
            torch.testing.assert_close(got, expected(layer, x, dy))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (2, 3, 1, 2, 1), (1, 3, 1, 1, 2)], ids=str)
def test_trap_39_every_order_of_axes_of_a_gradient_in_5_d(shape):
    layer = layer_of(3)
    dense = torch.randn(shape, dtype=torch.float64)
    for x in (dense, dense.to(memory_format=torch.channels_last_3d)):
        x = x.detach().requires_grad_()
        for dy in orders(shape):
            y = layer(x)
            got = y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
            torch.testing.assert_close(got, expected(layer, x, dy))


def test_torch_itself_is_wrong_here():
    """The negative control: when this fails, the hook in dispatch.running_stats_norm can go."""
    layer = layer_of(3)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 2, 1, 3, dtype=torch.float64).permute(2, 3, 0, 1)
    statistics = layer.running_mean, layer.running_var
    y = F.batch_norm(x, *statistics, layer.weight, layer.bias, False, 0.0, layer.eps)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert (dx - expected(layer, x, dy)[1]).abs().max() > 0.1


def test_trap_39_a_frozen_layer_before_a_sequence_first_block():
    layer = layer_of(4)
    x = torch.randn(1, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(42, 1, 4, dtype=torch.float64)
    y = layer(x)
    (y.flatten(2).permute(2, 0, 1) * weights).sum().backward()
    dy = weights.permute(1, 2, 0).reshape(x.shape)
    torch.testing.assert_close(x.grad, expected(layer, x, dy)[1])


def test_second_derivatives_of_evaluation():
    layer = layer_of(3)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).flatten(2).permute(2, 0, 1), x)


def test_in_place_after_evaluation_leaves_the_gradient_right():
    layer = layer_of(3)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    z = layer(x).mul_(2).relu_().flatten(2).permute(2, 0, 1)
    dy = torch.randn(4, 1, 3, dtype=torch.float64)
    (dx,) = torch.autograd.grad(z, x, dy)
    gate = (layer(x) > 0).double() * 2
    torch.testing.assert_close(dx, expected(layer, x, dy.permute(1, 2, 0).reshape(x.shape) * gate)[1])
