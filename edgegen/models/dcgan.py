"""DCGAN generator of handwritten digits: 32x32 grey images from 64 normal numbers.

Radford et al., 2015, Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks,
arXiv:1511.06434: strided transposed convolutions, batch norm, ReLU inside and tanh at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    """Latents (N, latent), N(0, 1), to grey images (N, 1, 32, 32) in -1..1 (with other shapes, of another size)."""

    def __init__(self, latent: int, width: int, shapes: Sequence[tuple[int, int, int]], bias: bool) -> None:
        super().__init__()
        widths = (latent, 4 * width, 2 * width, width)
        units = [
            nn.Sequential(nn.ConvTranspose2d(a, b, *shape, bias=bias), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, shape in zip(widths, widths[1:], shapes)
        ]
        self.project, self.up1, self.up2 = units  # (N, latent, 1, 1) -> (N, 4 * width, 4, 4) -> 8x8 -> 16x16
        self.up3 = nn.ConvTranspose2d(width, 1, *shapes[3])
        self.tanh = nn.Tanh()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.project(z[:, :, None, None])
        return self.tanh(self.up3(self.up2(self.up1(x))))


def create(
    latent: int = 64, width: int = 64, kernels: Sequence[int] = (4, 4, 4, 4), strides: Sequence[int] = (1, 2, 2, 2),
    paddings: Sequence[int] = (0, 1, 1, 1), bias: bool = False,
) -> nn.Module:  # fmt: skip
    """A fresh generator.

    Args:
        latent: numbers in one latent.
        width: channels before the last layer; the layers before have two and four times as many.
        kernels, strides, paddings: of the four layers. bias: of all layers but the last, which always has one.
    Raises:
        ValueError: not four of each.
    """
    if not len(kernels) == len(strides) == len(paddings) == 4:
        raise ValueError(f"kernels, strides and paddings must be four each, got {kernels}, {strides}, {paddings}")
    return Generator(latent, width, list(zip(kernels, strides, paddings)), bias)


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the length of the input; the kernels decide the size of the image."""
    return {**RECORD, "input": {"shape": [1, config.get("latent", 64)]}, "output": {"value_range": [-1, 1]}}


def from_published(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The layout of Ryhan9834/DigitDCGAN (gen.0 ... gen.3) under the names of this file."""
    places = {"gen.0.": "project.", "gen.1.": "up1.", "gen.2.": "up2.", "gen.3.0.": "up3."}
    return {next((new + name[len(old) :] for old, new in places.items() if name.startswith(old)), name): tensor
            for name, tensor in state.items()}  # fmt: skip
