"""Noisy layers in forwards that are repeated (activation checkpointing) or compiled: the same noise, counted once."""

import functools
import sys

import pytest
import torch
from support.ranks import run_ranks
from support.regions import CONTEXTS, PLAIN, REENTRANT, SELECTIVE, by_a_function_of_ones_own
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import syncbn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's own


def network():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    layers = [syncbn.NoisySyncBatchNorm(4, noise_mean=0.3, noise_var=0.3, seed=seed) for seed in (3, 4)]
    return nn.Sequential(conv, layers[0], nn.ReLU(), nn.Conv2d(4, 4, 1), layers[1])


XS = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def all_then_backward(net, forward):
    """Three forwards, then one backward: each repeated forward has later ones behind it."""
    ys = [forward(x.clone().requires_grad_()) for x in XS]
    sum(y.sin().sum() for y in ys).backward()
    return _outcome(net, ys)


def step_by_step(net, forward):
    ys = []
    for x in XS:
        ys.append(forward(x))
        ys[-1].sin().sum().backward()
    return _outcome(net, ys)


def _outcome(net, ys):
    found = {str(i): y.detach() for i, y in enumerate(ys)} | {name: p.grad for name, p in net.named_parameters()}
    return found | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, v in expected.items():
        torch.testing.assert_close(got[name], v, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("schedule", [all_then_backward, step_by_step])
@pytest.mark.parametrize("options", [PLAIN, REENTRANT, SELECTIVE, CONTEXTS], ids=["plain", "reentrant", "sel", "ctx"])
def test_checkpointed_steps_draw_the_same_noise(options, schedule):
    net, expected = network(), network()
    x = functools.partial(checkpoint, net, **options)
    forward = (lambda v: x(v.clone().requires_grad_())) if options is REENTRANT else x
    assert_same(schedule(net, forward), schedule(expected, expected))
    assert net[1].noise_count == len(XS)


def test_repeated_forwards_that_count_as_new_ones_differ(monkeypatch):
    """The negative control."""
    expected, net = network(), network()
    wanted = all_then_backward(expected, expected)
    for name, module in list(sys.modules.items()):
        if name.startswith("syncbn.nn.") and hasattr(module, "is_recomputing"):
            monkeypatch.setattr(module, "is_recomputing", lambda: False)
    got = all_then_backward(net, functools.partial(checkpoint, net, **PLAIN))
    assert net[1].noise_count == 2 * len(XS)
    assert (got["1.noise_mean"] - wanted["1.noise_mean"]).abs().max() > 0.1 * wanted["1.noise_mean"].abs().max()


def test_a_repeated_forward_that_cannot_be_known_is_an_error():
    net, (x, *_) = network(), XS
    y = checkpoint(net, x, preserve_rng_state=False, **PLAIN)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        y.sum().backward()
    ys = []
    for _ in range(2):
        torch.manual_seed(1)
        ys.append(checkpoint(net, x, **PLAIN))
    with pytest.raises(RuntimeError, match="seed torch once"):
        ys[0].sum().backward()


def test_a_seed_of_torch_in_every_step_is_fine():
    net, expected = network(), network()
    for x in XS:
        torch.manual_seed(1)
        checkpoint(net, x, **PLAIN).sin().sum().backward()
        expected(x).sin().sum().backward()
    assert_same(_outcome(net, []), _outcome(expected, []))


def test_checkpoints_that_restore_no_random_numbers_are_an_error():
    net = network()
    net.first, net.second = net[:3], net[3:]
    with pytest.raises(RuntimeError, match="expected a repeated forward"):
        by_a_function_of_ones_own(net, XS[0].clone().requires_grad_()).sum().backward()


def test_plain_training_leaves_torchs_random_numbers():
    net = network()
    torch.manual_seed(5)
    net(XS[0]).sum().backward()
    got = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(got, torch.rand(3))


@pytest.fixture
def _fresh():
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        (lambda net, compiled: compiled(net), all_then_backward),
        (lambda net, compiled: functools.partial(checkpoint, compiled(net), **PLAIN), all_then_backward),
        (lambda net, compiled: compiled(functools.partial(checkpoint, net, **PLAIN)), step_by_step),
    ],
    ids=["compiled", "compiled-in-checkpoint", "checkpoint-in-compiled"],
)
def test_compiled_layers_are_one_graph_with_the_same_noise(make, schedule):
    net, expected = network(), network()
    forward = make(net, functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    assert_same(schedule(net, forward), schedule(expected, expected))


def test_make_fx_records_a_graph_that_draws():
    net, expected, x = network()[1], network()[1], torch.randn(3, 4, 2, 2)
    graph = make_fx(lambda v: net(v))(x)
    assert any("draw_noise" in str(node.target) for node in graph.graph.nodes)
    net.load_state_dict(expected.state_dict())
    torch.testing.assert_close(graph(x), expected(x))


def _compiled_on_a_rank(rank, group):
    torch.manual_seed(rank)  # other seeds of the layers, which agree within the graph
    layers = nn.Sequential(syncbn.NoisySyncBatchNorm(3), nn.ReLU(), syncbn.NoisySyncBatchNorm(3)).double()
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3).square()[2 * rank : 2 * rank + 2]
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    with torch.no_grad():
        return [compiled(x) for _ in range(2)], [int(layers[i].noise_seed) for i in (0, 2)]


def test_compiled_ranks_agree_on_their_seeds():
    (first, seeds), (second, others) = run_ranks(_compiled_on_a_rank, 2, "gloo")
    assert seeds == others
    layers = nn.Sequential(*(syncbn.NoisySyncBatchNorm(3, seed=s) for s in seeds)).double()
    layers.insert(1, nn.ReLU())
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3).square()
    for ys in zip(first, second, strict=True):
        torch.testing.assert_close(torch.cat(ys), layers(x).detach(), rtol=1e-12, atol=1e-12)
