"""CycleGAN and CUT generator: a ResNet between two strided convolutions and two enlargements, with instance norm.

Zhu et al., 2017, CycleGAN, arXiv:1703.10593, section 7.2 (6 blocks at 128, 9 at 256 pixels); Park et al., 2020, CUT,
arXiv:2007.15651 (the same with low-pass filters around each change of size: antialias). Checkpoints of
junyanz/pytorch-CycleGAN-and-pix2pix and taesungp/contrastive-unpaired-translation load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 256, 256], "value_range": [-1, 1], "mean": [], "std": [], "colour": "RGB", "resize": 256,
              "crop": [256, 256]},
    "output": {"shape": [1, 3, 256, 256], "value_range": [-1, 1]},
    "options": {"calibration": "photos"},
    "paper": "Zhu et al., 2017, CycleGAN, arXiv:1703.10593",
    "licence": "Apache-2.0",
    "source": "latest_net_G.pth of junyanz/pytorch-CycleGAN-and-pix2pix (download_cyclegan_model.sh; BSD-2) or of"
    " taesungp/contrastive-unpaired-translation; edgegen ships none",
}  # fmt: skip


class Block(nn.Module):
    """x + norm(conv(ReLU(norm(conv(x))))), reflection padding: (N, C, H, W) to the same."""

    def __init__(self, channels: int, dropout: bool) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(),
            *([nn.Dropout(0.5)] if dropout else []),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Downsample(nn.Module):
    """Low-pass filter 1-2-1 and every second pixel: (N, C, H, W) to half of H and W."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel.expand(count, 1, 3, 3), stride=2, groups=count)


class Upsample(nn.Module):
    """Zeros between pixels and low-pass filter 1-3-3-1: (N, C, H, W) to twice H and W."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        large = F.conv_transpose2d(padded, self.kernel.expand(count, 1, 4, 4), stride=2, padding=2, groups=count)
        return large[:, :, 1:-1, 1:-1]


class Generator(nn.Module):
    """RGB -1..1 (N, 3, H, W), H and W divisible by 4, to RGB -1..1 of the same size."""

    def __init__(self, width: int, blocks: int, dropout: bool, antialias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), *_unit(nn.Conv2d(3, width, 7))]
        for i in range(2):
            inputs, outputs = width * 2**i, width * 2 ** (i + 1)
            stride = 1 if antialias else 2
            layers += _unit(nn.Conv2d(inputs, outputs, 3, stride, padding=1))
            layers += [Downsample()] if antialias else []
        layers += [Block(4 * width, dropout) for _ in range(blocks)]
        for i in (1, 0):
            inputs, outputs = width * 2 ** (i + 1), width * 2**i
            if antialias:
                layers += [Upsample(), *_unit(nn.Conv2d(inputs, outputs, 3, padding=1))]
            else:
                layers += _unit(nn.ConvTranspose2d(inputs, outputs, 3, 2, padding=1, output_padding=1))
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _unit(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU()]  # type: ignore[arg-type]


def create(width: int = 64, blocks: int = 9, dropout: bool = False, antialias: bool = False) -> nn.Module:
    """A fresh generator.

    Args:
        width: channels at full size; four times as many in the blocks. blocks: residual blocks.
        dropout: the checkpoint was trained with dropout in its blocks (it shifts the names of their layers).
        antialias: the form of CUT, with low-pass filters.
    """
    return Generator(width, blocks, dropout, antialias)


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the filters of CUT, and without the statistics that old torch kept for instance norms and never used."""
    unused = re.compile(r".*\.(filt|running_mean|running_var|num_batches_tracked)")
    return {name: tensor for name, tensor in state.items() if not unused.fullmatch(name)}
