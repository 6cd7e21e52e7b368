"""Graphs of training steps and of evaluation: torch.compile, torch.export, make_fx, torch.fx, torch.jit."""

import numpy as np
import pytest
import torch
from ranks import rank_errors, run_ranks
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import syncbn

# torch's own, of torch's own code.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning", "ignore:The .grad attribute:UserWarning"
)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def network(norm=syncbn.SyncBatchNorm):
    """Two convolutions with norms between, with the same parameters whatever the norm is."""
    generator = torch.Generator().manual_seed(1)
    blocks = [nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        for v in model.parameters():
            v.copy_(torch.randn(v.shape, generator=generator) * 0.3)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same_after_steps(run, model, reference, sizes=(4, 3, 2)):
    for n in sizes:
        for f, m in ((run, model), (reference, reference)):
            m.zero_grad()
            f(X[:n]).pow(2).mean().backward()
        close([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])
    close(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_batch_norm(backend):
    model, reference = network(), network(nn.BatchNorm2d)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    same_after_steps(compiled, model, reference)
    model.eval(), reference.eval()
    close(compiled(X), reference(X))


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_compiled_layer_has_eager_modes_bits(act, with_residual):
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    found = []
    for compile_it in (False, True):
        layer = syncbn.SyncBatchNormAct(3, act)
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compile_it else layer
        v = x.clone().requires_grad_()
        y = run(v, v) if with_residual else run(v)
        (dx,) = torch.autograd.grad(y, v, dy)
        found.append((y, dx, *layer.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_batch_sizes_change_without_a_compilation_each():
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(syncbn.SyncBatchNorm(3), backend=count, fullgraph=True)
    for n in (4, 5, 6, 7, 8, 9):
        compiled(torch.randn(n, 3, 4, 4))
    assert count.frame_count == 2  # for one size, and for all


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_compiled_layers_of_every_kind(options):
    ours, theirs = syncbn.SyncBatchNorm(3, **options), nn.BatchNorm2d(3, **options)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        close(compiled(X), theirs(X))
    close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_exported_programs_equal_batch_norm(strict, training):
    model, expected = network().train(training), network(nn.BatchNorm2d).train(training)(X)
    program = torch.export.export(model, (X,), strict=strict)
    close(program.module()(X), expected)
    close(program.run_decompositions().module()(X), expected)


def _gradients(model):
    names = [name for name, _ in model.named_parameters()]

    def step(x, *values):
        return torch.autograd.grad(
            functional_call(model, dict(zip(names, values, strict=True)), (x,)).pow(2).mean(), values
        )

    return step


def test_make_fx_of_a_training_step_records_what_is_computed():
    model = network()
    values = list(model.parameters())
    graph = make_fx(_gradients(model))(X, *values)
    targets = " ".join(str(node.target) for node in graph.graph.nodes)
    for name in ("reduce", "normalise", "backward_reduce", "backward_elemt"):
        assert targets.count(f"syncbn.{name}.") == 2, name
    reference = network(nn.BatchNorm2d)
    expected = torch.autograd.grad(reference(X[:2]).pow(2).mean(), list(reference.parameters()))
    close(make_fx(_gradients(model))(X[:2], *values)(X[:2], *values), expected)
    assert len(graph(X, *values)) == len(values)


def test_torch_fx_and_feature_extractors_take_a_layer_as_a_leaf():
    class OwnTracer(torch.fx.Tracer):  # as torchvision's create_feature_extractor
        def is_leaf_module(self, module, name):
            return super().is_leaf_module(module, name)

    model, reference = network(), network(nn.BatchNorm2d)
    graph = torch.fx.GraphModule(model, OwnTracer().trace(model))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"][1] == "1"
    same_after_steps(graph, model, reference)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
def test_traces_of_torch_jit_equal_batch_norm_and_each_other(training, tmp_path):
    model, reference = network().train(training), network(nn.BatchNorm2d).train(training)
    traced = torch.jit.trace(model, (X,), check_trace=not training)
    with torch.no_grad():
        again = torch.jit.trace(model, (X,), check_trace=not training)
    assert str(traced.inlined_graph).count("syncbn::norm") == (2 if training else 0)
    assert [n.kind() for n in traced.inlined_graph.nodes()] == [n.kind() for n in again.inlined_graph.nodes()]
    close(traced(X), reference(X))
    traced.save(tmp_path / "model.pt")
    close(torch.jit.load(tmp_path / "model.pt")(X), traced(X))


def test_fakes_and_the_meta_device_have_shapes_and_formats():
    for x in (X, X.to(memory_format=torch.channels_last)):
        with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
            layer, fake = syncbn.SyncBatchNorm(3), mode.from_tensor(x)
            y = layer(fake)
        assert (y.shape, y.stride()) == (x.shape, x.stride())
    assert syncbn.SyncBatchNorm(3, device="meta")(X.to("meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operators_pass_opcheck(dtype, memory_format):
    o, wide = torch.ops.syncbn, torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(4, 3, 5, 5).to(dtype).to(memory_format=memory_format)
    w, b, mean, var = (
        torch.randn(3, dtype=wide),
        torch.randn(3, dtype=wide),
        torch.zeros(3).to(wide),
        torch.ones(3).to(wide),
    )
    batches = torch.tensor(0)
    for residual, act in ((None, "none"), (x.clone(), "relu"), (x.clone(), "silu")):
        reduce = x, w, b, residual, None, mean, var, None, 3, 0.1, 1e-5, act, 0.0, "", ""
        opcheck(o.reduce.default, reduce)
        moments, center = o.reduce(*reduce)
        normalise = x, moments, center, w, b, residual, None, mean, var, batches, 0.1, 1e-5, act, 0.0, ""
        opcheck(o.normalise.default, normalise)
        y, statistics = o.normalise(*normalise)
        gate = None if residual is None else residual if act == "silu" else y
        backward_reduce = x, x, statistics, w, b, gate, None, wide, None, act, 0.0, "", ""
        opcheck(o.backward_reduce.default, backward_reduce)
        sums, *_ = o.backward_reduce(*backward_reduce)
        opcheck(o.backward_elemt.default, (x, x, statistics, sums, w, b, None, act, 0.0))
        leaves = [v.clone().requires_grad_() for v in (x, w, b)]
        opcheck(o.norm.default, (*leaves, residual, None, mean, var, batches, 3, 0.1, 1e-5, act, 0.0, "", ""))


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x, w: (x[0, 0, 0], w, w, None, None, None, None, None, 3, 0.1, 1e-5, "none", 0.0, "", ""),
        lambda x, w: (x.int(), w, w, None, None, None, None, None, 3, 0.1, 1e-5, "none", 0.0, "", ""),
        lambda x, w: (x, w[:2], w, None, None, None, None, None, 3, 0.1, 1e-5, "none", 0.0, "", ""),
        lambda x, w: (x, w, w, x[:1], None, None, None, None, 3, 0.1, 1e-5, "none", 0.0, "", ""),
        lambda x, w: (x, w, w, None, None, None, None, None, 3, 0.1, 1e-5, "gelu", 0.0, "", ""),
        lambda x, w: (x, w, w, None, None, None, None, None, 3, 0.1, -1.0, "none", 0.0, "", ""),
        lambda x, w: (x, w, w, None, None, None, None, None, 3, 0.1, 1e-5, "none", 0.0, "group-0815", ""),
        lambda x, w: (x, None, None, None, None, None, None, None, 4, 0.1, 1e-5, "none", 0.0, "", ""),
    ],
    ids=["axes", "dtype", "weight", "residual", "activation", "eps", "group", "num_features"],
)
def test_an_operator_called_with_nonsense_says_so(arguments):
    with pytest.raises((ValueError, TypeError, RuntimeError), match="expected "):
        torch.ops.syncbn.reduce.default(*arguments(X, torch.ones(3)))


def _uneven(rank, group, sizes):
    """Steps with batches of several sizes, so that the ranks' graphs differ; one rank runs out of samples."""
    model = network()
    compiled, wholes = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for cut in sizes:
        x = (X[:cut], X[cut:])[rank]
        y = compiled(x)
        y.pow(2).sum().backward()
        wholes.append(y.detach().numpy())
    return wholes, [v.numpy() for v in model.state_dict().values()]


def test_compiled_ranks_with_batches_of_several_sizes_equal_one_process():
    sizes = (2, 3, 1, 4)
    results = run_ranks(_uneven, 2, "gloo", sizes, timeout=110)
    reference = network(nn.BatchNorm2d)
    for step in range(len(sizes)):
        expected = reference(X).detach().numpy()
        np.testing.assert_allclose(np.concatenate([r[0][step] for r in results]), expected, rtol=1e-4, atol=1e-5)
    for state, _ in ((r[1], 0) for r in results):
        for got, expected in zip(state, reference.state_dict().values(), strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def _other_channels(rank, group):
    layer = torch.compile(syncbn.SyncBatchNorm(3), backend="aot_eager")
    layer(X)
    layer(X.double() if rank == 1 else X)


def test_a_compiled_layer_refuses_another_dtype_on_one_rank_on_every_rank():
    for error in rank_errors(_other_channels, 2, "gloo"):
        assert isinstance(error, RuntimeError)
        assert "expected float64 input on every rank or on none" in str(error)


def test_a_changed_group_is_looked_up_anew():
    class Own:
        rank, world_size, messages = 0, 1, 0

        def all_reduce(self, _):
            self.messages += 1

    first, second = Own(), Own()
    layer = syncbn.SyncBatchNorm(3, process_group=first)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(X), compiled(X)
    layer.process_group = second
    compiled(X)
    assert (first.messages, second.messages) == (2, 1)


def test_scale_loss_compiles():
    scale = torch.compile(syncbn.scale_loss, backend="aot_eager", fullgraph=True)
    loss = torch.tensor(2.0, requires_grad=True)
    y = scale(loss * 3, 4)
    y.backward()
    assert (y.item(), loss.grad.item()) == (6.0, 3.0)
