"""Tiny Darknet for ImageNet as an encoder of images: its maps before each halving.

Redmon, Darknet (public domain), cfg/tiny.cfg. Weights: tiny-darknet/tiny_darknet_fp32.pth in ../shared/assets.
"""

from __future__ import annotations

import torch
from torch import nn

# (output channels, kernel) of each convolution, 0: halved
LAYERS = (
    (16, 3), 0, (32, 3), 0, (16, 1), (128, 3), (16, 1), (128, 3), 0, (32, 1), (256, 3), (32, 1), (256, 3), 0, (64, 1),
    (512, 3), (64, 1), (512, 3), (128, 1),
)  # fmt: skip


class TinyDarknet(nn.Module):
    """RGB (N, 3, H, W) in 0..1, H and W divisible by 16, to five maps, at 1/1 to 1/16."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels = 3
        for layer in LAYERS:
            if isinstance(layer, int):
                parts.append(nn.MaxPool2d(2, 2))
                continue
            made, kernel = layer
            parts += [nn.Conv2d(channels, made, kernel, padding=kernel // 2, bias=False),
                      nn.BatchNorm2d(made, eps=1e-3), nn.LeakyReLU(0.1)]  # fmt: skip
            channels = made
        self.f = nn.ModuleList(parts)
        self.h = nn.Conv2d(channels, 1000, 1)  # the classifier: no map needs it, and the weights have it

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps."""
        maps = []
        for part in self.f:
            if isinstance(part, nn.MaxPool2d):
                maps.append(x)
            x = part(x)
        return [*maps, x]


def maps() -> nn.Module:
    """The network without its weights."""
    return TinyDarknet()
