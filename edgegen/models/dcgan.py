"""DCGAN generator of handwritten digits: 32x32 grey images from 64 normal numbers.

Radford et al., 2015, Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks,
arXiv:1511.06434: strided transposed convolutions, batch norm, ReLU inside and tanh at the end.
"""

from __future__ import annotations

import torch
from torch import nn

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 64]},
    "output": {"shape": [1, 1, 32, 32], "value_range": [-1, 1]},
    "options": {"calibration": "latents", "features": "mnist"},
    "paper": "Radford et al., 2015, DCGAN, arXiv:1511.06434",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/dcgan.py, trained on the MNIST training images padded to 32x32",
}


class Generator(nn.Module):
    """Latents (N, latent), N(0, 1), to grey images (N, 1, 32, 32) in -1..1."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        widths = (4 * width, 2 * width, width)
        self.project = nn.Sequential(
            nn.ConvTranspose2d(latent, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )  # (N, latent, 1, 1) -> (N, 4 * width, 4, 4)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(widths[0], widths[1], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[1]), nn.ReLU()
        )
        self.up2 = nn.Sequential(
            nn.ConvTranspose2d(widths[1], widths[2], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[2]), nn.ReLU()
        )
        self.up3 = nn.ConvTranspose2d(widths[2], 1, 4, 2, 1)
        self.tanh = nn.Tanh()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.project(z[:, :, None, None])
        return self.tanh(self.up3(self.up2(self.up1(x))))


def create(latent: int = 64, width: int = 64) -> nn.Module:
    """A fresh generator.

    Args:
        latent: numbers in one latent.
        width: channels before the last layer; the layers before have two and four times as many.
    """
    return Generator(latent, width)
