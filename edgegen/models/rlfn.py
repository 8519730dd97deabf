"""RLFN, light super-resolution x4: three convolutions a block, enhanced spatial attention, one pixel shuffle.

Kong et al., 2022, RLFN, arXiv:2205.07514, as the baseline of the NTIRE 2023 efficient super-resolution challenge (four
blocks); the attention is of Liu et al., 2020, RFANet. Large photos go through a fixed-shape engine by `edgegen.tiling`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "super-resolution",
    "input": {"shape": [1, 3, 128, 128], "value_range": [0, 255], "mean": [], "std": [], "colour": "RGB",
              "resize": None},
    "output": {"shape": [1, 3, 512, 512], "value_range": [0, 255]},
    "options": {"scale": 4, "calibration": "photos", "luminance": True},
    "paper": "Kong et al., 2022, RLFN, arXiv:2205.07514",
    "licence": "Apache-2.0",
    "source": "RLFN baseline in sunny2109/SAFMN (Apache-2.0), trained for NTIRE 2023; edgegen ships none",
}  # fmt: skip
SLOPE = 0.05


class Attention(nn.Module):
    """Enhanced spatial attention: a mask from a strongly reduced copy; (N, channels, H, W), H and W at least 15."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.conv_f = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, inner, 1)
        self.conv2, self.conv3 = nn.Conv2d(inner, inner, 3, stride=2), nn.Conv2d(inner, inner, 3, padding=1)
        self.conv4 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv1(x)
        coarse = self.conv3(F.max_pool2d(self.conv2(narrow), 7, 3))
        coarse = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(narrow)))


class Block(nn.Module):
    """Three 3x3 convolutions around a shortcut, a 1x1 convolution, attention: (N, channels, H, W) to the same."""

    def __init__(self, channels: int, middle: int, attention: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r = nn.Conv2d(channels, middle, 3, padding=1), nn.Conv2d(middle, middle, 3, padding=1)
        self.c3_r, self.c5 = nn.Conv2d(middle, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.esa = Attention(channels, attention)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.c1_r, self.c2_r, self.c3_r):
            y = F.leaky_relu(layer(y), SLOPE)
        return self.esa(self.c5(x + y))


class RLFN(nn.Module):
    """RGB 0..255 (N, 3, H, W) to RGB (N, 3, scale * H, scale * W), nominally 0..255 (not clamped, as trained)."""

    def __init__(self, channels: int, middle: int, attention: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = blocks
        for i in range(blocks):
            setattr(self, f"block_{i + 1}", Block(channels, middle, attention))
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.conv_1(x)
        for i in range(self.blocks):
            y = getattr(self, f"block_{i + 1}")(y)
        return self.upsampler(self.conv_2(y) + x)


def create(channels: int = 46, middle: int = 48, attention: int = 16, blocks: int = 4, scale: int = 4) -> nn.Module:
    """A fresh network.

    Args:
        channels: between blocks. middle: inside them. attention: in their attention. scale: enlargement.
    """
    return RLFN(channels, middle, attention, blocks, scale)
