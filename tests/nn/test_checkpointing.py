"""Activation checkpointing: a step equals the same step without it, and what is sent is counted."""

import functools
import sys

import pytest
import torch
from support.regions import (
    CONTEXTS,
    PLAIN,
    REENTRANT,
    SCHEDULES,
    SELECTIVE,
    WAYS,
    Counting,
    Net,
    Recomputed,
    accumulate,
    batches,
    both,
    halves,
    one_step,
    outcome,
    retain_graph,
    whole,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

# torch's own: of regions within reentrant ones, which run without gradients first.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, v in expected.items():
        assert torch.equal(got[name], v), name


def forget_recomputations(monkeypatch):
    """The negative control: every forward counts as a new one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("syncbn.nn.") and hasattr(module, "is_recomputing"):
            monkeypatch.setattr(module, "is_recomputing", lambda: False)


def changed(got, expected):
    """The names of what is not the same."""
    return {name for name, v in expected.items() if not torch.equal(got[name], v)}


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_trap_16_a_checkpointed_step_leaves_the_same_bits(way, schedule):
    if "selective" in way and schedule is retain_graph:
        pytest.skip("torch goes backward once only through a selective checkpoint")
    run, per_forward, per_backward = WAYS[way]
    counting, (forwards, backwards) = Counting(), SCHEDULES[schedule]
    assert_same_bits(outcome(Net(run, counting), schedule), outcome(Net(both), schedule))
    assert counting.forward == per_forward * forwards + per_backward * backwards
    assert counting.backward == 2 * backwards


@pytest.mark.parametrize("way", WAYS)
def test_trap_16_statistics_would_be_updated_twice(way, monkeypatch):
    forget_recomputations(monkeypatch)
    names = changed(outcome(Net(WAYS[way][0]), one_step), outcome(Net(both), one_step))
    layers = ["first.1"] if way == "sequential" else ["first.1", "second.1"]
    # The cumulative average of one batch twice is what it was.
    twice = {f"{layer}.{name}" for layer in layers for name in STATISTICS} - {"first.1.running_mean"}
    assert twice - {"first.1.running_var"} <= names


def in_dtype(net, dtype):
    return net.to(dtype), [x.detach().to(dtype).requires_grad_() for x in batches(1)]


@pytest.mark.parametrize("options", [PLAIN, REENTRANT, SELECTIVE, CONTEXTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, options):
    found, countings = [], []
    for run in (functools.partial(whole, **options), both):
        countings.append(Counting())
        net, (x,) = in_dtype(Net(run, countings[-1]), dtype)
        found.append(outcome(net, lambda net, x=x: (net(x).pow(2).sum().backward(), [x])[1]))
    assert_same_bits(*found)
    messages = 4 if dtype == torch.float64 else 2
    recomputed = messages if options in (PLAIN, REENTRANT) else 0
    assert [c.forward for c in countings] == [messages + recomputed, messages]


@pytest.mark.parametrize("options", [PLAIN, CONTEXTS])
def test_in_place(options):
    counting = Counting()
    net = Net(functools.partial(whole, **options), counting, inplace=True)
    assert_same_bits(outcome(net, accumulate), outcome(Net(both, inplace=True), accumulate))
    assert counting.forward == (8 if options is PLAIN else 4)


def shared(net, x):
    return net.second[1](net.first[1](net.second[1](net.first(x))))


@pytest.mark.parametrize(("options", "messages"), [(PLAIN, 8), (REENTRANT, 8), (SELECTIVE, 4), (CONTEXTS, 4)])
def test_a_layer_that_a_region_calls_twice(options, messages):
    counting = Counting()
    net = Net(lambda net, x: checkpoint(functools.partial(shared, net), x, **options), counting)
    for n in (net, expected := Net(shared)):
        n.second.requires_grad_(False)[1].requires_grad_()
    assert_same_bits(outcome_of_used(net), outcome_of_used(expected))
    assert counting.forward == messages


def outcome_of_used(net, schedule=one_step):
    return {name: v for name, v in outcome(net, schedule).items() if v is not None}


@pytest.mark.parametrize(("outer", "inner", "messages"), [(CONTEXTS, PLAIN, 2 + 2), (PLAIN, CONTEXTS, 2 + 1)])
def test_regions_of_both_kinds_within_each_other(outer, inner, messages):
    counting = Counting()
    net = Net(lambda net, x: checkpoint(functools.partial(halves, net, **inner), x, **outer), counting)
    assert_same_bits(outcome(net, one_step), outcome(Net(both), one_step))
    assert counting.forward == messages


def test_unpacking_outside_of_a_backward_recomputes_and_changes_no_statistics():
    for options, messages in ((PLAIN, 4), (CONTEXTS, 2)):
        counting = Counting()
        net = Net(functools.partial(whole, **options), counting)
        y = net(batches(1)[0])
        before = {name: b.clone() for name, b in net.named_buffers()}
        assert y.grad_fn._saved_input.shape[1] == 4
        assert counting.forward == messages
        assert_same_bits(dict(net.named_buffers()), before)


class NewForwards:
    """A region with a hook inside and one behind it, which run layers anew during backward."""

    def __init__(self, checkpointed):
        self.checkpointed = checkpointed

    def region(self, net, x):
        z = net.first(x)
        if z.requires_grad:
            z.register_hook(lambda _: self.run_anew(net.second[1]))
        return net.second(z)

    def run_anew(self, layer):
        with torch.enable_grad():
            layer(torch.arange(8.0).view(2, 4))

    def __call__(self, net, x):
        y = self.checkpointed(functools.partial(self.region, net), x)
        y.register_hook(lambda _: self.run_anew(net.first[1]))
        return y


@pytest.mark.parametrize(
    "checkpointed",
    [
        *(functools.partial(checkpoint, **options) for options in (PLAIN, REENTRANT, SELECTIVE, CONTEXTS)),
        Recomputed.apply,
    ],
    ids=["plain", "reentrant", "selective", "contexts", "own-function"],
)
def test_a_forward_that_a_hook_starts_during_backward_is_a_new_one(checkpointed):
    net, expected = Net(NewForwards(checkpointed)), Net(NewForwards(lambda region, x: region(x)))
    assert_same_bits(outcome(net, one_step), outcome(expected, one_step))
    assert [int(layer.num_batches_tracked) for layer in (net.first[1], net.second[1])] == [2, 2]


def test_a_forward_with_saved_tensors_hooks_of_others_is_a_new_one():
    with torch.autograd.graph.save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        found = outcome(Net(both), one_step)
    assert_same_bits(found, outcome(Net(both), one_step))


@pytest.mark.parametrize("options", [PLAIN, CONTEXTS])
def test_second_derivatives_through_a_region(options):
    def penalty(net):
        (x,) = batches(1)
        (dx,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        dx.pow(2).sum().backward()
        return [x]

    counting = Counting()
    net = Net(functools.partial(whole, **options), counting)
    assert_same_bits(outcome_of_used(net, penalty), outcome_of_used(Net(both), penalty))
    assert counting.forward == (6 if options is PLAIN else 2)  # each of the two backwards recomputes


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own decompositions
def test_forward_mode_in_a_region():
    def both_modes(net):
        (x,) = batches(1)
        with torch.autograd.forward_ad.dual_level():
            y = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
            (y.sum() + tangent.pow(2).sum()).backward()
        return [x]

    assert_same_bits(outcome(Net(functools.partial(whole, **PLAIN)), both_modes), outcome(Net(both), both_modes))


def test_evaluation_in_a_region_sends_nothing():
    for options in (PLAIN, REENTRANT, SELECTIVE, CONTEXTS):
        counting = Counting()
        found = outcome(Net(functools.partial(whole, **options), counting).eval(), one_step)
        assert_same_bits(found, outcome(Net(both).eval(), one_step))
        assert counting.forward == counting.backward == 0


class Fickle(nn.Module):
    """Runs other layers when it is recomputed."""

    def __init__(self, first, second):
        super().__init__()
        self.layers = [first, second]

    def forward(self, x):
        layers = self.layers.pop(0) if len(self.layers) > 1 else self.layers[0]
        return layers(x)


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (nn.Sequential(syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3), nn.Conv2d(3, 3, 1)), "one more"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), syncbn.SyncBatchNorm(5), nn.Conv2d(5, 3, 1)), r"\(4, 5, 8, 8\)"),
        (nn.Sequential(nn.MaxPool2d(2), syncbn.SyncBatchNorm(3), nn.Conv2d(3, 3, 1)), r"\(4, 3, 4, 4\)"),
    ],
)
def test_a_region_that_runs_other_layers_when_it_is_recomputed_is_refused(second, found):
    region = Fickle(nn.Sequential(syncbn.SyncBatchNorm(3), nn.Conv2d(3, 3, 1)), second)
    loss = checkpoint(region, batches(1)[0], **CONTEXTS).sum()
    with pytest.raises(RuntimeError, match=rf"expected a checkpointed region to run the same .*; got .*{found}"):
        loss.backward()


def test_an_error_in_a_region_leaves_no_context_behind():
    layer = syncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="channels"):
        checkpoint(layer, torch.ones(2, 4), **CONTEXTS)
    counting = layer.process_group = Counting()
    checkpoint(lambda x: layer(x) * 2, batches(1)[0], **PLAIN).sum().backward()
    assert counting.forward == 2


# Under torch.compile.


@pytest.fixture
def _fresh():
    torch._dynamo.reset()


def compiled_whole(options):
    return lambda net, x: torch.compile(functools.partial(whole, net, **options), backend="aot_eager", fullgraph=True)(
        x
    )


def whole_of_compiled(options):
    def run(net, x):
        return checkpoint(
            torch.compile(functools.partial(both, net), backend="aot_eager", fullgraph=True), x, **options
        )

    return run


COMPILED = {
    "inside": (compiled_whole(PLAIN), 2),
    "inside-selective": (compiled_whole(SELECTIVE), 0),
    "around": (whole_of_compiled(PLAIN), 2),
    "around-reentrant": (whole_of_compiled(REENTRANT), 2),
    "around-contexts": (whole_of_compiled(CONTEXTS), 0),
}


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("way", COMPILED)
def test_trap_16_compiled(way, monkeypatch):
    run, recomputed = COMPILED[way]
    counting, expected = Counting(), outcome(Net(both), accumulate)
    torch.testing.assert_close(outcome(Net(run, counting), accumulate), expected)
    assert counting.forward == 2 * (2 + recomputed)
    assert counting.backward == 4
    if "around" in way:  # inside, a graph's backward works on copies of the running statistics
        forget_recomputations(monkeypatch)
        assert changed(outcome(Net(run), accumulate), expected) >= {"second.1.running_mean", "second.1.running_var"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("way", ["whole", "whole-reentrant", "whole-contexts"])
def test_trap_16_compiled_autograd(way, monkeypatch):
    def step(net):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            return one_step(net)

    expected = outcome(Net(both), one_step)
    torch.testing.assert_close(outcome(Net(WAYS[way][0]), step), expected)
    forget_recomputations(monkeypatch)
    assert "second.1.running_mean" in changed(outcome(Net(WAYS[way][0]), step), expected)
