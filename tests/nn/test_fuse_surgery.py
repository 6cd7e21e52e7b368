"""What is done to a model after convert_sync_batchnorm(fuse=True) has the effect that it has without fusion."""

import copy
import pickle

import pytest
import torch
from support.tolerances import rounding
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn

# Applied twice, it differs from once; lost, too.
SLOPE = 0.25


def block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(SLOPE), nn.Conv2d(4, 4, 1))
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    model(torch.randn(8, 4, 6, 6))
    return model


class Negated(nn.Module):
    """A module around another."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return -self.module(x)


def surgery(*slots):
    """Makes a function of functions that return what to put into the slots, given the model."""

    def operate(model, *makes):
        for slot, make in zip(slots, makes, strict=True):
            model[slot] = make(model)
        return model

    return lambda *makes: lambda model: operate(model, *makes)


def deleting(slot):
    def operate(model):
        del model[slot]
        return model

    return operate


def after(slot, register):
    """Does something to a layer."""

    def operate(model):
        register(model[slot])
        return model

    return operate


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: -forward(x)


def reverted(part):
    def operate(model):
        syncbn.revert_sync_batchnorm(part(model))
        return model

    return operate


NEGATE = {
    "hook": lambda layer: layer.register_forward_hook(lambda _, __, y: -y),
    "pre_hook": lambda layer: layer.register_forward_pre_hook(lambda _, x: (-x[0],)),
    "own_forward": replace_forward,
}
SEPARATING = {
    "fold_into_conv": surgery(0, 1)(lambda m: fuse_conv_bn_eval(m[0].eval(), m[1].eval()), lambda _: nn.Identity()),
    "norm_to_identity": surgery(1)(lambda _: nn.Identity()),
    "norm_to_new_norm": surgery(1)(lambda _: nn.BatchNorm2d(4).double()),
    "norm_to_new_sync": surgery(1)(lambda _: syncbn.SyncBatchNorm(4).double()),
    "act_to_identity": surgery(2)(lambda _: nn.Identity()),
    "act_to_another": surgery(2)(lambda _: nn.Tanh()),
    "act_to_a_fusable_one": surgery(2)(lambda _: nn.SiLU()),
    "delete_norm": deleting(1),
    "delete_act": deleting(2),
    "insert_between": lambda m: m.insert(2, nn.Tanh()),
    "slice_with_norm": lambda m: m[:2],
    "slice_with_act": lambda m: m[2:],
    "norm_alone": lambda m: m[1],
    "copied_norm": lambda m: copy.deepcopy(m[1]),
    "pickled_norm": lambda m: pickle.loads(pickle.dumps(m[1])),
    "copied_act": lambda m: copy.deepcopy(m[2]),
    "wrap_norm": surgery(1)(lambda m: Negated(m[1])),
    "torchs_converter": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m).eval(),
    **{f"{name}_on_norm": after(1, negate) for name, negate in NEGATE.items() if name != "pre_hook"},
    "pre_hook_on_act": after(2, NEGATE["pre_hook"]),
}
# The activation may well stay with the norm in these.
KEEPING = {
    "nothing": lambda m: m,
    "wrap_pair": lambda m: nn.Sequential(m[0], Negated(nn.Sequential(m[1], m[2])), m[3]),
    "wrap_act": surgery(2)(lambda m: Negated(m[2])),
    "children": lambda m: nn.Sequential(*m.children()),
    "sum_of_two": lambda m: m + copy.deepcopy(m),
    "slice_with_pair": lambda m: m[1:3],
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "nested": lambda m: nn.Sequential(m, m),
    "shared": lambda m: m.append(m[1]),
    "reverse": lambda m: nn.Sequential(*reversed(list(m))),
    "pre_hook_on_norm": after(1, NEGATE["pre_hook"]),
    "hook_on_act": after(2, NEGATE["hook"]),
    "own_forward_of_act": after(2, replace_forward),
    "slope": after(2, lambda act: setattr(act, "negative_slope", 0.5)),
    "eval_norm": after(1, lambda norm: norm.eval()),
    "revert_norm": reverted(lambda m: m[1]),
    "revert_slice": reverted(lambda m: m[1:3]),
    "revert": reverted(lambda m: m),
}


def results(model, operate, training):
    """Output and gradient of the input."""
    torch.manual_seed(1)
    model = operate(model.double().train(training))
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    y = model(x)
    return y.detach(), *torch.autograd.grad((y * torch.randn_like(y)).sum(), x)


def same(a, b):
    # Two passes through two convolutions, a norm and an activation: 20 operations forward and 20 backward; 288 terms.
    return all(torch.allclose(v, w, **rounding(torch.float64, 40, 288)) for v, w in zip(a, b, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", [*SEPARATING, *KEEPING])
def test_surgery_has_the_effect_that_it_has_without_fusion(name, training):
    operate = (SEPARATING | KEEPING)[name]
    plain, fused = (syncbn.convert_sync_batchnorm(block(), fuse=fuse) for fuse in (False, True))
    assert type(fused).__name__ == "FusedSequential"
    assert same(results(fused, operate, training), results(plain, operate, training))


@pytest.mark.parametrize("name", SEPARATING)
def test_the_tests_above_see_an_activation_lost_or_doubled(name):
    """The control: a norm layer that owns the activation, whose place an identity takes."""
    plain = syncbn.convert_sync_batchnorm(block())
    owning = copy.deepcopy(plain)
    owning[1] = syncbn.SyncBatchNormAct(4, act="leaky_relu", negative_slope=SLOPE)
    owning[1].load_state_dict(plain[1].state_dict())
    owning[2] = nn.Identity()
    assert same(results(copy.deepcopy(owning), KEEPING["nothing"], False), results(plain, KEEPING["nothing"], False))
    assert not same(results(owning, SEPARATING[name], False), results(plain, SEPARATING[name], False))


def test_backward_hooks_see_the_gradients_of_their_own_module():
    gradients = []
    for fuse in (False, True):
        model = syncbn.convert_sync_batchnorm(block(), fuse=fuse)
        for layer in model[1:3]:
            layer.register_full_backward_hook(lambda _, dx, dy: gradients.append((dx[0], dy[0])))
        results(model, KEEPING["nothing"], True)
    for plain, fused in zip(gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(plain, fused)


def test_hooks_on_every_module_see_every_module():
    model = syncbn.convert_sync_batchnorm(block(), fuse=True)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(8, 4, 6, 6))
    finally:
        handle.remove()
    assert seen == [*model, model]


def test_surgery_on_a_compiled_model_has_its_effect():
    torch._dynamo.reset()
    plain, fused = (syncbn.convert_sync_batchnorm(block(), fuse=fuse).eval() for fuse in (False, True))
    x = torch.randn(8, 4, 6, 6)
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))
    for slot, make in ((2, nn.Tanh), (1, nn.Identity), (2, nn.ReLU)):
        fused[slot] = plain[slot] = make()
        torch.testing.assert_close(compiled(x), plain(x))


def test_frozen_layers_as_timm_makes_them_are_followed_by_their_activation():
    class Frozen(nn.Module):
        def __init__(self, layer):
            super().__init__()
            scale = layer.weight.detach() / (layer.running_var + layer.eps).sqrt()
            self.scale, self.shift = scale, layer.bias.detach() - layer.running_mean * scale

        def forward(self, x):
            return x * self.scale[:, None, None] + self.shift[:, None, None]

    plain, fused = (syncbn.convert_sync_batchnorm(block(), fuse=fuse) for fuse in (False, True))
    expected = results(plain, KEEPING["nothing"], False)
    assert same(results(fused, surgery(1)(lambda m: Frozen(m[1])), True), expected)
