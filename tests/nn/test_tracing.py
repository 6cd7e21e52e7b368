"""What looks on in other ways: torch.fx, torch.jit.trace, fakes, the meta device, modes, functional_call."""

import copy
import io

import pytest
import torch
from support.tolerances import rounding
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import syncbn

TRACED = pytest.mark.filterwarnings("ignore:`torch.jit")


# Forward two convolutions, a norm and an activation, of some 10 operations, and 10 backward; sums over 4 x 6 x 6.
DTYPE = torch.float64
ROUNDED = rounding(DTYPE, 20, 144)


class Model(nn.Module):
    """A block with a residual, as torchvision's."""

    def __init__(self, norm=syncbn.SyncBatchNorm, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, dtype=DTYPE), norm(4, dtype=DTYPE)
        self.act = act or syncbn.SyncBatchNormAct(4, "relu", dtype=DTYPE)
        self.head = nn.Conv2d(4, 2, 1, dtype=DTYPE)

    def forward(self, x):
        z = self.norm(self.conv(x))
        return self.head(self.act(z, residual=z.sin()))


def batch(seed=1):
    return torch.randn(4, 3, 6, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def assert_same_step(found, model, x):
    """Asserts that two models with the same state do the same step."""
    found.zero_grad(), model.zero_grad()
    y, expected = found(x), model(x)
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward(), expected.sin().sum().backward()
    for (name, p), (_, q) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **ROUNDED, msg=name)
    for name, b in model.named_buffers():
        assert torch.equal(found.get_buffer(name), b), name


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_holds_the_layers_as_leaves(training):
    model = Model().train(training)
    alone, graph = copy.deepcopy(model), fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["conv", "norm", "act", "head"]
    assert_same_step(graph, alone, batch())
    assert_same_step(pickled(graph), alone, batch(2))


def pickled(graph):
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_symbolic_trace_of_a_layer_alone_says_what_to_do():
    with pytest.raises(TypeError, match=r"trace nn\.Sequential\(layer\)"):
        fx.symbolic_trace(syncbn.SyncBatchNorm(3))
    fx.symbolic_trace(nn.Sequential(syncbn.SyncBatchNorm(3)))(torch.randn(4, 3))


class NodePathTracer(fx.Tracer):
    """As torchvision's, of create_feature_extractor: notes the module that each node comes from; given leaves."""

    def __init__(self, leaves=()):
        super().__init__()
        self.leaves, self.path, self.paths = tuple(leaves), "", {}

    def is_leaf_module(self, module, name):
        return isinstance(module, self.leaves) if self.leaves else super().is_leaf_module(module, name)

    def call_module(self, module, forward, args, kwargs):
        before, self.path = self.path, self.path_of_module(module)
        try:
            return super().call_module(module, forward, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, *args, **kwargs):
        proxy = super().create_proxy(*args, **kwargs)
        self.paths[proxy.node.name] = self.path
        return proxy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("leaves", [(), (nn.Conv2d,)], ids=["torch.nn", "convolutions_alone"])
def test_feature_extractors(leaves, training):
    model = Model().train(training)
    alone, tracer = copy.deepcopy(model), NodePathTracer(leaves)
    graph = tracer.trace(model)
    (act,) = [node for node in graph.nodes if tracer.paths.get(node.name) == "act"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    output.args = ({"act": act},)
    extractor = fx.GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    assert "head" not in [node.target for node in extractor.graph.nodes]
    z = alone.norm(alone.conv(batch()))
    torch.testing.assert_close(extractor(batch())["act"], alone.act(z, z.sin()))
    assert extractor.norm.num_batches_tracked == alone.norm.num_batches_tracked == training


def nodes_of(traced):
    return [node.kind() for node in traced.inlined_graph.nodes()]


@TRACED
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_jit_trace(with_gradients, training):
    model = Model().train(training)
    start = copy.deepcopy(model)
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(model, (batch(),), check_trace=False)
        again = torch.jit.trace(model, (batch(2),), check_trace=False)
    assert nodes_of(traced) == nodes_of(again)
    assert ("syncbn::norm" in nodes_of(traced)) == training
    assert training or "aten::batch_norm" in nodes_of(traced)
    model.load_state_dict(start.state_dict())
    alone = copy.deepcopy(start)
    assert_same_step(traced, alone, batch(3))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch(4)), alone(batch(4)))
    assert not torch.allclose(traced(batch(5)), traced(batch(6)))


@TRACED
def test_an_eval_models_trace_does_not_depend_on_gradients():
    model = Model().eval()
    traces = []
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            traces.append(nodes_of(torch.jit.trace(model, (batch(),))))
    assert traces[0] == traces[1]


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors(training):
    with FakeTensorMode():
        model, x = Model().train(training), torch.empty(4, 3, 6, 6, dtype=DTYPE, requires_grad=True)
        y = model(x.to(memory_format=torch.channels_last))
        y.sum().backward()
    assert y.shape == (4, 2, 4, 4)
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_meta_device_tells_strides_and_dtypes(format, training):
    layer = syncbn.SyncBatchNormAct(4, "silu").train(training)
    meta = copy.deepcopy(layer).to("meta")
    x = torch.randn(4, 4, 6, 6).to(memory_format=format).requires_grad_()
    abstract = x.detach().to("meta").requires_grad_()
    y, expected = meta(abstract, abstract), layer(x, x)
    y.mul(2).sum().backward(), expected.mul(2).sum().backward()
    pairs = [(y, expected), (abstract.grad, x.grad), *zip(meta.parameters(), layer.parameters(), strict=True)]
    for a, b in pairs:
        assert a.is_meta
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_flops_are_those_of_batch_norm():
    class Act(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4, dtype=DTYPE)

        def forward(self, x, residual):
            return (self.norm(x) + residual).relu()

    flops = []
    for model in (Model(), Model(nn.BatchNorm2d, Act())):
        with FlopCounterMode(display=False) as counter:
            model(batch()).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


class Log(TorchDispatchMode):
    """Notes what a mode sees of ours."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "syncbn":
            self.names.append(function._opname)
        return function(*args, **kwargs or {})


def step(model):
    x = batch().requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def test_a_dispatch_mode_sees_the_operators_and_changes_nothing():
    model = Model()
    alone = copy.deepcopy(model)
    with Log() as log:
        found = step(model)
    assert log.names == ["forward"] * 2 + ["backward"] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, step(alone), strict=True))


def test_a_function_mode_changes_nothing():
    class Functions(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Functions.count += 1
            return function(*args, **kwargs or {})

    model = Model()
    alone = copy.deepcopy(model)
    with Functions():
        found = step(model)
    assert Functions.count
    assert all(torch.equal(a, b) for a, b in zip(found, step(alone), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_computes_with_what_it_is_given(training):
    model = Model().train(training)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for v in (*other.parameters(), *other.buffers()):
            if v.is_floating_point():
                v.uniform_(0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    given = {name: v.detach().clone() for name, v in other.state_dict().items()}
    y = functional_call(model, given, (batch(),))
    torch.testing.assert_close(y, other(batch()))
    assert all(torch.equal(given[name], v) for name, v in other.state_dict().items())
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
