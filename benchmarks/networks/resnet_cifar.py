"""ResNet-20 ... ResNet-110 for CIFAR-10 with parameter-free ("option A") shortcuts.

He et al., 2015, Deep Residual Learning, arXiv:1512.03385, section 4.2. Weights: resnet20-cifar10.th and
resnet56-cifar10.th in ../shared/assets.

An option-A shortcut takes every second pixel and pads the new channels with zeros. Written as slice and pad, pruning
tools cannot see which channels meet which in the sum. `Shortcut` is the same map as a fixed 1x1 convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "classification",
    "input": {
        "shape": [1, 3, 32, 32],
        "value_range": [0, 1],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "colour": "RGB",
        "resize": None,
    },
    "output": {"shape": [1, 10]},
    "options": {},
    "paper": "He et al., 2015, arXiv:1512.03385",
    "licence": "BSD-2-Clause",
    "source": "akamaster/pytorch_resnet_cifar10",
}


class Shortcut(nn.Conv2d):
    """Every second pixel, zero channels before and after: a 1x1 convolution whose weights are zeros and ones.

    Checkpoints of the original hold no such weights, so the state keeps them only once they differ from the pattern
    (after pruning or training).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1, stride=2, bias=False)
        self._shape = tuple(self.weight.shape)
        self.weight.data.copy_(self._pattern())

    def _pattern(self) -> Tensor:
        outputs, inputs = self._shape[:2]
        pattern = torch.zeros(self._shape)
        before = (outputs - inputs) // 2
        pattern[before + torch.arange(inputs), torch.arange(inputs)] = 1.0
        return pattern

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight.detach()
        if weight.shape != self._shape or not torch.equal(weight, self._pattern().to(weight)):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state:
            super()._load_from_state_dict(state, prefix, *rest)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks with `width`, 2 * `width`, 4 * `width` channels, mean, linear layer."""

    def __init__(self, blocks: int, width: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _layer(width, width, blocks)
        self.layer2 = _layer(width, 2 * width, blocks)
        self.layer3 = _layer(2 * width, 4 * width, blocks)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB (N, 3, H, W) -> logits (N, classes)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _layer(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs), *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def resnet20(*, width: int = 16, classes: int = 10) -> nn.Module:
    """0.27 M parameters at width 16."""
    return ResNet(3, width, classes)


def resnet56(*, width: int = 16, classes: int = 10) -> nn.Module:
    """0.85 M parameters at width 16."""
    return ResNet(9, width, classes)
