"""Pairs of a SyncBatchNorm and the activation behind it, computed in one pass where an nn.Sequential runs both.

The Sequential decides at every call, from the modules that are then in it. Neither of the two modules knows of the
other, so that one may be exchanged, folded into a convolution, removed or copied, and hooks may come and go: what runs
is always what the modules say.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..kernels import Epilogue
from .layer import SyncBatchNorm

_has_any_global_hook: Any = _module._has_any_global_hook


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs each SyncBatchNorm and the ReLU, LeakyReLU or SiLU behind it in one pass.

    Only where nothing waits for one of them: a hook, a forward of its own, or tracing by torch.fx.
    """

    def forward(self, input: Any) -> Any:
        """Runs the modules in turn."""
        # A proxy of torch.fx is to see every module, as is a global hook.
        if not isinstance(input, Tensor) or _has_any_global_hook():
            return super().forward(input)  # type: ignore[no-untyped-call]
        modules = iter(self._modules.values())
        following: Any = next(modules, None)
        while following is not None:
            module, following = following, next(modules, None)
            epilogue = _epilogue_of_pair(module, following)
            if epilogue is None:
                input = module(input)
            else:
                input, following = module._normalise(input, epilogue), next(modules, None)
        return input


def fuse_activations(module: nn.Module) -> None:
    """Lets the Sequentials of a model that have such pairs fuse them, and layers like timm's BatchNormAct2d."""
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and hasattr(layer, "drop") and hasattr(layer, "act"):
            layer.__dict__[_MARK] = True
        # A Sequential with a forward of its own may do anything with its layers.
        if not isinstance(layer, nn.Sequential) or "forward" in layer.__dict__:
            continue
        if type(layer).forward is nn.Sequential.forward and any(
            _epilogue_of_pair(*pair) for pair in itertools.pairwise(layer)
        ):
            original: Any = type(layer)
            layer.__class__ = _fused_class(original)


def unfuse_activations(module: nn.Module) -> None:
    """Undoes fuse_activations."""
    for layer in module.modules():
        layer.__dict__.pop(_MARK, None)
        original = getattr(type(layer), "_syncbn_original_class", None)
        if original is not None:
            layer.__class__ = original


def epilogue_of_fused(layer: Any) -> Epilogue | None:
    """Returns the activation of a layer like timm's BatchNormAct2d, or None where it is to run by itself."""
    if _MARK not in layer.__dict__ or type(layer.drop) is not nn.Identity or _is_altered(layer.drop):
        return None
    return _epilogue_of(layer.act)


_MARK = "_syncbn_fused"  # on a layer that is to activate, too


@functools.cache
def _fused_class(original: Any) -> type[nn.Sequential]:
    """Makes a class that is a FusedSequential and `original`."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be found by: pickles and copies make it anew from the original.
        return _new_sequential, (original,), *original.__reduce_ex__(self, protocol)[2:]

    bases = (FusedSequential,) if original is nn.Sequential else (FusedSequential, original)
    members = {"__reduce_ex__": reduce, "__module__": original.__module__, "_syncbn_original_class": original}
    return type(f"Fused{original.__name__}", bases, members)


def _new_sequential(original: Any) -> nn.Sequential:
    fused = _fused_class(original)
    return fused.__new__(fused)


def _epilogue_of_pair(layer: Any, following: Any) -> Epilogue | None:
    """Returns the epilogue with which the layer does both, or None where each is to run by itself."""
    if not isinstance(layer, SyncBatchNorm) or type(layer).forward is not SyncBatchNorm.forward:
        return None
    epilogue = _epilogue_of(following)
    return None if epilogue is None or _is_altered(layer) else epilogue


def _epilogue_of(activation: Any) -> Epilogue | None:
    if type(activation) is nn.ReLU:
        epilogue = Epilogue("relu")
    elif type(activation) is nn.SiLU:
        epilogue = Epilogue("silu")
    elif type(activation) is nn.LeakyReLU and activation.negative_slope >= 0:
        epilogue = Epilogue("leaky_relu", float(activation.negative_slope))
    else:
        return None
    return None if _is_altered(activation) else epilogue


def _is_altered(module: nn.Module) -> bool:
    """Whether something waits for this very module to run, or runs in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__
