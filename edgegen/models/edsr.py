"""EDSR, x4 super-resolution: a body of convolutions at low resolution, one pixel shuffle, a bilinear skip.

Lim et al., 2017, Enhanced Deep Residual Networks for Single Image Super-Resolution, arXiv:1707.02921, in a small form:
64 channels and 8 blocks instead of 256 and 32, one convolution to 3 * 4^2 channels and one shuffle instead of two
stages, and y = bilinear(x) + f(x), so that f learns only the detail that bilinear enlargement lacks.
"""

from __future__ import annotations

import torch
from torch import nn

RECORD = {
    "task": "super-resolution",
    "input": {
        "shape": [1, 3, 64, 64],
        "value_range": [0, 1],
        "mean": [],
        "std": [],
        "colour": "RGB",
        "resize": None,
    },
    "output": {"shape": [1, 3, 256, 256], "value_range": [0, 1]},
    "options": {"scale": 4, "calibration": "photos"},
    "paper": "Lim et al., 2017, EDSR, arXiv:1707.02921",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/edsr.py, trained on kodak24 and ten photos under CC-BY-2.0 or in the public domain",
}


class Block(nn.Module):
    """x + conv(ReLU(conv(x))), no norm: (N, C, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.relu(self.conv1(x)))


class EDSR(nn.Module):
    """RGB 0..1 (N, 3, H, W) to (N, 3, scale * H, scale * W), about 0..1; clamping is the caller's."""

    def __init__(self, channels: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.fuse = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        self.enlarge = nn.Upsample(scale_factor=float(scale), mode="bilinear", align_corners=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shallow = self.head(x)
        deep = shallow
        for block in self.body:
            deep = block(deep)
        detail = self.tail(shallow + self.fuse(deep))
        return self.enlarge(x) + self.shuffle(detail)


def create(channels: int = 64, blocks: int = 8, scale: int = 4) -> nn.Module:
    """A fresh EDSR; its detail branch starts at zero, so an untrained one is a bilinear enlargement.

    Args:
        channels: width of every layer of the body.
        blocks: residual blocks.
        scale: enlargement of height and width.
    """
    model = EDSR(channels, blocks, scale)
    nn.init.zeros_(model.tail.weight)
    if model.tail.bias is not None:
        nn.init.zeros_(model.tail.bias)
    return model
