"""Tiny autoencoder for FLUX.2 latents, of the TAESD class (Bohan, madebyollin/taesd): encoder and decoder.

A latent is (32, H / 8, W / 8). Weights: taef2-encoder.pth and taef2-decoder.pth in ../shared/assets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORDS = {
    "decoder": {
        "task": "restoration",
        "input": {"shape": [1, 32, 32, 32], "mean": [], "std": []},
        "output": {"shape": [1, 3, 256, 256], "value_range": [0, 1]},
        "options": {},
        "paper": "",
        "licence": "MIT",
        "source": "madebyollin/taesd",
    },
}


class Block(nn.Module):
    """Three 3x3 convolutions around a shortcut; `pooled` adds a group-normalized 1x1 branch before them."""

    def __init__(self, width: int, pooled: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Squash(nn.Module):
    """Soft limit of latents to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return 3.0 * torch.tanh(x / 3.0)


def _joint(width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, padding=1, bias=False)


def encoder(*, width: int = 64, latent: int = 32) -> nn.Module:
    """RGB 0..1 (N, 3, H, W), H and W divisible by 8 -> latent (N, latent, H / 8, W / 8)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for pooled in (False, False, True):
        layers += [_joint(width, 2), *(Block(width, pooled) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(width, latent, 3, padding=1))


def decoder(*, width: int = 64, latent: int = 32) -> nn.Module:
    """Latent (N, latent, h, w) -> RGB (N, 3, 8 h, 8 w), nominally 0..1 (not clamped, as trained)."""
    layers: list[nn.Module] = [Squash(), nn.Conv2d(latent, width, 3, padding=1), nn.ReLU()]
    for pooled in (True, False, False):
        layers += [*(Block(width, pooled) for _ in range(3)), nn.Upsample(scale_factor=2), _joint(width)]
    return nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))
