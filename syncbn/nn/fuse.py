"""Activations taken over by the SyncBatchNorm layers before them, and given back."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from ..kernels import Epilogue as Tail
from .layer import SyncBatchNorm
from .norm_act import SyncBatchNormAct

_MARK = "_syncbn_fused"  # on a layer that activates, too
_ATTRIBUTES = ("act", "inplace", "negative_slope")


class FusedActivation(nn.Identity):
    """In the place of an activation that the SyncBatchNormAct before it took over: an identity while that activates."""

    def __init__(self, activation: nn.Module, layer: SyncBatchNorm) -> None:
        super().__init__()
        self.training = activation.training
        self.__dict__.update(activation=activation, layer=layer)  # no submodules: it only stands in for one

    def forward(self, input: Tensor) -> Tensor:
        """Returns input, or activates it where the layer was reverted without this."""
        if _MARK in self.__dict__["layer"].__dict__:
            return input
        y: Tensor = self.__dict__["activation"](input)
        return y

    def extra_repr(self) -> str:
        """Which activation it was."""
        return repr(self.__dict__["activation"])


def fuse_activations(module: nn.Module) -> None:
    """Lets the SyncBatchNorm layers of a model take over the activations behind them, where that changes no result."""
    uses = [id(layer) for _, layer in module.named_modules(remove_duplicate=False)]
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and hasattr(layer, "drop") and hasattr(layer, "act"):
            layer.__dict__[_MARK] = True
        # A Sequential with a forward of its own may do anything with its layers.
        if not isinstance(layer, nn.Sequential) or "forward" in layer.__dict__:
            continue
        if type(layer).forward is nn.Sequential.forward:
            _fuse_pairs(layer, uses)


def _fuse_pairs(parent: nn.Sequential, uses: list[int]) -> None:
    for slot, following in itertools.pairwise(list(parent._modules)):
        layer, activation = parent._modules[slot], parent._modules[following]
        tail = None if activation is None else _tail_of(activation)
        # A layer that runs in another place, too, need not be followed by the activation there.
        if tail is None or activation is None or type(layer) is not SyncBatchNorm or _altered(layer):
            continue
        if uses.count(id(layer)) == 1 and not any(name in layer.__dict__ for name in _ATTRIBUTES):
            layer.__dict__.update(zip((_MARK, *_ATTRIBUTES), (True, tail.activation, False, tail.slope), strict=True))
            layer.__class__ = SyncBatchNormAct
            parent._modules[following] = FusedActivation(activation, layer)


def unfuse_activations(module: nn.Module) -> None:
    """Undoes fuse_activations."""
    layer: Any
    for layer in module.modules():
        if layer.__dict__.pop(_MARK, False) and type(layer) is SyncBatchNormAct:
            for attribute in _ATTRIBUTES:
                del layer.__dict__[attribute]
            layer.__class__ = SyncBatchNorm  # type: ignore[assignment]
        for slot, child in layer._modules.items():
            if isinstance(child, FusedActivation):
                child.__dict__["activation"].training = child.training
                layer._modules[slot] = child.__dict__["activation"]


def tail_of_fused(layer: Any) -> Tail | None:
    """Returns the activation of a layer like timm's BatchNormAct2d as a tail, or None where it is to run by itself."""
    if _MARK not in layer.__dict__ or type(layer.drop) is not nn.Identity or _altered(layer.drop):
        return None
    return _tail_of(layer.act)


def _tail_of(activation: nn.Module) -> Tail | None:
    if _altered(activation):
        return None
    if type(activation) is nn.LeakyReLU:
        return Tail("leaky_relu", activation.negative_slope) if activation.negative_slope >= 0 else None
    tails: dict[Any, Tail] = {nn.ReLU: Tail("relu"), nn.SiLU: Tail("silu")}
    return tails.get(type(activation))


def _altered(layer: nn.Module) -> bool:
    """Whether something waits for this very module to run, or runs in its place."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks) or "forward" in layer.__dict__
