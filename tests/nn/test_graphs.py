"""Graphs of training steps and of evaluation: torch.export, make_fx, torch.fx, torch.jit; and compiled ranks."""

import numpy as np
import pytest
import torch
from ranks import rank_errors, run_ranks
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

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
