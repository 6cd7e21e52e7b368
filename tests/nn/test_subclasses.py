"""Subclasses of Tensor go through the layer as through nn.BatchNorm, and those that look at operators see ours."""

import copy

import pytest
import torch
from support.ranks import rank_errors
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only

import syncbn


class Sub(torch.Tensor):
    """A subclass with nothing of its own."""


class Meta(torch.Tensor):
    """Carries metadata from inputs to results, as MONAI's MetaTensor does."""

    meta = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.meta = next((v.meta for v in args if isinstance(v, cls) and v.meta is not None), None)
        return result


class Logged(torch.Tensor):
    """A wrapper that lists the operators it sees."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, v):
        return torch.Tensor._make_wrapper_subclass(cls, v.shape, dtype=v.dtype, strides=v.stride())

    def __init__(self, v):
        self.v = v

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        cls.seen.append(str(operator))
        args, kwargs = tree_map_only(cls, lambda w: w.v, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, operator(*args, **kwargs))


class Refusing(Logged):
    """A wrapper that knows torch's operators only."""

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator.namespace == "syncbn":
            raise NotImplementedError(f"no rule for {operator}")
        return super().__torch_dispatch__(operator, types, args, kwargs)


def tensor(seed=0):
    return torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_meta(v):
    v = v.as_subclass(Meta)
    v.meta = {"affine": 1}
    return v


KINDS = {"Sub": lambda v: v.as_subclass(Sub), "Meta": as_meta, "Parameter": nn.Parameter}
LAYERS = {
    "SyncBatchNorm": syncbn.SyncBatchNorm(3, dtype=torch.float64),
    "SyncBatchNormAct": syncbn.SyncBatchNormAct(3, "none", dtype=torch.float64),
}


def assign(y):
    y[0] = 0
    return y


def add(y):
    y += 1
    return y


IN_PLACE = {"nothing": lambda y: y, "relu_": lambda y: y.relu_(), "+=": add, "y[0] =": assign}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("then", IN_PLACE)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_goes_through_as_through_batch_norm(kind, training, requires_grad, then, layer):
    found = []
    for net in (copy.deepcopy(LAYERS[layer]).train(training), nn.BatchNorm2d(3, dtype=torch.float64).train(training)):
        x = KINDS[kind](tensor()).requires_grad_(requires_grad)
        y = IN_PLACE[then](net(x))
        y.pow(2).sum().backward()
        found.append(((type(y), getattr(y, "meta", None), type(x.grad)), [y.as_subclass(torch.Tensor), x.grad]))
        found[-1][1].extend([*(p.grad for p in net.parameters()), *net.buffers()])
    (kinds, values), (expected_kinds, expected) = found
    assert kinds == expected_kinds
    for value, wanted in zip(values, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(value.as_subclass(torch.Tensor), wanted.as_subclass(torch.Tensor))


@pytest.mark.parametrize("kinds", [("Sub", "Sub"), ("Meta", None), (None, "Sub"), ("Parameter", "Meta")])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_may_be_a_subclass(kinds, training):
    layer, found = copy.deepcopy(LAYERS["SyncBatchNormAct"]).train(training), []
    for given in (kinds, (None, None)):
        x, z = (KINDS.get(kind, lambda v: v)(tensor(k)).requires_grad_() for k, kind in enumerate(given))
        y = copy.deepcopy(layer)(x, z)
        assert type(y).__name__ == (
            "Tensor" if given == (None, None) else next(k for k in given if k in ("Sub", "Meta"))
        )
        y.add_(1).pow(2).sum().backward()
        found.append([v.as_subclass(torch.Tensor) for v in (y, x.grad, z.grad)])
    torch.testing.assert_close(*found)


def test_a_subclass_in_place():
    layer = syncbn.SyncBatchNormAct(3, "leaky_relu", inplace=True, dtype=torch.float64)
    x = tensor().as_subclass(Sub).requires_grad_()
    z = x * 1
    y = layer(z)
    assert type(y) is Sub
    assert y.data_ptr() == z.data_ptr()
    y.pow(2).sum().backward()
    plain = tensor().requires_grad_()
    copy.deepcopy(layer)(plain * 1).pow(2).sum().backward()
    torch.testing.assert_close(x.grad.as_subclass(torch.Tensor), plain.grad)


def wrapped_step(layer, wrap, unwrap, with_residual):
    x, z = (wrap(tensor(k)).requires_grad_() for k in range(2))
    y = layer(x * 1, z) if with_residual else layer(x * 1)
    y.pow(3).sum().backward()
    assert all(type(v) is type(x) for v in (y, x.grad))
    found = [y, x.grad, z.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return [unwrap(v).detach() for v in found if v is not None]


OPERATORS = ["forward", "backward"]
ACTS = [(None, False), ("none", False), ("silu", False), ("silu", True), ("relu", True)]


@pytest.mark.parametrize(("act", "with_residual"), ACTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrapper_sees_operators(act, with_residual, training):
    options = {"dtype": torch.float64}
    layer = syncbn.SyncBatchNormAct(3, act, **options) if act else syncbn.SyncBatchNorm(3, **options)
    layer.train(training)
    Logged.seen.clear()
    found = wrapped_step(
        copy.deepcopy(layer), Logged, lambda v: v.v if isinstance(v, Logged) else v, with_residual=with_residual
    )
    torch.testing.assert_close(found, wrapped_step(layer, torch.clone, lambda v: v, with_residual=with_residual))
    seen = [name for name in Logged.seen if name.startswith("syncbn.")]
    assert seen == ([f"syncbn.{name}.default" for name in OPERATORS] if training else [])


@pytest.mark.parametrize(("act", "with_residual"), ACTS)
@pytest.mark.parametrize("part", ["a", "b"])
def test_two_tensors_in_one(act, with_residual, part):
    """Everything is done twice, on a and b: the running statistics, which are plain, too; so there are none here."""
    options = {"dtype": torch.float64, "track_running_stats": False}
    layer = syncbn.SyncBatchNormAct(3, act, **options) if act else syncbn.SyncBatchNorm(3, **options)
    found = wrapped_step(
        copy.deepcopy(layer),
        lambda v: TwoTensor(v, v.clone()),
        lambda v: getattr(v, part),
        with_residual=with_residual,
    )
    torch.testing.assert_close(found, wrapped_step(layer, torch.clone, lambda v: v, with_residual=with_residual))


def _one_rank_wraps(rank, group):
    layer = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    layer(Refusing(tensor()) if rank == 0 else tensor())


def test_a_wrapper_that_refuses_the_operators_ends_the_other_ranks_when_its_own_ends():
    """Nothing was sent, and what follows the error is not ours: the others wait until the rank ends, or time out."""
    first, second = rank_errors(_one_rank_wraps, 2, "gloo")
    assert isinstance(first, NotImplementedError)
    assert "no rule for syncbn.forward" in str(first)
    assert isinstance(second, RuntimeError)  # Gloo's: connection closed; or ours, if shared memory is set up
