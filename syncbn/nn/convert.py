"""Conversion of a model's BatchNorm layers to SyncBatchNorm, and back.

A layer is converted by changing its class, not by building another layer: everything else that makes it what it is
stays (parameters, buffers, hooks, attributes, training mode, every reference to it from wherever), and so does the
way back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..comm import GroupHandle, Labels, as_communicator
from .fuse import epilogue_of_fused, fuse_activations, unfuse_activations
from .layer import SyncBatchNorm
from .noisy import NoisySyncBatchNorm, add_noise, check_levels, check_seeds, remove_noise

M = TypeVar("M", bound=nn.Module)


class BatchNormNd(_BatchNorm):
    """nn.BatchNorm1d, 2d and 3d in one: what a SyncBatchNorm that was never converted reverts to."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 axes, (N, C, ...); got {input.dim()}: reshape it")


class _Original(NamedTuple):
    """What a converted layer was, kept in the layer.

    Attributes:
        layer_class: its class.
        group: the attribute process_group of a torch.nn.SyncBatchNorm, or one of the user's.
    """

    layer_class: type[_BatchNorm]
    group: GroupHandle | None


# What becomes a SyncBatchNorm and nothing else: DistributedDataParallel refuses instances of the first on CPUs.
_PLAIN = (nn.SyncBatchNorm, BatchNormNd)
# Layers of timm that go on from batch normalisation to dropout and activation, known by name so as not to import timm.
_NORM_ACT = ("BatchNormAct2d", "SyncBatchNormAct")


def convert_sync_batchnorm(
    module: M,
    process_group: Any = None,
    fuse: bool = False,
    *,
    noise: tuple[Any, Any] | None = None,
    seed: int | None = None,
) -> M:
    """Turns every BatchNorm layer of a model into a syncbn.SyncBatchNorm, in place.

    Layers are the same objects afterwards, with another class: hooks, custom attributes, sharing, training mode and
    requires_grad are untouched, and revert_sync_batchnorm is the exact inverse. A layer stays an instance of its class,
    nn.BatchNorm2d, say, and refuses inputs of another number of axes as that does; but one that was a
    torch.nn.SyncBatchNorm is an instance of that no more, for DistributedDataParallel refuses those on CPUs. Subclasses
    without a forward of their own keep the rest of their behaviour, and timm's BatchNormAct2d its dropout and
    activation. Other subclasses with a forward of their own are left as they are, as are parametrized layers, and a
    warning names them, and the modules with batch normalisation that cannot be reached: scripted and traced ones, and
    graphs of torch.fx. torch.ao.quantization fuses reverted models.

    Args:
        module: the model; it may be a BatchNorm layer itself.
        process_group: of every converted layer, and of every SyncBatchNorm already there; see syncbn.SyncBatchNorm.
            None leaves the groups that torch.nn.SyncBatchNorm and syncbn.SyncBatchNorm layers have.
        fuse: whether every nn.Sequential that has a BatchNorm layer with an activation behind it (ReLU, LeakyReLU or
            SiLU) runs the two in one pass, and timm's BatchNormAct2d, too. Its modules stay as they are, and may be
            exchanged. Where one of the two has hooks, each runs by itself.
        noise: noise_mean and noise_var of syncbn.NoisySyncBatchNorm, (0.1, 0.1), say: every layer becomes one of those,
            also a SyncBatchNorm already there, and one that is noisy already gets these levels and the new seed. A
            SyncBatchNormAct of your own making is left without noise, and a warning names it. Make the optimizer
            afterwards: the layers have new parameters. None leaves what noise there is.
        seed: of the noise; each layer has a stream of its own out of it. None: see NoisySyncBatchNorm.

    Returns:
        module.

    Raises:
        ValueError: a lazy layer that has not seen its first batch; nothing is converted then.
        TypeError: module is no Module.
        TypeError, ValueError: process_group, as syncbn.SyncBatchNorm; noise and seed, as syncbn.NoisySyncBatchNorm.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> convert_sync_batchnorm(model)[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> type(revert_sync_batchnorm(model)[1]).__name__
        'BatchNorm2d'
    """
    if process_group is not None:
        as_communicator(process_group)
    _check_module(module)
    layers = _batch_norm_layers(module)
    base = SyncBatchNorm if noise is None else NoisySyncBatchNorm
    seeds = check_seeds(seed, len(layers), noise)
    levels = {} if noise is None else {name: check_levels(layer.num_features, *noise) for name, layer in layers.items()}
    classes = {name: _synchronised(layer, base) for name, layer in layers.items() if not isinstance(layer, base)}
    for layer in layers.values():
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is not None:
            as_communicator(layer.process_group)
    # Nothing was changed so far, and nothing fails from here on.
    for name, synchronised in classes.items():
        if synchronised is not None:
            _become(layers[name], synchronised, name)
    for layer in layers.values():
        if isinstance(layer, SyncBatchNorm) and process_group is not None:
            layer.process_group = process_group
    _add_noise(layers, levels, seeds)
    if fuse:
        fuse_activations(module)
    _warn_of_left([(name, layers[name]) for name, synchronised in classes.items() if synchronised is None])
    _warn_of_hidden_layers(module)
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Turns every SyncBatchNorm of a model back into what it was before convert_sync_batchnorm, in place.

    A layer that was built as a SyncBatchNorm becomes a BatchNorm layer for inputs of any number of axes.

    Args:
        module: the model; it may be a SyncBatchNorm itself.

    Returns:
        module.
    """
    _check_module(module)
    unfuse_activations(module)
    unknown = []
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        original = layer.__dict__.get("_syncbn_original")
        if type(layer) is not _class_of(layer, original):
            unknown.append(_name(name, layer))
            continue
        if isinstance(layer, NoisySyncBatchNorm):
            remove_noise(layer)
        layer.__dict__.pop("_syncbn_original", None)
        layer.__dict__.pop("_syncbn_mask", None)
        del layer._syncbn_group
        layer_class: Any = BatchNormNd if original is None else original.layer_class
        layer.__class__ = layer_class
        if original is not None and original.group is not None:
            layer.__dict__["process_group"] = original.group.group
    if unknown:
        warnings.warn(
            "left as they are, synchronised, for no BatchNorm layer does what they do (subclasses, and each "
            f"SyncBatchNormAct that was not converted from one): {', '.join(unknown)}",
            stacklevel=2,
        )
    return module


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected the model, a torch.nn.Module; got {type(module).__name__}: convert each by itself")


def _batch_norm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    lazy = [_name(name, layer) for name, layer in layers.items() if isinstance(layer, LazyModuleMixin)]
    if lazy:
        raise ValueError(
            f"expected BatchNorm layers that know their number of channels; got lazy ones, {', '.join(lazy)}: send "
            "one batch through the model before converting it"
        )
    return layers


def _add_noise(layers: dict[str, _BatchNorm], levels: dict[str, dict[str, Tensor]], seeds: list[int | None]) -> None:
    """Gives the noisy ones of a model's layers their levels and seeds."""
    for (name, level), seed in zip(levels.items(), seeds, strict=True):
        layer = layers[name]
        if isinstance(layer, NoisySyncBatchNorm):
            like = next((v for v in (layer.weight, layer.running_mean) if v is not None), torch.empty(0))
            add_noise(layer, level, seed, like.device, like.dtype)


def _warn_of_left(layers: list[tuple[str, _BatchNorm]]) -> None:
    unknown = [_name(name, layer) for name, layer in layers if not isinstance(layer, SyncBatchNorm)]
    silent = [_name(name, layer) for name, layer in layers if isinstance(layer, SyncBatchNorm)]
    if unknown:
        warnings.warn(
            "left as they are, not synchronised, because their forward is their own or they are parametrized: "
            f"{', '.join(unknown)}",
            stacklevel=3,
        )
    if silent:
        warnings.warn(
            f"left as they are, without noise, because no NoisySyncBatchNorm does what they do: {', '.join(silent)}",
            stacklevel=3,
        )


def _warn_of_hidden_layers(module: nn.Module) -> None:
    hidden = [_name(name, part) for name, part in module.named_modules() if _hides_batch_norm(part)]
    if hidden:
        warnings.warn(
            "not synchronised: batch normalisation within what torch.jit or torch.fx has made, which cannot be "
            f"converted: {', '.join(hidden)}; convert the model first, then script, trace or export it",
            stacklevel=3,
        )


def _hides_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a scripted or traced BatchNorm layer, or a graph that calls batch normalisation."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in getattr(module, "original_name", "")
    graph = getattr(module, "graph", None) if isinstance(module, torch.fx.GraphModule) else None
    return graph is not None and any(
        node.op == "call_function" and "batch_norm" in str(node.target) and "syncbn" not in str(node.target)
        for node in graph.nodes
    )


def _become(layer: Any, synchronised: type[SyncBatchNorm], name: str) -> None:
    """Makes a layer one of that class, known by that name."""
    if isinstance(layer, SyncBatchNorm):  # without noise so far
        layer.__class__ = synchronised
        return
    # The attribute of torch.nn.SyncBatchNorm, or of the user's, that has the name of our property.
    group = GroupHandle(layer.__dict__.pop("process_group")) if "process_group" in layer.__dict__ else None
    own = group.group if group is not None and isinstance(layer, nn.SyncBatchNorm) else None
    layer.__dict__["_syncbn_original"] = _Original(type(layer), group)
    layer.__class__ = synchronised
    layer.process_group = own
    if name:
        layer._syncbn_group.labels = Labels.of(name)


def _synchronised(layer: _BatchNorm, base: type[SyncBatchNorm]) -> type[SyncBatchNorm] | None:
    """Returns the class that a layer gets, or None where it would not keep its behaviour."""
    if isinstance(layer, SyncBatchNorm):
        original = layer.__dict__.get("_syncbn_original")
        return _class_of(layer, original, base) if type(layer) is _class_of(layer, original) else None
    if "forward" in layer.__dict__ or is_parametrized(layer):
        return None
    return _synchronised_class(type(layer), base)


def _class_of(
    layer: SyncBatchNorm, original: _Original | None, base: type[SyncBatchNorm] | None = None
) -> type[SyncBatchNorm] | None:
    """Returns the class that a SyncBatchNorm has which was converted, or built as one; with another base."""
    base = base or (NoisySyncBatchNorm if isinstance(layer, NoisySyncBatchNorm) else SyncBatchNorm)
    return base if original is None else _synchronised_class(original.layer_class, base)


def _synchronised_class(original: Any, base: Any) -> type[SyncBatchNorm] | None:
    if original in _PLAIN:
        plain: type[SyncBatchNorm] = base
        return plain
    definer = next(parent for parent in original.__mro__ if "forward" in parent.__dict__)
    if definer.__name__ in _NORM_ACT and definer.__module__.partition(".")[0] == "timm":
        return _subclass(original, _norm_act_forward, base)
    if definer is _BatchNorm:
        return _subclass(original, SyncBatchNorm.forward, base)
    return None


def _norm_act_forward(self: Any, x: Tensor) -> Tensor:
    epilogue = epilogue_of_fused(self)
    if epilogue is not None:
        return self._normalise(x, epilogue)  # type: ignore[no-any-return]
    y: Tensor = self.act(self.drop(SyncBatchNorm.forward(self, x)))
    return y


@functools.cache
def _subclass(original: Any, forward: Callable[..., Tensor], base: Any) -> type[SyncBatchNorm]:
    """Makes a class that is a SyncBatchNorm, with noise or without, in its arithmetic and `original` in all else."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be found by: pickles and copies make it anew from the original.
        return _new_layer, (original, base), *original.__reduce_ex__(self, protocol)[2:]

    # DistributedDataParallel refuses subclasses of torch.nn.SyncBatchNorm on CPUs.
    bases = (base,) if issubclass(original, nn.SyncBatchNorm) else (base, original)
    is_torchs = original in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    module = SyncBatchNorm.__module__ if is_torchs else original.__module__
    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce, "__module__": module}
    if not issubclass(original, nn.SyncBatchNorm):
        members |= {"_check_input_dim": original._check_input_dim, "_checks_input_dim": True}
    name = "SyncBatchNorm" if is_torchs else f"Sync{original.__name__.removeprefix('Sync')}"
    return type(name if base is SyncBatchNorm else f"Noisy{name}", bases, members)


def _new_layer(original: type[_BatchNorm], base: type[SyncBatchNorm] = SyncBatchNorm) -> SyncBatchNorm:
    layer_class = _synchronised_class(original, base)
    assert layer_class is not None  # it was made from this original before
    return layer_class.__new__(layer_class)


def _name(name: str, layer: nn.Module) -> str:
    return f"{name or 'the module itself'} ({type(layer).__name__})"
