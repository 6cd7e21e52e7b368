"""What has gone wrong in the layers of other libraries; the number is that of the trap in the project's list."""

import copy
import io
import pickle
from inspect import signature

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ranks import rank_errors, run_ranks
from support.steps import assert_equals_whole_batch, batch, torch_layer, torch_step
from support.tolerances import rounding
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
import syncbn.numpy
from syncbn.comm import LocalCommunicator, as_communicator
from syncbn.kernels import cpu

BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
TIGHT = {"rtol": 1e-5, "atol": 1e-5}  # float32 results of order 1, each some tens of roundings of 6e-8 from the truth


def _needs_differ(rank, group, xs, dys, frozen):
    layer = torch_layer(3, "float32")
    layer.process_group = group
    if "weight" in frozen[rank]:
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    x = torch.from_numpy(xs[rank]).float().requires_grad_("input" not in frozen[rank])
    layer(x).backward(torch.from_numpy(dys[rank]).float())
    return x.grad, layer.weight.grad


@pytest.mark.parametrize("launcher", ["thread", "gloo"])
@pytest.mark.parametrize("frozen", [(("input",), ()), (("weight",), ("input",))], ids=["input", "weight_input"])
def test_trap_11_ranks_may_need_different_gradients(launcher, frozen):
    xs, dys = batch(11, [(2, 3, 4), (3, 3, 4)])
    whole = run_ranks(torch_step, 2, launcher, xs, dys)
    for rank, (dx, grad_weight) in enumerate(run_ranks(_needs_differ, 2, launcher, xs, dys, frozen)):
        assert (dx is None) == ("input" in frozen[rank])
        assert (grad_weight is None) == ("weight" in frozen[rank])
        if dx is not None:
            np.testing.assert_array_equal(dx.double(), whole[rank]["dx"])
        if grad_weight is not None:
            np.testing.assert_array_equal(grad_weight.double(), whole[rank]["grad_weight"])


def _messages_of(rank, group, mode):
    layer = syncbn.SyncBatchNorm(2, process_group=group, track_running_stats=mode != "eval_untracked")
    layer.train(mode == "train")
    x = torch.randn(3, 2, 4, requires_grad=True)
    layer(x).sum().backward()
    return len(group.messages), x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize(("mode", "messages"), [("train", 2), ("eval", 0), ("eval_untracked", 0)])
def test_trap_13_eval_and_frozen_layers_send_nothing(mode, messages):
    assert run_ranks(_messages_of, 2, "thread", mode) == [(messages, True)] * 2


def _two_forwards_one_backward(rank, group, layer, training):
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(1, 2, 1), layer.train(training)))
    x = torch.randn(2, 1, 3, 3)
    (model(x) + model(2 * x)).square().sum().backward()
    return model.module[0].weight.grad


@pytest.mark.parametrize("training", [True, False])
def test_trap_15_two_forwards_before_one_backward_under_ddp(training):
    grads = run_ranks(_two_forwards_one_backward, 2, "gloo", syncbn.SyncBatchNorm(2), training)
    assert torch.equal(*grads)


@pytest.mark.parametrize("training", [True, False])
def test_trap_15_buffers_may_be_written_between_forward_and_backward(training):
    def step(layer):
        x = torch.randn(2, 2, 3, 3, requires_grad=True)
        y = layer.train(training)(x)
        layer.running_mean.mul_(1)  # as a broadcast of buffers does
        y.sum().backward()

    step(syncbn.SyncBatchNorm(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(nn.BatchNorm2d(2))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_trap_17_momentum_none_and_zero_equal_batch_norm(momentum):
    torch.manual_seed(17)
    layer, expected = syncbn.SyncBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    array = syncbn.numpy.SyncBatchNorm(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(5, 3) + 2
        layer(x), expected(x), array.forward(x.numpy())
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer, name), getattr(expected, name), **TIGHT)
            np.testing.assert_allclose(getattr(array, name), getattr(expected, name), **TIGHT)
    moved = (layer.running_mean - torch.zeros(3)).abs().min() > 0.01
    assert moved == (momentum != 0.0)


@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
        *[{"bias": False}] * ("bias" in signature(nn.BatchNorm2d).parameters),  # a keyword of newer releases of torch
    ],
    ids=lambda options: "-".join(options),
)
def test_trap_18_missing_parts_equal_batch_norm(options, dim):
    torch.manual_seed(18)
    layer, expected = syncbn.SyncBatchNorm(3, **options), BATCH_NORM[dim](3, **options)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    for training in (True, True, False):
        layer.train(training), expected.train(training)
        x = torch.randn((4, 3, 5, 2)[:dim]) + 1
        results = []
        for module in (layer, expected):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
            results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, **TIGHT)
        assert not torch.allclose(results[0][0], x, atol=0.1)


@pytest.mark.parametrize("dy_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("x_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 1, 3, 5), (3, 4, 1, 1), (1, 3, 2, 3, 5)], ids=str)
def test_trap_19_every_pair_of_memory_formats(shape, x_format, dy_format):
    xs, dys = batch(19, [shape, (2, *shape[1:])])
    results = run_ranks(torch_step, 2, "thread", xs, dys, "float32", None, (x_format, dy_format))
    assert_equals_whole_batch(results, xs, dys)


@pytest.mark.parametrize("format", ["contiguous", "channels_last"])
def test_trap_19_the_memory_format_is_kept(format):
    memory_format = getattr(torch, "contiguous_format" if format == "contiguous" else format)
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format).requires_grad_()
    y = syncbn.SyncBatchNorm(3)(x)
    y.backward(torch.randn(2, 3, 4, 5))
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("other", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_trap_20_state_dicts_pass_both_ways(other):
    torch.manual_seed(20)
    layer, theirs = syncbn.SyncBatchNorm(3), other(3)
    layer(torch.randn(4, 3, 2, 2) + 5)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    fresh = syncbn.SyncBatchNorm(3)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    array = syncbn.numpy.SyncBatchNorm(3)
    array.load_state_dict(theirs.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
        np.testing.assert_array_equal(array.state_dict()[name], value)
    assert list(array.state_dict()) == list(layer.state_dict())
    assert not torch.equal(fresh.running_mean, syncbn.SyncBatchNorm(3).running_mean)


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_trap_22_converted_layers_of_every_dimension_train_and_evaluate(dim):
    torch.manual_seed(22)
    expected = BATCH_NORM[dim](3)
    layer = syncbn.convert_sync_batchnorm(copy.deepcopy(expected))
    x = torch.randn((4, 3, 2, 3, 2)[:dim]) + 1
    torch.testing.assert_close(layer(x), expected(x), **TIGHT)
    layer.eval(), expected.eval()
    torch.testing.assert_close(layer(x), expected(x), **TIGHT)
    assert not torch.allclose(layer(x), layer.train()(x), atol=0.01)


def _in_sub_groups(rank, group, xs, dys):
    members = dist.new_group([0, 1])
    layer = torch_layer(3, "float32")
    layer.process_group = members
    return torch_step(rank, None, xs, dys, layer=layer)


def test_trap_28_a_rank_outside_the_group_gets_a_clear_error_and_the_others_finish():
    xs, dys = batch(28, [(2, 3, 4), (3, 3, 4), (1, 3, 4)])
    errors = rank_errors(_in_sub_groups, 3, "gloo", xs, dys)
    assert errors[:2] == [None, None]
    assert isinstance(errors[2], ValueError)
    assert "expected a process group that this process is in" in str(errors[2])


def _in_own_pair(rank, group, xs, dys):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = torch_layer(3, "float32")
    layer.process_group = pairs[rank // 2]
    return torch_step(rank, None, xs, dys, layer=layer)


def test_trap_28_sub_groups_normalise_by_themselves():
    xs, dys = batch(28, [(2, 3, 4), (3, 3, 4), (1, 3, 4), (4, 3, 4)])
    results = run_ranks(_in_own_pair, 4, "gloo", xs, dys)
    for pair in (slice(0, 2), slice(2, 4)):
        assert_equals_whole_batch(results[pair], xs[pair], dys[pair])
    with pytest.raises(AssertionError):
        assert_equals_whole_batch(results, xs, dys)


def _world_of_one(rank, group):
    x = torch.randn(4, 3, 5)
    layer = syncbn.SyncBatchNorm(3)
    return type(as_communicator(None)).__name__, (layer(x) - nn.BatchNorm1d(3)(x)).abs().max().item()


def test_trap_32_without_torch_distributed_and_with_one_rank_it_is_batch_norm():
    assert not dist.is_initialized()
    for kind, difference in (_world_of_one(0, None), *run_ranks(_world_of_one, 1, "gloo")):
        assert kind == "LocalCommunicator"  # which sends nothing
        assert difference < 1e-5
    with pytest.raises(ValueError, match=r"(?i)default process group"):
        dist.all_reduce(torch.ones(1))


def test_trap_32_a_launched_process_that_has_not_joined_the_others_is_warned(monkeypatch):
    # The environment of a process is looked at once.
    monkeypatch.setattr("syncbn.comm.torch._looked_for_a_launcher", False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(RuntimeWarning, match="launched as one of 2 processes, but torch.distributed is not initialised"):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
    syncbn.SyncBatchNorm(3, process_group=LocalCommunicator())(torch.randn(4, 3))
    syncbn.SyncBatchNorm(3).eval()(torch.randn(4, 3))
    monkeypatch.setenv("WORLD_SIZE", "1")
    syncbn.SyncBatchNorm(3)(torch.randn(4, 3))


def _copies(rank, group):
    layer = syncbn.SyncBatchNorm(2, process_group=dist.new_group([0, 1]))
    layer(torch.randn(4, 2))
    copied = copy.deepcopy(layer)
    assert copied.process_group is layer.process_group
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(loaded.running_mean, layer.running_mean)
        loaded.eval()(torch.randn(4, 2))
        loaded.train()
        with pytest.raises(RuntimeError, match="pickled with one"):
            loaded(torch.randn(4, 2))
        assert loaded.num_batches_tracked == 1
        loaded.process_group = None
        loaded(torch.randn(4, 2))
    return copied(torch.full((4, 2), float(rank))).mean().item()


def test_trap_34_copies_and_pickles_of_a_layer_with_a_group():
    means = run_ranks(_copies, 2, "gloo")
    assert means[0] == pytest.approx(-1, abs=1e-3)
    assert means[1] == pytest.approx(1, abs=1e-3)


def test_trap_34_layers_without_a_group_survive_pickling_unchanged():
    for layer in (syncbn.SyncBatchNorm(2), syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2))):
        loaded = pickle.loads(pickle.dumps(layer))
        assert loaded.process_group is None
        assert torch.isfinite(loaded(torch.randn(4, 2))).all()
    assert type(syncbn.revert_sync_batchnorm(loaded)) is nn.BatchNorm1d


def _wrong_channels(rank, group, shape):
    syncbn.SyncBatchNorm(4, process_group=group)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(8, 2, 3), (2, 8), (4, 3, 4), (4, 1)], ids=str)
def test_trap_35_a_view_with_the_wrong_number_of_channels_is_refused(shape):
    for error in rank_errors(_wrong_channels, 2, "thread", shape):
        assert isinstance(error, ValueError)
        assert f"expected an input with 4 channels on axis 1; got {shape[1]}" in str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_36_running_statistics_are_updated_in_place(dtype):
    layer = syncbn.SyncBatchNorm(2).to(dtype)
    views = [layer.running_mean.view(-1), layer.running_var.view(-1), layer.num_batches_tracked.view(1)]
    before = [view.clone() for view in views]
    layer(torch.randn(8, 2, dtype=dtype) * 3 + 5)
    for view, old, name in zip(views, before, ("running_mean", "running_var", "num_batches_tracked"), strict=True):
        assert not torch.equal(view, old)
        assert view.data_ptr() == getattr(layer, name).data_ptr()


def test_a_local_communicator_keeps_statistics_local():
    layer = syncbn.SyncBatchNorm(2, process_group=LocalCommunicator())
    assert torch.isfinite(layer(torch.randn(4, 2))).all()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 4, 2, 2)], ids=str)
@pytest.mark.parametrize("format", ["contiguous", "channels_last"])
def test_the_result_may_be_modified_in_place(shape, format):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if format == "channels_last" else x
    gradients = []
    for layer in (syncbn.SyncBatchNorm(3), BATCH_NORM[len(shape)](3)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y += 0.5 * leaf
        torch.relu_(y)
        y.square().sum().backward()
        gradients.append(leaf.grad)
        assert not leaf.grad._is_view()
    # 10 operations on elements forward and backward in float32, with sums over at most 40 terms.
    torch.testing.assert_close(*gradients, **rounding(torch.float32, 20, 40))
    assert gradients[0].abs().max() > 0.1


@pytest.mark.parametrize("shape", [(3, 5), (4, 5, 2, 3)], ids=str)
def test_evaluation_takes_parameters_with_gaps(shape):
    """Of which torch's own gradient of a two-dimensional input is wrong."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weight, bias = torch.rand(2, 10)[:, ::2]
    y = syncbn.functional.sync_batch_norm(x, torch.zeros(5), torch.ones(5), weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy * weight.view(1, 5, *[1] * (len(shape) - 2)) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("last", ["x", "dy"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (2, 3, 1, 5), (2, 3, 2, 1, 3)], ids=str)
def test_evaluation_takes_a_gradient_of_another_memory_format(shape, last):
    """Of which torch's own gradients are wrong where an axis of size 1 has a stride that says nothing."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape)
    channels_last = {"x": x, "dy": dy}[last].movedim(1, -1).contiguous().movedim(-1, 1)
    strides = [stride if size > 1 else 7 for stride, size in zip(channels_last.stride(), shape, strict=True)]
    channels_last = channels_last.as_strided(shape, strides)
    x, dy = (channels_last, dy) if last == "x" else (x, channels_last)
    layer = syncbn.SyncBatchNorm(3).eval()
    x.requires_grad_()
    y = layer(x)
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    assert y.is_contiguous(memory_format=order if last == "x" else torch.contiguous_format)
    dx, dweight = torch.autograd.grad(y, [x, layer.weight], dy)
    torch.testing.assert_close(dx, dy / (1 + 1e-5) ** 0.5)
    axes = (0, *range(2, len(shape)))
    torch.testing.assert_close(dweight, (dy * x).sum(axes) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_in_place_in_the_memory_of_the_negative(dtype, compiled, monkeypatch):
    """To which torch's copy between float32 and float16 writes the wrong sign."""
    if not compiled:
        monkeypatch.setattr(cpu, "_library", None)
    torch.manual_seed(0)
    x = torch.randn(64, 3).to(dtype)
    layer, other = (syncbn.SyncBatchNormAct(3, act="leaky_relu", inplace=inplace) for inplace in (True, False))
    negative = torch._neg_view(-x)
    with torch.no_grad():
        expected, found = other(x), layer(negative)
    assert found is negative
    torch.testing.assert_close(found.resolve_neg(), expected)
