"""convert_sync_batchnorm(fuse=True): layers take over the activations behind them, and give them back."""

import copy
import pickle

import pytest
import torch
from ranks import run_ranks
from test_convert import norm_act_class
from torch import nn

import syncbn
from syncbn.nn.fuse import FusedActivation

ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.25), nn.SiLU()]


def block(activation=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation or nn.ReLU(), nn.Conv2d(4, 2, 1))


def classes(model):
    return [type(m).__name__ for m in model]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_pairs_in_a_sequential_are_fused_and_reverted(activation):
    x = torch.randn(4, 3, 6, 6)
    plain, fused = block(activation), block(activation)
    before = list(fused)
    syncbn.convert_sync_batchnorm(fused, fuse=True)
    assert classes(fused) == ["Conv2d", "SyncBatchNormAct", "FusedActivation", "Conv2d"]
    assert str(activation) in repr(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        plain.train(training), fused.train(training)
        y, expected = fused(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        (dw,), (expected_dw,) = (
            torch.autograd.grad(v.square().sum(), model[0].weight) for v, model in ((y, fused), (expected, plain))
        )
        torch.testing.assert_close(dw, expected_dw, rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), fused(x))
        assert classes(syncbn.revert_sync_batchnorm(twin)) == classes(plain)
    syncbn.revert_sync_batchnorm(fused)
    assert all(now is then for now, then in zip(fused, before, strict=True))
    assert vars(fused[1]).keys() == vars(plain[1]).keys()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_converting_twice_changes_nothing_more():
    model = syncbn.convert_sync_batchnorm(block())
    assert classes(model)[1] == "SyncBatchNorm"
    for _ in range(2):
        syncbn.convert_sync_batchnorm(model, fuse=True)
        assert classes(model) == ["Conv2d", "SyncBatchNormAct", "FusedActivation", "Conv2d"]
    assert classes(syncbn.revert_sync_batchnorm(model))[1:3] == ["BatchNorm2d", "ReLU"]


@pytest.mark.parametrize("part", [lambda m: m[1], lambda m: m[1:3]], ids=["layer", "slice"])
def test_reverting_a_part_keeps_the_activation(part):
    model = syncbn.convert_sync_batchnorm(block(), fuse=True)
    syncbn.revert_sync_batchnorm(part(model))
    norm_and_act = nn.Sequential(*list(model)[:3])
    assert norm_and_act(torch.randn(4, 3, 6, 6)).min() == 0
    syncbn.revert_sync_batchnorm(model)
    assert classes(model)[1:3] == ["BatchNorm2d", "ReLU"]


def test_the_activation_comes_back_in_the_models_mode():
    model = syncbn.convert_sync_batchnorm(block(), fuse=True).eval()
    syncbn.revert_sync_batchnorm(model)
    assert not any(m.training for m in model.modules())


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


def own_attribute():
    model = block()
    model[1].act = "mine"
    return model


def shared():
    model = block()
    return nn.Sequential(model, nn.Sequential(nn.Conv2d(2, 4, 1), model[1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: replaced_forward(1),
        lambda: replaced_forward(2),
        own_attribute,
        lambda: Between(*block()),
        lambda: hooked(1),
        lambda: hooked(2),
        shared,
        lambda: block(nn.ReLU6()),
        lambda: block(nn.LeakyReLU(-0.5)),
        lambda: block(type("Own", (nn.ReLU,), {})()),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()),
        lambda: nn.ModuleList(block()),
    ],
    ids=[
        "replaced_norm",
        "replaced_act",
        "own_attribute",
        "own_forward",
        "hooked_layer",
        "hooked_act",
        "shared",
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
    assert not any(isinstance(m, (syncbn.SyncBatchNormAct, FusedActivation)) for m in model.modules())


@pytest.mark.parametrize(("drop", "act"), [(nn.Identity(), nn.ReLU()), (nn.Dropout(0.0), nn.ReLU())])
def test_a_timm_layer_runs_its_activation_in_the_kernel_where_it_can(drop, act, monkeypatch):
    layer = norm_act_class("BatchNormAct2d", nn.BatchNorm2d)(3)
    layer.drop, layer.act = drop, act
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(layer)(x)
    syncbn.convert_sync_batchnorm(layer, fuse=True)
    calls = []
    monkeypatch.setattr(type(act), "forward", lambda _, v: (calls.append(1), v.relu())[1])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == (0 if type(drop) is nn.Identity else 1)
    syncbn.revert_sync_batchnorm(layer)
    assert type(layer).__name__ == "BatchNormAct2d"
    assert not any(name.startswith("_syncbn") for name in vars(layer))


def _train(rank, group, fuse):
    model = block(nn.LeakyReLU(0.25)).double()
    syncbn.convert_sync_batchnorm(model, group, fuse=fuse)
    assert isinstance(model[1], syncbn.SyncBatchNormAct) == fuse
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
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
