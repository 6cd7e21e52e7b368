"""autocast and mixed dtypes: as nn.BatchNorm where it takes them, in training and in evaluation."""

import pytest
import torch
from support.ranks import run_ranks
from torch import nn

import syncbn


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_equals_batch_norm(dtype, training):
    x = torch.randn(4, 3, 9, 9)
    expected, network = _network().train(training), syncbn.convert_sync_batchnorm(_network().train(training))
    outputs, gradients = [], []
    for module in (expected, network):
        with torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        outputs.append(y.float())
        gradients.append(module[0].weight.grad)
    # Two layers' worth of roundings to the narrow dtype, of values of order 1 and of sums over 200 of them.
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(*outputs, rtol=4 * u, atol=4 * u)
    torch.testing.assert_close(*gradients, rtol=0, atol=16 * u * gradients[0].abs().max().item())
    torch.testing.assert_close(network[1].running_var, expected[1].running_var, rtol=u, atol=0)


def _autocast_rank(rank, group):
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    x = torch.full((3, 2), float(rank), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
        y.float().sum().backward()  # inside autocast, as some loops have it
    return y.dtype, y[0, 0].item(), [dtype for dtype, _ in group.messages], x.grad.dtype, layer.weight.grad.dtype


def test_under_autocast_statistics_stay_in_float64_on_the_wire():
    for rank, result in enumerate(run_ranks(_autocast_rank, 2, "thread")):
        dtype, value, messages, grad_dtype, weight_dtype = result
        assert (dtype, value) == (torch.bfloat16, 2 * rank - 1)
        assert messages == [torch.float64] * 2
        assert (grad_dtype, weight_dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_input_dtype_meets_any_parameter_dtype(dtype, layer_dtype):
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(3, dtype=layer_dtype)
    x = (torch.randn(64, 3) * 2 + 1).to(dtype).requires_grad_()
    u = max(torch.finfo(dtype).eps, torch.finfo(layer_dtype).eps)
    for training in (True, False):
        layer.train(training)
        y = layer(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert (x.grad.dtype, layer.weight.grad.dtype) == (dtype, layer_dtype)
        if training:
            truth = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
        else:
            truth = (x.double() - layer.running_mean.double()) / (layer.running_var.double() + layer.eps).sqrt()
        torch.testing.assert_close(y.double(), truth, rtol=4 * u, atol=4 * u + 2e-5)
    assert layer.running_mean.dtype == layer_dtype
