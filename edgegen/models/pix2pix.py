"""pix2pix generator: a U-Net of strided and transposed convolutions with batch norm, 256x256.

Isola et al., 2017, pix2pix, arXiv:1611.07004, section 6.1.1. Checkpoints of junyanz/pytorch-CycleGAN-and-pix2pix
(unet_256) load. Norms use their running statistics and dropout is off, as with that code's `--eval`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 256, 256], "value_range": [-1, 1], "mean": [], "std": [], "colour": "RGB", "resize": 256,
              "crop": [256, 256]},
    "output": {"shape": [1, 3, 256, 256], "value_range": [-1, 1]},
    "options": {"calibration": "photos"},
    "paper": "Isola et al., 2017, pix2pix, arXiv:1611.07004",
    "licence": "Apache-2.0",
    "source": "latest_net_G.pth of junyanz/pytorch-CycleGAN-and-pix2pix (scripts/download_pix2pix_model.sh; BSD-2);"
    " edgegen ships none",
}  # fmt: skip


class Level(nn.Module):
    """One level and all below it: (N, outer, H, W) to (N, 2 outer, H, W), the input and what was made of it.

    The published code activates its input in place, so what skips the level is the activated input.
    """

    def __init__(self, outer: int, inner: int, below: nn.Module | None, dropout: bool) -> None:
        super().__init__()
        middle = [nn.BatchNorm2d(inner), below] if below is not None else []
        self.model = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1, bias=False), *middle, nn.ReLU(),
            nn.ConvTranspose2d(2 * inner if below is not None else inner, outer, 4, 2, 1, bias=False),
            nn.BatchNorm2d(outer), *([nn.Dropout(0.5)] if dropout else []),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept = y = self.model[0](x)
        for layer in list(self.model)[1:]:
            y = layer(y)
        return torch.cat((kept, y), 1)


class Outermost(nn.Module):
    """The first and the last convolution around all levels."""

    def __init__(self, inputs: int, outputs: int, width: int, below: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(inputs, width, 4, 2, 1, bias=False), below, nn.ReLU(),
            nn.ConvTranspose2d(2 * width, outputs, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Generator(nn.Module):
    """Image -1..1 (N, inputs, H, W), H and W divisible by 2^levels, to (N, outputs, H, W), -1..1."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int) -> None:
        super().__init__()
        below: nn.Module = Level(8 * width, 8 * width, None, False)
        for _ in range(levels - 5):
            below = Level(8 * width, 8 * width, below, True)
        for factor in (4, 2, 1):
            below = Level(factor * width, 2 * factor * width, below, False)
        self.model = Outermost(inputs, outputs, width, below)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def create(width: int = 64, levels: int = 8, inputs: int = 3, outputs: int = 3) -> nn.Module:
    """A fresh U-Net.

    Args:
        width: channels of the first convolution, at most eight times as many below. levels: halvings of the size; 8
            is unet_256, 7 unet_128. inputs, outputs: channels of the images.
    Raises:
        ValueError: fewer than five levels.
    """
    if levels < 5:
        raise ValueError(f"levels must be at least 5, got {levels}")
    return Generator(inputs, outputs, width, levels)
