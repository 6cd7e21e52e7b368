"""Converts and reverts every model of torchvision or timm that has BatchNorm, and compares outputs in one process.

    python tests/support/zoo.py torchvision    python tests/support/zoo.py timm [pattern]

Not part of the test suite, for these libraries want another torch and most of an hour. For each model: outputs in
evaluation mode are the same bits before, between and after, no BatchNorm is left out, and every layer is of its first
class again; in training mode, in float64 and without dropout, outputs are within 1e-9 of the largest.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

_LARGEST = 5e7  # parameters


def tensors(output: object) -> Iterator[Tensor]:
    """All tensors in a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What model makes of x; detection models take a list of images."""
    torch.manual_seed(0)
    detects = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    with torch.no_grad():
        return list(tensors(model(list(x) if detects else x)))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors have the same bits; NaN where the other has NaN."""
    return len(a) == len(b) and all(torch.equal(v.nan_to_num(), w.nan_to_num()) for v, w in zip(a, b, strict=True))


def faults(model: nn.Module, x: Tensor) -> list[str]:
    """What conversion and reversion break."""
    found = []
    classes = [type(m) for m in model.modules()]
    before = outputs(model.eval(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert_sync_batchnorm(model)
    if any(isinstance(m, _BatchNorm) and not isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()):
        found.append("a BatchNorm layer is left")
    if not same(outputs(model, x), before):
        found.append("outputs in evaluation differ")
    syncbn.revert_sync_batchnorm(model)
    if [type(m) for m in model.modules()] != classes:
        found.append("a layer is of another class")
    if not same(outputs(model, x), before):
        found.append("outputs after reversion differ")
    model.double().train()
    for m in model.modules():
        if "drop" in type(m).__name__.lower() or "stochastic" in type(m).__name__.lower():
            m.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        expected = outputs(model, x.double())
    except (AssertionError, ValueError) as error:
        print(f"    no training mode without targets: {error}"[:100])
        return found
    model.load_state_dict(state)
    for a, b in zip(outputs(syncbn.convert_sync_batchnorm(model), x.double()), expected, strict=True):
        if a.is_floating_point() and not torch.allclose(a, b, rtol=0, atol=1e-9 * float(b.abs().max()), equal_nan=True):
            found.append(f"outputs in training differ by {(a - b).abs().max():.1e}")
    return found


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, constructor and input size of every model on 2-D images, and the video ones."""
    from torchvision import models

    for name in models.list_models():
        if name.startswith("quantized") or "raft" in name:
            continue
        dense = any(word in name for word in ("deeplab", "fcn", "lraspp", "rcnn", "ssd", "retina", "fcos"))
        options = {"weights_backbone": None} if dense else {}
        video = any(word in name for word in ("3d", "mvit", "r2plus1d", "mc3", "s3d"))
        size = (3, 16, 112, 112) if video else (3, 224, 224) if "vit" in name else (3, 299, 299)
        yield name, lambda name=name, options=options: models.get_model(name, weights=None, **options), size


def timm_models(pattern: str) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, constructor and input size of every model whose name fits."""
    import timm

    for name in timm.list_models(pattern):
        size = timm.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
        yield name, lambda name=name: timm.create_model(name), size


def main(library: str, pattern: str = "*") -> int:
    """Returns how many models conversion breaks, and prints a line a model."""
    broken = checked = 0
    for name, make, size in torchvision_models() if library == "torchvision" else timm_models(pattern):
        with torch.device("meta"):
            skeleton = make()
        layers = sum(isinstance(m, _BatchNorm) for m in skeleton.modules())
        if not layers or sum(p.numel() for p in skeleton.parameters()) > _LARGEST:
            continue
        found = faults(make(), torch.randn(2, *size))
        checked, broken = checked + 1, broken + bool(found)
        print(f"{'FAIL' if found else 'ok':<5}{name}: {layers} layers {'; '.join(found)}", flush=True)
    print(f"{checked} models, {broken} broken")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
