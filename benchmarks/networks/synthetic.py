"""A residual network of any size, for measuring how cost grows with parameters. Random weights; no paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RECORD = {
    "task": "classification",
    "input": {"shape": [1, 3, 8, 8], "value_range": [0, 1], "mean": [], "std": [], "colour": "RGB", "resize": None},
    "output": {"shape": [1, 10]},
    "options": {},
    "weights": "factory",
    "paper": "",
    "licence": "Apache-2.0",
    "source": "random weights of a fixed seed",
}
DEPTH = 8  # the same number of layers whatever the size: what grows is their width


class Synthetic(nn.Module):
    """RGB (N, 3, 8, 8) to logits (N, 10): DEPTH residual 3x3 convolutions at 4x4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(DEPTH))
        self.tail = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for layer in self.body:
            x = x + torch.relu(layer(x))
        return self.tail(x.mean((2, 3)))


def width_for(parameters: float) -> int:
    """The width, a multiple of 8, at which the network has about so many parameters."""
    return max(8, 8 * round(math.sqrt(parameters / (9 * DEPTH)) / 8))


def synthetic(*, width: int = 120) -> nn.Module:
    """About 72 * width^2 parameters."""
    torch.manual_seed(0)
    return Synthetic(width)
