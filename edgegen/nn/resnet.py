"""The CIFAR form of ResNet: a 3x3 stem, three stages at 1, 1/2 and 1/4 size, global mean, one linear layer.

He et al., 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2; shortcuts that change the
shape are a 1x1 convolution and a batch norm (option B), so that channel pruning can follow them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Block(nn.Module):
    """ReLU(f(x) + shortcut(x)) with two 3x3 convolutions: (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Normalised RGB (N, 3, H, W), H and W at least 8, to logits (N, classes)."""

    def __init__(self, widths: Sequence[int], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages, inputs = [], widths[0]
        for index, width in enumerate(widths):
            first = Block(inputs, width, 1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1))))
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The output of every stage: (N, widths[i], H / 2^i, W / 2^i)."""
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)[-1]).flatten(1))
