"""RLFN: residual local feature network, super-resolution x4.

Kong et al., 2022, arXiv:2205.07514 (the enhanced spatial attention is of Liu et al., 2020, arXiv:2009.11551).
Weights: rlfn-x4.pth in ../shared/assets (the NTIRE 2023 baseline).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "super-resolution",
    "input": {
        "shape": [1, 3, 128, 128],
        "value_range": [0, 255],
        "mean": [],
        "std": [],
        "colour": "RGB",
        "resize": None,
    },
    "output": {"shape": [1, 3, 512, 512], "value_range": [0, 255]},
    "options": {"scale": 4, "calibration": "photos", "luminance": True},
    "paper": "Kong et al., 2022, arXiv:2205.07514",
    "licence": "Apache-2.0",
    "source": "sunny2109/SAFMN",
}
SLOPE = 0.05


class Attention(nn.Module):
    """Enhanced spatial attention: a mask from a strongly reduced copy of the features."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 1)
        self.conv_f = nn.Conv2d(inner, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv4 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape; H and W at least 15."""
        narrow = self.conv1(x)
        coarse = self.conv3(F.max_pool2d(self.conv2(narrow), 7, 3))
        coarse = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(narrow)))


class Block(nn.Module):
    """Three 3x3 convolutions around a shortcut, a 1x1 convolution, attention."""

    def __init__(self, channels: int, middle: int, attention: int):
        super().__init__()
        self.c1_r = nn.Conv2d(channels, middle, 3, padding=1)
        self.c2_r = nn.Conv2d(middle, middle, 3, padding=1)
        self.c3_r = nn.Conv2d(middle, channels, 3, padding=1)
        self.c5 = nn.Conv2d(channels, channels, 1)
        self.esa = Attention(channels, attention)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape."""
        y = x
        for layer in (self.c1_r, self.c2_r, self.c3_r):
            y = F.leaky_relu(layer(y), SLOPE)
        return self.esa(self.c5(x + y))


class RLFN(nn.Module):
    """Four blocks between two 3x3 convolutions, long shortcut, pixel shuffle."""

    def __init__(self, channels: int, middle: int, attention: int, scale: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(3, channels, 3, padding=1)
        self.block_1, self.block_2, self.block_3, self.block_4 = (Block(channels, middle, attention) for _ in range(4))
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        """RGB 0..255 (N, 3, H, W) -> RGB (N, 3, scale * H, scale * W), nominally 0..255 (not clamped, as trained)."""
        x = self.conv_1(x)
        y = self.block_4(self.block_3(self.block_2(self.block_1(x))))
        return self.upsampler(self.conv_2(y) + x)


def rlfn(*, channels: int = 46, middle: int = 48, attention: int = 16, scale: int = 4) -> nn.Module:
    """317 k parameters at the default sizes."""
    return RLFN(channels, middle, attention, scale)
