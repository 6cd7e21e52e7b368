"""Masks: P ranks equal one process on the valid positions of all of them; bad masks are errors on every rank."""

import numpy as np
import pytest
import torch
from support.masks import (
    MASKED_STEPS,
    assert_masked_parity,
    gathered,
    mask_of,
    masked_batch,
    mean_of_means_step,
    spoilt,
    torch_masked_step,
    worst_of,
)
from support.ranks import rank_errors, run_ranks
from support.steps import assert_equals_whole_batch, torch_step

import syncbn
import syncbn.numpy
from syncbn.arguments import full_mask
from syncbn.functional import sync_batch_norm

# Batch sizes of the ranks, with their masks.
SPLITS = {
    "one": ([4], ["random"]),
    "one_padded": ([4], ["padding"]),
    "two": ([3, 2], ["random", "padding"]),
    "two_none_here": ([3, 2], ["random", None]),
    "three_nothing_here": ([2, 3, 4], ["padding", "nothing", "random"]),
    "three_empty": ([2, 0, 4], [None, "random", "all"]),
}


@pytest.mark.parametrize("step", MASKED_STEPS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_trap_25_ranks_equal_the_gathered_valid_positions(step, split, dtype):
    assert_masked_parity("thread", *SPLITS[split], step, dtype)


@pytest.mark.parametrize("format", ["channels_last", "strided"])
@pytest.mark.parametrize("split", ["two", "three_nothing_here"])
def test_memory_formats_equal_the_gathered_valid_positions(split, format):
    assert_masked_parity("thread", *SPLITS[split], torch_masked_step, "float32", format)


@pytest.mark.parametrize("step", MASKED_STEPS)
def test_processes_over_gloo_equal_the_gathered_valid_positions(step):
    assert_masked_parity("gloo", *SPLITS["two_none_here"], step)


def test_trap_25_the_mean_of_masked_means_differs():
    """The negative control: what others compute."""
    sizes, kinds = SPLITS["two"]
    worst = worst_of(mean_of_means_step, sizes, kinds)
    assert all(worst[name] > 1000 for name in ("y", "dx", "grad_weight", "running_mean", "running_var")), worst
    with pytest.raises(AssertionError, match="times as far from the truth"):
        assert_masked_parity("thread", sizes, kinds, mean_of_means_step)


def test_trap_25_zeros_in_place_of_a_mask_differ():
    sizes, kinds = SPLITS["two"]
    xs, dys, masks, *valid = masked_batch(sizes, kinds, "float32")
    filled = ([np.where(m, v, 0) for v, m in zip(vs, masks, strict=True)] for vs in (xs, dys))
    results = run_ranks(torch_step, 2, "thread", *filled)
    for result, mask in zip(results, masks, strict=True):
        result |= {name: gathered(result[name], mask) for name in ("y", "dx")}
    with pytest.raises(AssertionError, match="times as far from the truth"):
        assert_equals_whole_batch(results, *valid)


@pytest.mark.parametrize("frontend", ["torch", "numpy"])
def test_a_batch_masked_on_all_ranks_changes_nothing(frontend):
    def step(rank, group):
        x, mask = np.full((2, 3, 4), np.nan, np.float32), np.zeros((2, 1, 4), bool)
        if frontend == "numpy":
            layer = syncbn.numpy.SyncBatchNorm(3, comm=group)
            y = layer.forward(x, mask)
            dx = layer.backward(x)
            gradients = layer.grad_weight, layer.grad_bias
        else:
            layer = syncbn.SyncBatchNorm(3, process_group=group)
            leaf = torch.from_numpy(x).requires_grad_()
            y = layer(leaf, torch.from_numpy(mask))
            y.backward(torch.from_numpy(x))
            y, dx, gradients = y.detach(), leaf.grad, (layer.weight.grad, layer.bias.grad)
        assert all((np.asarray(v) == 0).all() for v in (y, dx, *gradients))
        assert (np.asarray(layer.running_mean) == 0).all()
        assert (np.asarray(layer.running_var) == 1).all()
        return int(layer.num_batches_tracked)

    assert run_ranks(step, 2, "thread") == [0, 0]


def test_one_valid_position_over_all_ranks_is_an_error_on_every_rank():
    def step(rank, group):
        mask = torch.zeros(2, 1, 4, dtype=torch.bool)
        mask[1, 0, 2] = rank == 1
        syncbn.SyncBatchNorm(3, process_group=group)(torch.randn(2, 3, 4), mask)

    for error in rank_errors(step, 3, "thread"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            raise error


@pytest.mark.parametrize("frontend", ["torch", "numpy"])
def test_evaluation_is_0_elsewhere_and_reads_nothing_there(frontend):
    x, dy, mask = (v[0] for v in masked_batch([3], ["random"], "float32")[:3])
    results = []
    for given in (None, mask):  # without a mask, but of finite numbers
        a, b = (spoilt(v, given).astype(np.float32) for v in (x, np.where(mask, dy, 0)))
        if frontend == "numpy":
            layer = syncbn.numpy.SyncBatchNorm(3).eval()
            layer.running_mean += 0.5
            y, dx = layer.forward(a, given), layer.backward(b)
            results.append([y, dx, layer.grad_weight, layer.grad_bias])
        else:
            layer = syncbn.SyncBatchNorm(3).eval()
            layer.running_mean += 0.5
            leaf = torch.from_numpy(a).requires_grad_()
            y = layer(leaf, None if given is None else torch.from_numpy(given))
            y.backward(torch.from_numpy(b))
            results.append([v.detach().numpy() for v in (y, leaf.grad, layer.weight.grad, layer.bias.grad)])
    unmasked, masked = results
    unmasked[:2] = [np.where(mask, v, 0) for v in unmasked[:2]]
    for found, expected in zip(masked, unmasked, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("inplace", [False, True])
def test_activation_and_residual(training, act, inplace):
    """As without a mask where there are no pads; y and all gradients are 0 elsewhere, also that of the residual."""
    if inplace and act not in ("none", "leaky_relu"):
        return  # such a layer cannot be
    x, dy, mask = (v[0] for v in masked_batch([3], ["random"], "float32")[:3])
    mask_, x_, dy_, r_ = (torch.from_numpy(v) for v in (mask, spoilt(x, mask), spoilt(dy, mask), spoilt(dy + 1, mask)))
    layer = syncbn.SyncBatchNormAct(3, act, inplace, dtype=torch.float64).train(training)
    valid = torch.from_numpy(gathered(x, mask))
    plain = syncbn.SyncBatchNormAct(3, act, inplace, dtype=torch.float64).train(training)
    for residual in [None] if inplace else [None, r_]:
        leaf = x_.clone().requires_grad_()
        r = None if residual is None else residual.clone().requires_grad_()
        y = layer(leaf * 1, r, mask=mask_)
        y.backward(dy_)
        start = valid.clone().requires_grad_()
        s = None if residual is None else torch.from_numpy(gathered(residual, mask)).requires_grad_()
        expected = plain(start * 1, s)
        expected.backward(torch.from_numpy(gathered(dy_, mask)))
        pairs = [(y.detach(), expected.detach()), (leaf.grad, start.grad)]
        for found, whole in pairs + ([] if r is None else [(r.grad, s.grad)]):
            np.testing.assert_allclose(gathered(found, mask), whole, rtol=1e-9, atol=1e-9)
            assert not found[~mask_.expand_as(found)].any()
    for of, whole in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(of.grad, whole.grad, rtol=1e-9, atol=1e-9)


SHAPES = [(4, 1, 5, 6), (4, 5, 6), (1, 1, 1, 6), (5, 6), (6,), (1,), (), (4, 1, 1, 1), (4, 1, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_shapes_that_a_mask_may_have(shape, library):
    rng = np.random.default_rng(0)
    x, mask = np.zeros((4, 3, 5, 6)), np.array(rng.random(shape) < 0.5)
    expected = np.broadcast_to(mask[:, None] if shape == (4, 5, 6) else mask, (4, 1, 5, 6))
    if library == "torch":
        x, mask = torch.from_numpy(x), torch.from_numpy(mask)
    found = full_mask(mask, x)
    assert tuple(found.shape) == (4, 1, 5, 6)
    assert (np.asarray(found) == expected).all()
    assert library == "numpy" or found.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


def test_a_mask_of_samples_for_an_input_without_spatial_axes():
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    assert full_mask(mask, x).tolist() == [[True], [False], [True], [True]]


def t(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


BAD_MASKS = {
    "channels": (t(2, 4, 3), ValueError, r"expected a mask of shape \(N, 1, \*\).*\(2, 4, 3\); got \(2, 4, 3\)"),
    "batch": (t(3, 3), ValueError, r"got \(3, 3\)"),
    "spatial": (t(2, 1, 5), ValueError, r"got \(2, 1, 5\)"),
    "axes": (t(1, 2, 1, 3), ValueError, r"got \(1, 2, 1, 3\)"),
    "float": (t(2, 1, 3, dtype=torch.float32), TypeError, "expected mask of dtype bool.*got torch.float32"),
    "uint8": (t(2, 1, 3, dtype=torch.uint8), TypeError, "expected mask of dtype bool.*got torch.uint8"),
    "device": (t(2, 1, 3, device="meta"), ValueError, "mask on the input's device, cpu; got .* on meta"),
    "sparse": (t(2, 1, 3).to_sparse(), ValueError, "got torch.sparse_coo"),
    "ndarray": (np.ones((2, 1, 3), bool), TypeError, "expected mask to be a torch.Tensor of bool.*got ndarray"),
    "list": ([True], TypeError, "got list"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
@pytest.mark.parametrize("way", ["layer", "functional", "operator"])
def test_a_bad_mask_on_one_rank_is_an_error_on_every_rank(name, way):
    bad, kind, message = BAD_MASKS[name]
    if way == "operator" and name in ("ndarray", "list", "device", "sparse"):
        return  # these are for torch's dispatcher

    def forward(rank, group):
        layer, x = syncbn.SyncBatchNorm(4, process_group=group), torch.randn(2, 4, 3)
        mask = bad if rank == 1 else None
        try:
            if way == "layer":
                layer(x, mask)
            elif way == "functional":
                buffers = layer.running_mean, layer.running_var
                sync_batch_norm(x, *buffers, training=True, process_group=group, mask=mask)
            else:
                arguments = x, None, None, None, mask, None, None, None, 4, 0.1, 1e-5, "none", 0.0
                torch.ops.syncbn.norm(*arguments, layer._syncbn_group.name, "", 3)
        finally:
            assert (layer.running_mean == 0).all()
            assert layer.num_batches_tracked == 0

    other, own = rank_errors(forward, 2, "thread")
    assert "another rank refused its input" in str(other)
    assert type(own) is kind
    with pytest.raises(kind, match=message):
        raise own


@pytest.mark.parametrize("bad", [np.ones((2, 4, 3), bool), np.ones((2, 1, 3)), t(2, 1, 3), [True]])
def test_a_bad_mask_of_the_numpy_layer_is_an_error_on_every_rank(bad):
    def forward(rank, group):
        x = np.ones((2, 4, 3), np.float32)
        syncbn.numpy.SyncBatchNorm(4, comm=group).forward(x, bad if rank == 1 else None)

    other, own = rank_errors(forward, 2, "thread")
    assert "another rank refused its input" in str(other)
    assert type(own) in (TypeError, ValueError)
    assert "expected" in str(own)
    assert "mask" in str(own)


def test_in_evaluation_a_bad_mask_is_an_error_too():
    for layer in (syncbn.SyncBatchNorm(4).eval(), syncbn.SyncBatchNorm(4, track_running_stats=False).eval()):
        with pytest.raises(ValueError, match="expected a mask of shape"):
            layer(torch.randn(2, 4, 3), t(3, 3))


def test_a_mask_that_was_modified_before_backward_is_an_error():
    mask = torch.from_numpy(mask_of("random", 2, (4,)))
    y = syncbn.SyncBatchNorm(3)(torch.randn(2, 3, 4, requires_grad=True), mask)
    mask[0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
