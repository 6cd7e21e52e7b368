"""The named shapes that the benchmarks measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Case:
    """One shape of a layer's input on one device.

    Attributes:
        name: what --case selects it by.
        shape: (N, C) or (N, C, H, W).
        about: where such a layer is found.
    """

    name: str
    shape: tuple[int, ...]
    about: str

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    def layouts(self, wanted: tuple[str, ...] = LAYOUTS) -> tuple[str, ...]:
        """Returns the wanted memory formats that differ for this shape: (N, C) has one, which counts as contiguous."""
        return wanted if len(self.shape) > 2 else ("contiguous",)

    def ncs(self, layout: str) -> tuple[int, int, int]:
        """Returns the (n, c, s) that kernels see, (N * H * W, C, 1) for channels last."""
        n, c, s = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        return (n * s, c, 1) if layout == "channels_last" else (n, c, s)


CASES = (
    Case("resnet50-conv1", (8, 64, 112, 112), "ResNet-50, bn1, after the first convolution"),
    Case("resnet50-layer1", (8, 64, 56, 56), "ResNet-50, layer1.*.bn1 and bn2"),
    Case("resnet50-layer1-out", (8, 256, 56, 56), "ResNet-50, layer1.*.bn3, with the residual added after it"),
    Case("resnet50-layer2", (8, 128, 28, 28), "ResNet-50, layer2.*.bn2"),
    Case("resnet50-layer3", (8, 256, 28, 28), "ResNet-50, layer3.0.bn1"),
    Case("resnet50-layer4", (8, 512, 14, 14), "ResNet-50, layer4.0.bn1"),
    Case("resnet50-layer4-out", (8, 2048, 7, 7), "ResNet-50, layer4.*.bn3, with the residual added after it"),
    Case("mobilenetv2-2", (8, 96, 112, 112), "MobileNetV2, features.2, after the expansion"),
    Case("mobilenetv2-4", (8, 144, 56, 56), "MobileNetV2, features.4, after the expansion"),
    Case("mobilenetv2-7", (8, 192, 28, 28), "MobileNetV2, features.7, after the expansion"),
    Case("mobilenetv2-14", (8, 576, 14, 14), "MobileNetV2, features.14, after the expansion"),
    Case("mobilenetv2-17", (8, 960, 7, 7), "MobileNetV2, features.17, after the expansion"),
    Case("detection", (2, 64, 128, 128), "two larger images a device, as in detection"),
    Case("segmentation", (2, 64, 256, 256), "two images at full resolution, as in segmentation"),
    Case("points", (200_000, 64), "features of points, voxels or nodes"),
    Case("mlp", (4096, 64), "a multi-layer perceptron"),
    Case("tiny", (32, 64), "so small that only the cost of a call is left"),
    Case("tiny-spatial", (4, 32, 7, 7), "the same, with spatial axes"),
)


def select(pattern: str) -> tuple[Case, ...]:
    """Returns the cases of a name or a glob, such as "tiny" or "resnet50-*".

    Raises:
        ValueError: no case has such a name.
    """
    found = tuple(case for case in CASES if fnmatchcase(case.name, pattern))
    if not found:
        raise ValueError(
            f"expected the name of a case, or a glob of names; got {pattern!r}: --list shows them "
            f"({', '.join(case.name for case in CASES)})"
        )
    return found


def listing() -> str:
    """Returns a line per case: name, shape, where it is found."""
    width = max(len(case.name) for case in CASES)
    return "\n".join(f"{case.name:<{width}}  {case.shape!s:<20}  {case.about}" for case in CASES)
