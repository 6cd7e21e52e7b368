"""torch.export, make_fx, AOTAutograd and ONNX: of training and of evaluation, with the numbers of the model."""

import copy
import io

import pytest
import torch
from functorch.compile import aot_function, aot_module, nop
from support.tolerances import rounding
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
# A step of `Model`: two convolutions, three norms and three activations, of some 25 operations forward and 25 backward;
# the longest sums are of gradients of weights, over at most 7 pictures of 5 x 5.
ROUNDED = rounding(torch.float64, 50, 175)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


class Model(nn.Module):
    """Convolutions and layers, with a residual and all activations."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.plain = syncbn.SyncBatchNorm(6, **options)
        self.relu = syncbn.SyncBatchNormAct(6, "relu", **options)
        self.silu = syncbn.SyncBatchNormAct(6, "silu", **options)
        with torch.no_grad():
            for v in (*self.parameters(), *self.buffers()):
                if v.is_floating_point():
                    v.uniform_(0.5, 1.5)
        self.double()

    def forward(self, x):
        z = self.plain(self.first(x))
        return self.silu(self.relu(self.second(z), residual=z).sin())


def batch(n=4, seed=1):
    return torch.randn(n, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_state(found, expected):
    """Running statistics the same bits; torch.export forgets of some buffers that no graph reads."""
    for name, v in expected.items():
        assert name not in found or torch.equal(found[name], v), name


def operators_of(graph):
    return sorted({str(node.target) for node in graph.nodes if "syncbn" in str(node.target)})


N = torch.export.Dim("n", min=2, max=64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export(strict, training, dynamic):
    model = Model().train(training)
    alone = copy.deepcopy(model)
    program = torch.export.export(model, (batch(),), strict=strict, dynamic_shapes=({0: N},) if dynamic else None)
    decomposed = copy.deepcopy(program).run_decompositions()
    assert operators_of(program.graph) == (["syncbn.norm.default"] if training else [])
    graph, core_aten, same = program.module(), decomposed.module(), copy.deepcopy(alone)
    for x in [batch(), batch(7, 2)] if dynamic else [batch()]:
        expected = alone(x)
        for found in (graph, core_aten):
            torch.testing.assert_close(found(x), expected, **ROUNDED)
        torch.testing.assert_close(same(x), expected)
    assert (alone.plain.num_batches_tracked > 0) == training
    for found in (graph, core_aten):
        assert_same_state(found.state_dict(), alone.state_dict())
    assert not torch.allclose(graph(batch(4, 3)), graph(batch()), **ROUNDED)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"momentum": None}, {"affine": False}])
@pytest.mark.parametrize("training", [True, False])
def test_export_of_layers_of_every_kind(options, training):
    model = Model(**options).train(training)
    alone = copy.deepcopy(model)
    graph = torch.export.export(model, (batch(),)).module()
    for x in (batch(), batch(seed=2)):
        torch.testing.assert_close(graph(x), alone(x), **ROUNDED)
    assert_same_state(graph.state_dict(), alone.state_dict())


@pytest.mark.parametrize("decompose", [False, True])
def test_exported_evaluation_is_saved_and_loaded(decompose):
    model = Model().eval()
    program = torch.export.export(model, (batch(),))
    if decompose:
        program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(batch(seed=2)), model(batch(seed=2)), **ROUNDED)


def test_an_exported_program_is_trained():
    model = Model()
    alone, graph = copy.deepcopy(model), torch.export.export(model, (batch(),)).module()
    parameters = dict(graph.named_parameters())
    for _ in range(2):
        graph(batch()).sin().sum().backward(), alone(batch()).sin().sum().backward()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(parameters[name].grad, p.grad, **ROUNDED)
        assert p.grad.abs().max() > 1e-4 or "bias" in name
    assert_same_state(graph.state_dict(), alone.state_dict())


class Loss(nn.Module):
    """A model with its loss, scaled."""

    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, x):
        return (syncbn.scale_loss(self.model(x).sin().mean(), x.shape[0]),)


def test_export_and_aot_export_of_a_training_step():
    from torch._functorch.aot_autograd import aot_export_module

    model = Loss()
    alone = copy.deepcopy(model)
    torch.testing.assert_close(torch.export.export(model, (batch(),)).module()(batch()), alone(batch()))
    joint, signature = aot_export_module(copy.deepcopy(alone), (batch(),), trace_joint=True, output_loss_index=0)
    steps = ["backward", "forward", "loss_reduce"]
    text = str(joint.graph)
    assert all(f"syncbn.{step}.default" in text for step in steps)
    inputs = [*alone.parameters(), *alone.buffers(), batch()]
    outputs = dict(zip((node.name for node in joint.graph.output_node().args[0]), joint(*inputs), strict=True))
    alone(batch())[0].backward()
    found = {signature.backward_signature.gradients_to_parameters[name]: v for name, v in outputs.items()
             if name in signature.backward_signature.gradients_to_parameters}  # fmt: skip
    for name, p in alone.named_parameters():
        torch.testing.assert_close(found[name], p.grad, **ROUNDED)


def test_the_function_is_exported():
    class Functional(nn.Module):
        def forward(self, x):
            return syncbn.functional.sync_batch_norm(x, None, None, training=True)

    torch.testing.assert_close(torch.export.export(Functional(), (batch(),)).module()(batch()), Functional()(batch()))


def step_of(model):
    """A training step as a function of all its tensors: the loss and all gradients."""

    def step(parameters, buffers, x):
        loss = functional_call(model, (parameters, buffers), (x,)).sin().sum()
        return [loss, *torch.autograd.grad(loss, [*parameters.values(), x])]

    return step


def tensors_of(model):
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


STEPS = ["backward", "forward"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_step(mode, training):
    model = Model().train(training)
    step = step_of(model)
    graph = make_fx(step, tracing_mode=mode)(*tensors_of(model), batch().requires_grad_())
    assert operators_of(graph.graph) == ([f"syncbn.{name}.default" for name in STEPS] if training else [])
    for x in [batch(seed=2), *[batch(7, 3)] * (mode == "symbolic")]:
        (p, b), (q, c) = tensors_of(model), tensors_of(model)
        found, expected = graph(p, b, x.requires_grad_()), step(q, c, x)
        torch.testing.assert_close(found, expected, **ROUNDED)
        assert expected[-1].abs().max() > 1e-3
        assert_same_state(b, c)
        assert c["plain.num_batches_tracked"] == training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_forward(mode, training):
    model = Model().train(training)
    forward = lambda p, b, x: functional_call(model, (p, b), (x,))  # noqa: E731
    graph = make_fx(forward, tracing_mode=mode)(*tensors_of(model), batch())
    (p, b), (q, c) = tensors_of(model), tensors_of(model)
    torch.testing.assert_close(graph(p, b, batch(seed=2)), forward(q, c, batch(seed=2)), **ROUNDED)
    assert_same_state(b, c)


def test_make_fx_of_second_derivatives():
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, track_running_stats=False)

    def penalty(x):
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)

    x, other = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    graph = make_fx(penalty)(x)
    torch.testing.assert_close(graph(other), penalty(other))
    assert penalty(other)[0].abs().max() > 0.1


def test_make_fx_of_scale_loss():
    graph = make_fx(lambda loss: syncbn.scale_loss(loss, 3))(torch.tensor(2.0))
    assert graph(torch.tensor(4.0)) == syncbn.scale_loss(torch.tensor(4.0), 3) == 4


def test_aot_module_and_aot_function():
    model = Model()
    alone, functional = copy.deepcopy(model), copy.deepcopy(model)
    parameters, buffers = tensors_of(functional)
    aot = aot_function(lambda p, b, x: functional_call(functional, (p, b), (x,)), nop)
    aot(parameters, buffers, batch()).sin().sum().backward()
    aot_module(model, nop)(batch()).sin().sum().backward()
    alone(batch()).sin().sum().backward()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, **ROUNDED)
        torch.testing.assert_close(parameters[name].grad, p.grad, **ROUNDED)
    assert_same_state(dict(model.named_buffers()), dict(alone.named_buffers()))
    assert_same_state(buffers, dict(alone.named_buffers()))


def test_an_exported_program_is_compiled():
    model = Model()
    alone = copy.deepcopy(model)
    graph = torch.compile(torch.export.export(model, (batch(),)).module(), backend="aot_eager")
    graph(batch()).sin().sum().backward(), alone(batch()).sin().sum().backward()
    parameters = dict(graph.named_parameters())
    for name, p in alone.named_parameters():
        torch.testing.assert_close(parameters[f"_orig_mod.{name}"].grad, p.grad, **ROUNDED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter through TorchScript
def test_onnx_of_an_eval_model_after_conversion():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2))
    converted = syncbn.convert_sync_batchnorm(copy.deepcopy(model))
    # All that torch.onnx.export does but for writing the file, which takes the package onnx.
    convert = torch.onnx.utils._model_to_graph
    kinds = [[node.kind() for node in convert(m.eval(), (batch().float(),))[0].nodes()] for m in (converted, model)]
    assert kinds[0] == kinds[1]
    assert "onnx::Conv" in kinds[0]
    reverted = syncbn.revert_sync_batchnorm(converted)
    assert [node.kind() for node in convert(reverted, (batch().float(),))[0].nodes()] == kinds[0]
