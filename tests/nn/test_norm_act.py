"""SyncBatchNormAct: the layer, the residual and the activation in one, with and without in-place work."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support.ranks import rank_errors, run_ranks
from support.steps import DTYPES, batch, in_format, parameters
from torch import nn

import syncbn
from syncbn.comm import LocalCommunicator

FUNCTIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.125),
    "silu": F.silu,
}
ACTS = list(FUNCTIONS)
VARIANTS = [(act, False, False) for act in ACTS] + [(act, True, False) for act in ACTS]
VARIANTS += [(act, False, True) for act in ("none", "leaky_relu")]


def layer_of(c, act, inplace=False, dtype=torch.float64, group=None):
    layer = syncbn.SyncBatchNormAct(c, act, inplace, 0.125, process_group=group, dtype=dtype)
    weight, bias = parameters(c)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight) * torch.tensor([1, -1] * c)[:c])
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def composed(layer, x, residual, act):
    """What the layer is to compute, of separate operations."""
    norm = syncbn.SyncBatchNorm(layer.num_features, process_group=layer.process_group, dtype=layer.weight.dtype)
    norm.load_state_dict(layer.state_dict())
    z = norm(x)
    return norm, FUNCTIONS[act](z if residual is None else z + residual)


def step(layer, x, residual, dy, act=None):
    """One forward and backward, of the layer or (given act) of what it stands for; all that comes out."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    if act is None:
        y = layer(x * 1) if residual is None else layer(x * 1, residual)
    else:
        layer, y = composed(layer, x, residual, act)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    found |= {"grad_residual": None if residual is None else residual.grad}
    return found | {name: b.double() for name, b in layer.named_buffers()}


@pytest.mark.parametrize(("act", "with_residual"), [v[:2] for v in VARIANTS if not v[2]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("format", ["contiguous", "channels_last", "strided"])
def test_the_layer_is_the_same_bits_as_separate_operations(act, with_residual, dtype, format):
    torch.manual_seed(0)
    x, residual, dy = (in_format(torch.randn(5, 6, 7, 9, dtype=DTYPES[dtype]), format) for _ in range(3))
    layer = layer_of(6, act, dtype=DTYPES[dtype])
    residual = residual if with_residual else None
    expected = step(layer, x, residual, dy, act)
    found = step(layer, x, residual, dy)
    # silu's own arithmetic is another than torch's; its sums over 315 elements.
    u = torch.finfo(DTYPES[dtype]).eps
    tolerance = {"rtol": 16 * u, "atol": 16 * u * 18} if act == "silu" else {"rtol": 0, "atol": 0}
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def _rank_step(rank, group, xs, residuals, dys, variant):
    act, with_residual, inplace = variant
    layer = layer_of(xs[0].shape[1], act, inplace, group=group)
    residual = torch.from_numpy(residuals[rank]) if with_residual else None
    return step(layer, torch.from_numpy(xs[rank]), residual, torch.from_numpy(dys[rank]))


def whole(xs, residuals, dys, variant):
    """One process, of torch's own operations, on the concatenated batch."""
    act, with_residual, _ = variant
    ours = layer_of(xs[0].shape[1], act)
    norm = nn.BatchNorm2d(xs[0].shape[1], dtype=torch.float64)
    norm.load_state_dict(ours.state_dict())
    x, residual = (torch.cat([torch.from_numpy(v) for v in parts]).requires_grad_() for parts in (xs, residuals))
    y = FUNCTIONS[act](norm(x) + residual if with_residual else norm(x))
    y.backward(torch.cat([torch.from_numpy(v) for v in dys]))
    return {"y": y.detach(), "dx": x.grad, "grad_residual": residual.grad if with_residual else None}, norm


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("sizes", [[3, 3], [4, 0, 1], [2, 1, 0, 3, 1, 0, 2]], ids=str)
def test_ranks_equal_one_on_the_whole_batch(variant, sizes):
    shapes = [(n, 3, 4, 5) for n in sizes]
    xs, dys = batch(4, shapes, "float64")
    residuals, _ = batch(5, shapes, "float64")
    results = run_ranks(_rank_step, len(sizes), "thread", xs, residuals, dys, variant)
    expected, norm = whole(xs, residuals, dys, variant)
    # Terms of order 10 in sums of 200 float64: 1e-12 leaves a factor of 30.
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(torch.cat([r[name] for r in results]), value, rtol=1e-12, atol=1e-12)
    for name, parameter in (("grad_weight", norm.weight), ("grad_bias", norm.bias)):
        torch.testing.assert_close(sum(r[name] for r in results), parameter.grad, rtol=1e-12, atol=1e-12)
    for result in results:
        torch.testing.assert_close(result["running_mean"], norm.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["running_var"], norm.running_var, rtol=1e-12, atol=1e-12)
        assert result["num_batches_tracked"] == 1


def test_without_synchronisation_ranks_differ_from_the_whole_batch():
    """The negative control of the test above."""
    xs, dys = batch(4, [(3, 3, 4, 5)] * 2, "float64")
    parts = [_rank_step(rank, LocalCommunicator(), xs, xs, dys, VARIANTS[1]) for rank in range(2)]
    expected, _ = whole(xs, xs, dys, VARIANTS[1])
    for name in ("y", "dx"):
        assert (torch.cat([p[name] for p in parts]) - expected[name]).abs().max() > 1e-3


@pytest.mark.parametrize("act", ["none", "leaky_relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["contiguous", "channels_last", "strided"])
def test_in_place_is_the_ordinary_path_to_within_roundoff(act, dtype, format):
    torch.manual_seed(1)
    shape, u = (6, 4, 7, 9), torch.finfo(DTYPES[dtype]).eps / 2
    x, dy = (in_format(torch.randn(shape).to(DTYPES[dtype]), format) for _ in range(2))
    ordinary, inplace = (layer_of(4, act, flag, torch.float32) for flag in (False, True))
    expected, found = step(ordinary, x, None, dy), step(inplace, x, None, dy)
    for name in ("y", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[name], expected[name]), name
    # z is known to its roundoff (leaky_relu inverted: 3), and (z - bias) / weight to that, divided by the weight.
    weight, bias = (v.detach().double().reshape(1, -1, 1, 1) for v in (ordinary.weight, ordinary.bias))
    v, g = x.double(), dy.double()
    invstd = (v.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).rsqrt()
    xhat = (v - v.mean((0, 2, 3), keepdim=True)) * invstd
    z = xhat * weight + bias
    xhat_off = 4 * (u + 2.0**-24) * (abs(z) + abs(bias)) / abs(weight)
    if act == "leaky_relu":
        g = torch.where(z > 0, g, 0.125 * g)
    grad_weight_off = (abs(g) * xhat_off).sum((0, 2, 3))
    assert ((found["grad_weight"] - expected["grad_weight"]).abs() <= grad_weight_off + 1e-5).all()
    slope = abs((g * xhat).mean((0, 2, 3), keepdim=True)) + (abs(g) * xhat_off).mean((0, 2, 3), keepdim=True)
    dx_off = abs(weight) * invstd * (xhat_off * slope + abs(xhat) * (abs(g) * xhat_off).mean((0, 2, 3), keepdim=True))
    dx = expected["dx"].double()
    assert ((found["dx"].double() - dx).abs() <= dx_off + 2 * u * abs(dx) + 1e-5).all()


def test_in_place_overwrites_the_input_and_saves_nothing_else():
    saved = {}
    x = torch.randn(8, 4, 6, 6)

    def note(t):
        saved[t.data_ptr()] = t.numel()
        return t

    for inplace, act, residual in ((False, "relu", False), (True, "leaky_relu", False), (False, "relu", True)):
        saved.clear()
        leaf, other = x.clone().requires_grad_(), x.clone()
        own = leaf * 1
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = layer_of(4, act, inplace, torch.float32)(*((own, other) if residual else (own,)))
        large = {address for address, numel in saved.items() if numel == x.numel()}
        # With a residual the result, which whatever comes next keeps as well.
        assert large == {own.data_ptr()} | ({y.data_ptr()} if residual else set())
        assert (y.data_ptr() == own.data_ptr()) == inplace


def test_in_place_with_weights_of_zero_trains_them():
    torch.manual_seed(2)
    x, dy = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)
    results = []
    for inplace in (False, True):
        layer = syncbn.SyncBatchNormAct(3, "none", inplace)
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
        results.append(step(layer, x, None, dy))
    expected, found = results
    assert (found["y"] - expected["y"]).abs().max() <= 2.0**-17 * 6  # the largest of the normalised values is below 6
    # Where the bias is 1, x is known to 2^-24 / 2^-17 standard deviations; rounding is independent between elements.
    count = x[:, 0].numel()
    assert (found["grad_weight"] - expected["grad_weight"])[0].abs() <= 1e-3
    assert (found["grad_weight"] - expected["grad_weight"]).abs().max() <= 2.0**-7 * 6 * count**0.5
    assert found["dx"].abs().max() <= 2.0**-17 * 60
    assert all(v is None or torch.isfinite(v).all() for v in found.values())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_evaluation_is_separate_operations_and_differentiable(act, with_residual):
    torch.manual_seed(3)
    layer = layer_of(6, act)
    layer(torch.randn(8, 6, 3, 3, dtype=torch.float64))
    layer.eval()
    layer.process_group = None
    x, residual = (torch.randn(5, 6, 7, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    arguments = (x, residual) if with_residual else (x,)
    norm = nn.BatchNorm2d(6, dtype=torch.float64).eval()
    norm.load_state_dict(layer.state_dict())
    before = residual.detach().clone()
    y, expected = layer(*arguments), FUNCTIONS[act](norm(x) + residual if with_residual else norm(x))
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), arguments)
    expected_gradients = torch.autograd.grad(expected.square().sum(), arguments)
    torch.testing.assert_close(gradients, expected_gradients)
    assert torch.equal(residual, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "gelu"}, "expected act to be one of none, relu, leaky_relu, silu; got 'gelu'"),
        ({"act": "relu", "inplace": True}, "expected an act that can be inverted, .*; got 'relu'"),
        ({"act": "leaky_relu", "negative_slope": -0.1}, "negative_slope of at least 0; got -0.1"),
        ({"act": "leaky_relu", "negative_slope": 0.0, "inplace": True}, "at least 2\\^-10 with inplace=True; got 0.0"),
        ({"act": "leaky_relu", "negative_slope": float("nan")}, "negative_slope"),
    ],
)
def test_what_the_layer_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNormAct(3, **options)


def inference_tensor():
    with torch.inference_mode():
        return torch.randn(4, 3, 5, 5)


def leaf():
    return torch.randn(4, 3, 5, 5, requires_grad=True)


RESIDUALS = {
    "shape": lambda: torch.randn(4, 3, 5, 1),
    "dtype": lambda: torch.randn(4, 3, 5, 5).double(),
    "type": lambda: [1.0],
    "sparse": lambda: torch.randn(4, 3, 5, 5).to_sparse(),
    "inference": inference_tensor,
}
IN_PLACE = {
    "leaf": leaf,
    "view_of_a_leaf": lambda: leaf().view(4, 3, 25),
    "one_of_several_views": lambda: (torch.randn(4, 6, 5, 5, requires_grad=True) * 1).chunk(2, 1)[0],
    "expanded": lambda: torch.randn(1, 3, 5, 5).expand(4, 3, 5, 5),
    "overlapping": lambda: torch.randn(200).as_strided((4, 3, 5, 5), (1, 20, 5, 1)),
    "inference_in_place": inference_tensor,
}


def _wrong_on_rank_1(rank, group, wrong):
    layer = layer_of(3, "none", wrong in IN_PLACE, torch.float32, group)
    before = copy.deepcopy(layer.state_dict())
    x, residual = torch.randn(4, 3, 5, 5), None
    if rank == 1:
        x = IN_PLACE[wrong]() if wrong in IN_PLACE else x
        residual = RESIDUALS[wrong]() if wrong in RESIDUALS else None
    if rank == 1 and wrong == "act":
        layer.act = "gelu"
    values = x.detach().clone()
    try:
        layer(x, residual)
    finally:
        assert all(torch.equal(v, before[name]) for name, v in layer.state_dict().items())
        assert torch.equal(x, values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("shape", r"ValueError: \[rank 1/2\] expected a residual of the input's shape, .* got \(4, 3, 5, 1\)"),
        ("dtype", r"ValueError: \[rank 1/2\] expected a residual .* got .*float64"),
        ("type", r"TypeError: \[rank 1/2\] expected residual to be a dense torch.Tensor; got list"),
        (
            "sparse",
            r"TypeError: \[rank 1/2\] expected residual to be a dense torch.Tensor; got a torch.sparse_coo tensor",
        ),
        ("inference", r"ValueError: \[rank 1/2\] expected an input and a residual that autograd can save"),
        ("act", r"ValueError: \[rank 1/2\] expected act to be one of none, .*; got 'gelu'"),
        *((name, r"ValueError: \[rank 1/2\] expected an input that may be overwritten; got") for name in IN_PLACE),
    ],
)
def test_what_one_rank_refuses_raises_on_all(wrong, message):
    errors = rank_errors(_wrong_on_rank_1, 2, "thread", wrong)
    assert len(errors) == 2
    assert re.match(message, f"{type(errors[1]).__name__}: {errors[1]}")
    assert "another rank refused its input" in str(errors[0])


@pytest.mark.parametrize("training", [True, False])
def test_residuals_are_refused_alike_in_training_and_evaluation(training):
    x = torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match="expected no residual in place"):
        syncbn.SyncBatchNormAct(3, "none", inplace=True).train(training)(x, x.clone())
    for residual in (torch.randn(3, 1, 1), x.double(), 1.0):
        with pytest.raises((TypeError, ValueError), match=r"expected (a )?residual"):
            syncbn.SyncBatchNormAct(3).train(training)(x, residual)


def test_evaluation_never_overwrites_the_input():
    x = torch.randn(4, 3)
    before = x.clone()
    syncbn.SyncBatchNormAct(3, "none", inplace=True, track_running_stats=False).eval()(x)
    assert torch.equal(x, before)


def test_a_layer_that_is_made_invalid_says_so():
    layer = syncbn.SyncBatchNormAct(3, "relu")
    layer.inplace = True
    for mode in (True, False):
        with pytest.raises(ValueError, match="expected an act that can be inverted"):
            layer.train(mode)(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    with pytest.raises(TypeError, match="expected negative_slope to be a number; got str"):
        syncbn.SyncBatchNormAct(3, "leaky_relu", negative_slope="0.1")


def test_nan_is_not_hidden_by_relu():
    x, residual = torch.randn(6, 2, 3), torch.randn(6, 2, 3, requires_grad=True)
    x[0, 0, 0] = float("nan")
    layer = syncbn.SyncBatchNormAct(2)
    layer(x, residual).square().sum().backward()
    assert residual.grad[:, 0].isnan().all()
    assert layer.bias.grad[0].isnan()
    assert torch.isfinite(residual.grad[:, 1]).all()


def test_the_layer_says_what_it_is_and_survives_copies():
    layer = syncbn.SyncBatchNormAct(3, "leaky_relu", inplace=True)
    assert repr(layer) == (
        "SyncBatchNormAct(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "act='leaky_relu', negative_slope=0.01, inplace=True)"
    ) or "bias=" not in repr(nn.SyncBatchNorm(3))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        torch.manual_seed(0)
        assert torch.equal(twin(torch.randn(4, 3)), layer((torch.manual_seed(0), torch.randn(4, 3))[1]))
    nn.SyncBatchNorm(3).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("shape", [(3, 8, 0, 1), (3, 8, 0, 0), (0, 8, 4)])
def test_nothing_may_be_overwritten_in_place(shape):
    # A step along an axis of size 1 or more would seem to stay within one of size 0.
    x = torch.zeros(shape, requires_grad=True)
    layer = syncbn.SyncBatchNormAct(8, "leaky_relu", inplace=True)
    layer(x * 1).sum().backward()
    assert x.grad.shape == x.shape
