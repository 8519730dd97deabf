"""SinDDM's denoiser: four convolutional blocks without down-sampling, for any image size, told time and scale.

Kulikov et al., 2023, SinDDM: A Single Image Denoising Diffusion Model, arXiv:2211.16582: 1.1 million parameters, 100
steps of the cosine schedule, and a small receptive field, so that it learns patches and not the whole image. The paper
says 35x35 pixels; its four blocks (5x5, 3x3, 3x3 each) see 33x33. One network serves all scales of a pyramid there.
Here is the denoiser of one scale, told which, sampled from pure noise; not here is the loop over the pyramid, which
starts a scale from the noised and enlarged image of the one before and blurs by time.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 3, 64, 64]},
    "output": {"shape": [1, 3, 64, 64], "value_range": [-1, 1]},
    "options": {
        "features": "cifar",
        "prediction": "epsilon",
        "schedule": "cosine",
        "train_steps": 100,
        "sampler": {"name": "ddpm", "steps": 100, "spacing": "leading"},
    },
    "paper": "Kulikov et al., 2023, SinDDM, arXiv:2211.16582",
    "licence": "Apache-2.0",
    "source": "no weights ship: a network belongs to one image; edgegen train --model sinddm --data IMAGE_FOLDER",
}


class Embedding(nn.Module):
    """A number (N,) as sines and cosines: (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2 - 1)))
        self.rates: torch.Tensor
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        angles = value[:, None] * self.rates
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class Block(nn.Module):
    """x + conv(GELU(conv(depthwise(x) + told))): (N, C, H, W) to (N, C', H, W); 9 pixels of receptive field."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 5, padding=2, groups=inputs)
        self.told = nn.Sequential(nn.GELU(), nn.Linear(told, told), nn.Linear(told, inputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.gelu = nn.GELU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        inner = self.depthwise(x) + self.told(told)[:, :, None, None]
        return self.skip(x) + self.conv2(self.gelu(self.conv1(inner)))


class SinDDM(nn.Module):
    """(sample (N, C, H, W), timestep (N,)) -> noise; the scale of the pyramid is fixed when it is made."""

    def __init__(self, channels: int, width: int, blocks: int, scale: int) -> None:
        super().__init__()
        told, half = 32, width // 2
        widths = [channels, half, *([width] * (blocks - 2)), half][: blocks + 1]
        self.scale = float(scale)
        self.number = Embedding(told)
        self.told = nn.Sequential(nn.Linear(2 * told, 4 * told), nn.GELU(), nn.Linear(4 * told, told))
        self.blocks = nn.ModuleList(Block(a, b, told) for a, b in pairwise(widths))
        self.last = nn.Conv2d(half, channels, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = torch.full_like(timestep, self.scale)
        told = self.told(torch.cat((self.number(timestep), self.number(scale)), dim=1))
        x = sample
        for block in self.blocks:
            x = block(x, told)
        return self.last(x)


def create(channels: int = 3, width: int = 160, blocks: int = 4, scale: int = 0) -> nn.Module:
    """A fresh denoiser for one scale.

    Args:
        channels: of the images. width: channels inside; the first and the last block give half of them.
        blocks: 1 or more; each widens the receptive field by 8 pixels.
        scale: level of the image pyramid, 0 the smallest.
    Raises:
        ValueError: no blocks.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    return SinDDM(channels, width, blocks, scale)
