"""Layers under torch.compile in one process: one graph, the results of eager mode, few compilations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from support.tolerances import rounding
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch_config

import syncbn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's own


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Counting:
    """A backend that counts the graphs it compiles."""

    def __init__(self, backend):
        self.compile, self.graphs = lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compile(graph, inputs)


class Block(nn.Module):
    """A layer behind an operation whose result may be overwritten, with the input, another tensor or no residual."""

    def __init__(self, layer, residual="none"):
        super().__init__()
        self.layer, self.residual = layer, residual
        with torch.no_grad():
            for v in (*layer.parameters(), *layer.buffers()):
                if v.is_floating_point():
                    v.uniform_(0.5, 1.5)

    def forward(self, x):
        z = x * 1
        residual = {"none": None, "same": z, "other": x * 2}[self.residual]
        return self.layer(z) if residual is None else self.layer(z, residual=residual)


# A step of `network`: two convolutions, two norms and an activation, of some 15 operations forward and 15 backward; the
# longest sums are of gradients of weights, over at most 9 pictures of 6 x 6.
ROUNDED = rounding(torch.float64, 30, 324)


def network(dtype=torch.float64):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), syncbn.SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 4, 1), syncbn.SyncBatchNormAct(4, "silu")
    )
    return model.to(dtype)


def pictures(*size):
    return torch.randn(size, dtype=torch.float64)


def step(model, x, context=nullcontext):
    """What comes out of one step: y, dx, the gradients of the parameters; and the buffers."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with context():
        y = model(x)
    y.float().sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], [b.clone() for b in model.buffers()]


def assert_as_eager(model, xs, backend="aot_eager", context=nullcontext, tolerance=None, same_buffers=True):
    """Asserts that the compiled model does what the model does in eager mode; returns the number of graphs."""
    alone, counting = copy.deepcopy(model), Counting(backend)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for x in xs:
        (found, buffers), (expected, wanted) = step(compiled, x, context), step(alone, x, context)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **tolerance or {})
        if same_buffers:
            assert all(torch.equal(a, b) for a, b in zip(buffers, wanted, strict=True)), "buffers"
        torch.testing.assert_close(buffers, wanted, **tolerance or {})
    assert not torch.equal(found[0], step(alone, xs[-1].square(), context)[0][0]) or not xs[-1].numel()
    return counting.graphs


RESIDUALS = ["none", "same", "other"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
def test_every_activation_with_and_without_residual(act, residual, training):
    model = Block(syncbn.SyncBatchNormAct(3, act), residual).train(training)
    assert assert_as_eager(model, [torch.randn(4, 3, 5, 5)]) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["none", "leaky_relu"])
def test_in_place_layers_are_compiled_out_of_place(act, training):
    model = Block(syncbn.SyncBatchNormAct(3, act, inplace=True).double()).train(training)
    x = pictures(4, 3, 5, 5)
    # In eager mode backward recovers the input from the result, with the roundoff of that: 3 operations more.
    assert assert_as_eager(model, [x], tolerance=rounding(torch.float64, 18, 100)) == 1
    kept = x.clone()
    torch.compile(model.layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(x, kept)


def test_inductor():
    assert (
        assert_as_eager(Block(syncbn.SyncBatchNormAct(3, "relu"), "same"), [torch.randn(4, 3, 5, 5)], "inductor") == 1
    )


@pytest.mark.parametrize("training", [True, False])
def test_inductor_compiles_a_network(training):
    model = nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4), nn.Linear(4, 3)).double().train(training)
    assert assert_as_eager(model, [pictures(5, 3)], "inductor", tolerance=ROUNDED) == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="inductor then keeps the layout")
def test_inductor_gives_layers_what_convolutions_return_without_a_copy(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8), nn.Conv2d(8, 8, 3), syncbn.SyncBatchNorm(8))
    seen = []

    def spy(operator, position):
        original = operator._op

        def call(*arguments, **named):
            if not torch._C._len_torch_dispatch_stack():  # and not while it is traced
                seen.append(arguments[position])
            return original(*arguments, **named)

        monkeypatch.setattr(operator, "_op", call)

    spy(torch.ops.syncbn.forward.default, 0)
    spy(torch.ops.syncbn.backward.default, 1)
    # In float32, which mkldnn takes; gradients of weights are sums over 4 pictures of 7 x 7.
    tolerance = rounding(torch.float32, 30, 196)
    assert_as_eager(model, [torch.randn(4, 3, 9, 9)], "inductor", tolerance=tolerance, same_buffers=False)
    assert len(seen) == 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


LAYERS = {
    "momentum_None": {"momentum": None},
    "no_running_statistics": {"track_running_stats": False},
    "no_affine": {"affine": False},
    "no_bias": {"bias": False},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", LAYERS)
def test_layers_of_every_kind(options, training):
    model = Block(syncbn.SyncBatchNorm(3, **LAYERS[options])).train(training)
    xs = [torch.randn(4, 3, 5).to(LAYERS[options].get("dtype")) for _ in range(2)]
    assert assert_as_eager(model, xs) == 1


def test_evaluation_after_running_statistics_were_deleted():
    model = Block(syncbn.SyncBatchNorm(3)).eval()
    model.layer.running_mean = model.layer.running_var = None
    assert assert_as_eager(model, [torch.randn(4, 3, 5)]) == 1


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "transposed": lambda x: x.mT,
    "channels_inside": lambda x: x.permute(2, 1, 3, 0),
    "one_pixel": lambda x: x[..., :1, :1],
    "one_pixel_channels_last": lambda x: x[..., :1, :1].to(memory_format=torch.channels_last),
    "no_pixels": lambda x: x[..., 0, 0],
    "half": lambda x: x.half(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_every_layout(layout, training):
    model = syncbn.SyncBatchNorm(3).train(training)
    assert assert_as_eager(model, [LAYOUTS[layout](torch.randn(4, 3, 5, 6))]) == 1


def test_a_negative_view():
    layer = syncbn.SyncBatchNormAct(3, "silu")
    expected = copy.deepcopy(layer)(-(x := torch.randn(4, 3, 5)))
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(torch._neg_view(x)), expected)


SIZES = {
    "batches": [(4, 3, 6, 6), (5, 3, 6, 6), (6, 3, 6, 6), (9, 3, 6, 6)],
    "pictures": [(2, 3, 4, 5), (2, 3, 5, 6), (2, 3, 6, 7), (2, 3, 9, 8)],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_change_without_a_compilation_each(sizes, training):
    xs, model = [pictures(*size) for size in SIZES[sizes]], network().train(training)
    assert assert_as_eager(model, xs, tolerance=ROUNDED) == 2


def test_a_batch_may_become_empty():
    model = Block(syncbn.SyncBatchNormAct(3, "relu"), "other")
    assert_as_eager(model, [torch.randn(n, 3, 5) for n in (4, 0, 5, 0)])
    assert model.layer.num_batches_tracked == 2, "an empty global batch counts for nothing"


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert assert_as_eager(network(torch.float32).train(training), [torch.randn(4, 3, 6, 6)], context=context) == 1


class Functional(nn.Module):
    """The function in place of a layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(3)), self.register_buffer("var", torch.rand(3))

    def forward(self, x):
        vectors = self.mean, self.var, self.weight, self.bias
        return syncbn.functional.sync_batch_norm(x, *vectors, training=self.training)


@pytest.mark.parametrize("training", [True, False])
def test_the_function(training):
    assert assert_as_eager(Functional().train(training), [torch.randn(4, 3, 5)]) == 1


def test_a_frozen_layer():
    model = network()
    model[1].eval().requires_grad_(False)
    before = copy.deepcopy(model[1].state_dict())
    alone, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
    x = pictures(4, 3, 6, 6)
    compiled(x).sin().sum().backward(), alone(x).sin().sum().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **ROUNDED)
    assert all(torch.equal(v, before[name]) for name, v in model[1].state_dict().items())
    assert model[4].num_batches_tracked == alone[4].num_batches_tracked == 1


class Scaled(nn.Module):
    """A network with its loss, scaled by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return syncbn.scale_loss(self.network(x).square().mean(), len(x))


def test_scale_loss():
    assert assert_as_eager(Scaled(), [pictures(n, 3, 6, 6) for n in (4, 5, 6, 7)], tolerance=ROUNDED) == 2


@pytest.mark.parametrize("size", ["four", -1, float("nan")])
def test_scale_loss_refuses_nonsense(size):
    scale = torch.compile(syncbn.scale_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="expected a batch_size of at least 0"):
        scale(torch.tensor(1.0), size)


def test_the_channels_are_checked_when_a_graph_runs():
    layer = torch.compile(syncbn.SyncBatchNorm(3), backend="aot_eager", fullgraph=True)
    layer(torch.randn(4, 3, 5))
    for x in (torch.randn(4, 5, 5), torch.ones(4, 3, 5, dtype=torch.int32)):
        with pytest.raises((TypeError, ValueError), match="expected an input"):
            layer(x)


def in_two_graphs(model, compiled):
    return nn.Sequential(compiled(model[:3]), compiled(model[3:]))


def called_twice(model, compiled):
    graph = compiled(model)
    return lambda x: graph(x) + graph(x.flip(0))


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("arranged", [in_two_graphs, called_twice])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@functorch_config.patch(donated_buffer=False)  # for retain_graph
def test_backward_through_several_calls_of_graphs(arranged):
    model, x = network(), pictures(4, 3, 6, 6)
    alone = copy.deepcopy(model)
    for loss in (arranged(model, compiled)(x).sin().sum(), arranged(alone, lambda m: m)(x).sin().sum()):
        loss.backward(retain_graph=True), loss.backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **ROUNDED)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend):
    model = network()
    alone = copy.deepcopy(model)

    def train(model, x):
        model(x).square().sum().backward()

    compiled = torch.compile(train, backend=backend)
    for n in (4, 5, 6):
        x = pictures(n, 3, 8, 8)
        train(alone, x)
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(model, x)
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **rounding(torch.float64, 30, 3 * 384))
