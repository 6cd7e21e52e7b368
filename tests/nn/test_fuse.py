"""convert_sync_batchnorm(fuse=True): Sequentials run a layer and its activation in one pass, and stay what they are."""

import copy
import pickle

import pytest
import torch
from support.ranks import run_ranks
from support.tolerances import rounding
from test_convert import norm_act_class
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn
from syncbn.kernels import PLAIN
from syncbn.nn.fuse import FusedSequential
from syncbn.nn.layer import SyncBatchNorm

# A step of `block`: two convolutions, a norm and an activation, of some 10 operations forward and 10 backward; the
# longest sums are of gradients of weights, over 4 pictures of 6 x 6.
ROUNDED = rounding(torch.float64, 20, 144)
ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.25), nn.SiLU()]


def block(activation=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation or nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


def classes(model):
    return [type(m).__name__ for m in model]


@pytest.fixture
def passes(monkeypatch):
    """The epilogues of the layers that ran."""
    seen = []
    normalise = SyncBatchNorm._normalise

    def watched(self, input, epilogue=PLAIN, residual=None, mask=None):
        seen.append(epilogue.activation)
        return normalise(self, input, epilogue, residual, mask)

    monkeypatch.setattr(SyncBatchNorm, "_normalise", watched)
    return seen


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_pairs_in_a_sequential_run_in_one_pass_and_are_reverted(activation, passes):
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plain, fused = block(activation), block(activation)
    before = list(fused)
    syncbn.convert_sync_batchnorm(fused, fuse=True)
    assert isinstance(fused, FusedSequential)
    assert classes(fused) == ["Conv2d", "SyncBatchNorm", type(activation).__name__, "Conv2d"]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        plain.train(training), fused.train(training)
        y, expected = fused(x), plain(x)
        torch.testing.assert_close(y, expected, **ROUNDED)
        (dw,), (expected_dw,) = (
            torch.autograd.grad(v.square().sum(), model[0].weight) for v, model in ((y, fused), (expected, plain))
        )
        torch.testing.assert_close(dw, expected_dw, **ROUNDED)
    assert len(passes) == 2
    assert "none" not in passes
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), fused(x))
        assert type(syncbn.revert_sync_batchnorm(twin)) is nn.Sequential
    syncbn.revert_sync_batchnorm(fused)
    assert type(fused) is nn.Sequential
    assert all(now is then for now, then in zip(fused, before, strict=True))
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(fused, plain, strict=True))
    torch.testing.assert_close(fused(x), plain(x), **ROUNDED)


def test_converting_twice_changes_nothing_more():
    model = syncbn.convert_sync_batchnorm(block())
    assert type(model) is nn.Sequential
    for _ in range(2):
        syncbn.convert_sync_batchnorm(model, fuse=True)
        assert type(model).__mro__[1:3] == (FusedSequential, nn.Sequential)
    assert type(syncbn.revert_sync_batchnorm(model)) is nn.Sequential


def folded(model):
    """What torch.nn.utils.fusion and torch.fx's optimizers do to a pair of convolution and norm."""
    model.eval()
    plain = syncbn.revert_sync_batchnorm(copy.deepcopy(model))
    model[0], model[1] = fuse_conv_bn_eval(plain[0], plain[1]), nn.Identity()
    return model


def exchanged(slot, module):
    def surgery(model):
        model[slot] = module
        return model

    return surgery


def removed(slot):
    def surgery(model):
        del model[slot]
        return model

    return surgery


SURGERY = {
    "folded": folded,
    "other activation": exchanged(2, nn.Hardtanh(-0.5, 0.5)),
    "no activation": exchanged(2, nn.Identity()),
    "activation removed": removed(2),
    "norm removed": removed(1),
    "new norm": exchanged(1, nn.BatchNorm2d(4).double()),
    "no norm": exchanged(1, nn.Identity()),
    "sliced": lambda model: model[:2],
    "sliced behind": lambda model: model[1:3],
    "wrapped pair": lambda model: nn.Sequential(model[0], nn.Sequential(model[1], model[2]), model[3]),
    "wrapped norm": lambda model: exchanged(1, nn.Sequential(model[1]))(model),
    "copied norm": lambda model: exchanged(1, copy.deepcopy(model[1]))(model),
    "inserted": lambda model: (model.insert(2, nn.Tanh()), model)[1],
    "appended": lambda model: model.append(nn.ReLU()),
    "taken out": lambda model: nn.Sequential(*(model[i] for i in (0, 2, 1, 3))),
    "hook": lambda model: (model[1].register_forward_hook(lambda *a: a[2] * 2), model)[1],
    "hook on the activation": lambda model: (model[2].register_forward_pre_hook(lambda m, a: (a[0] - 1,)), model)[1],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SURGERY)
def test_after_surgery_what_runs_is_what_the_modules_say(name, training):
    models = [block().train(training), syncbn.convert_sync_batchnorm(block(), fuse=True).train(training)]
    plain, fused = (SURGERY[name](model) for model in models)
    channels = 4 if name == "sliced behind" else 3
    x = torch.randn(4, channels, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), **ROUNDED)


def test_a_subclass_of_sequential_keeps_its_class_and_is_fused(passes):
    model = Own(*block())
    syncbn.convert_sync_batchnorm(model, fuse=True)
    assert isinstance(model, Own)
    assert isinstance(model, FusedSequential)
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert passes == ["relu"]
    assert isinstance(pickle.loads(pickle.dumps(model)), Own)
    assert type(syncbn.revert_sync_batchnorm(model)) is Own


def test_torch_fx_sees_every_module():
    model = syncbn.convert_sync_batchnorm(nn.Sequential(block()), fuse=True)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0.0", "0.1", "0.2", "0.3"]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(graph(x), model(x), **ROUNDED)


def test_it_compiles_without_a_break():
    torch._dynamo.reset()
    model = syncbn.convert_sync_batchnorm(block(), fuse=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


class Own(nn.Sequential):
    """A Sequential by another name."""


class Between(nn.Sequential):
    """A Sequential that looks at what is between its layers."""

    def forward(self, x):
        return [x := layer(x) for layer in self][1]


def hooked(index):
    model = block()
    model[index].register_forward_hook(lambda *_: None)
    return model


def replaced_forward(index):
    model = syncbn.convert_sync_batchnorm(block())
    forward = model[index].forward
    model[index].forward = lambda x: forward(x)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: replaced_forward(1),
        lambda: replaced_forward(2),
        lambda: Between(*block()),
        lambda: hooked(1),
        lambda: hooked(2),
        lambda: block(nn.ReLU6()),
        lambda: block(nn.LeakyReLU(-0.5)),
        lambda: block(type("Own", (nn.ReLU,), {})()),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()),
        lambda: nn.ModuleList(block()),
    ],
    ids=[
        "replaced_norm",
        "replaced_act",
        "own_forward",
        "hooked_layer",
        "hooked_act",
        "relu6",
        "negative",
        "subclass",
        "apart",
        "list",
    ],
)
def test_what_could_change_a_result_is_not_fused(make):
    model = syncbn.convert_sync_batchnorm(make(), fuse=True)
    assert any(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules())
    assert not any(isinstance(m, FusedSequential) for m in model.modules())


def test_a_shared_layer_is_fused_where_an_activation_follows_it(passes):
    inner = block()
    model = nn.Sequential(inner, nn.Sequential(nn.Conv2d(2, 4, 1).double(), inner[1]))
    plain = copy.deepcopy(model)
    syncbn.convert_sync_batchnorm(model, fuse=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), **ROUNDED)
    assert passes == ["relu", "none"]


@pytest.mark.parametrize(("drop", "act"), [(nn.Identity(), nn.ReLU()), (nn.Dropout(0.0), nn.ReLU())])
def test_a_timm_layer_runs_its_activation_in_the_kernel_where_it_can(drop, act, monkeypatch):
    layer = norm_act_class("BatchNormAct2d", nn.BatchNorm2d)(3).double()
    layer.drop, layer.act = drop, act
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    syncbn.convert_sync_batchnorm(layer, fuse=True)
    calls = []
    monkeypatch.setattr(type(act), "forward", lambda _, v: (calls.append(1), v.relu())[1])
    torch.testing.assert_close(layer(x), expected, **ROUNDED)
    assert len(calls) == (0 if type(drop) is nn.Identity else 1)
    syncbn.revert_sync_batchnorm(layer)
    assert type(layer).__name__ == "BatchNormAct2d"
    assert not any(name.startswith("_syncbn") for name in vars(layer))


def _train(rank, group, fuse):
    model = block(nn.LeakyReLU(0.25))
    syncbn.convert_sync_batchnorm(model, group, fuse=fuse)
    assert isinstance(model, FusedSequential) == fuse
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        optimizer.zero_grad()
        parallel(torch.randn(2 + rank, 3, 6, 6, dtype=torch.float64, generator=generator)).square().mean().backward()
        optimizer.step()
    return [v.detach().clone() for v in model.state_dict().values()]


def test_fused_models_train_the_same_over_gloo():
    plain, fused = (run_ranks(_train, 2, "gloo", fuse) for fuse in (False, True))
    for value, expected in zip(fused[0] + fused[1], plain[0] + plain[1], strict=True):
        torch.testing.assert_close(value, expected, **rounding(torch.float64, 4 * 20, 180))  # 4 steps, 5 pictures
