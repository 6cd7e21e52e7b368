"""Residual networks of He et al. 2015, of basic blocks: what training steps are timed on, without torchvision."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """Of a network: the blocks of each stage, and the channels of the first; each further stage has twice as many."""

    blocks: tuple[int, ...]
    width: int


SHAPES = {"resnet18": Shape((2, 2, 2, 2), 64), "small": Shape((1, 1, 1, 1), 16)}


class Block(nn.Module):
    """Two convolutions, each with its norm, and what goes around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.around = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = F.relu(self.norm1(self.conv1(input)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.around(input)
        return F.relu(y, inplace=True)


def resnet(shape: Shape, classes: int = 1000) -> nn.Sequential:
    """Returns the network, with nn.BatchNorm2d, for images of three channels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, shape.width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(shape.width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    channels = shape.width
    for stage, blocks in enumerate(shape.blocks):
        out = shape.width << stage
        for block in range(blocks):
            layers.append(Block(channels, out, 2 if stage and not block else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
