"""Discriminators of images that also show what they see: (scores, maps).

Projected: Sauer et al., 2021, Projected GANs Converge Faster, arXiv:2111.01007: a frozen encoder, and a light head on
each of its maps. Deviation: no random mixing of the maps, and spectral norm (Miyato et al., 2018, arXiv:1802.05957) in
the heads. Watched: any discriminator, with the outputs of its layers, as DCD needs it. Critic: one that is trained from
nothing, and gives scores alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from edgegen.nn.losses import WEIGHTED

WIDTH = 64  # channels of a head
Seen = tuple[torch.Tensor, list[torch.Tensor]]  # scores (N, places), maps


class Projected(nn.Module):
    """Images (N, 1 or 3, H, W) in 0..1; smaller ones than `least` pixels are enlarged. The encoder never learns."""

    def __init__(self, encoder: nn.Module, channels: int, least: int = 32) -> None:
        super().__init__()
        self.encoder, self.least = encoder.eval().requires_grad_(False), least
        with torch.no_grad():
            widths = [seen.shape[1] for seen in encoder(torch.zeros(1, channels, least, least))[0]]
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, WIDTH, 1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(WIDTH, 1, 3, padding=1)),
            )
            for width in widths
        )  # fmt: skip

    def train(self, mode: bool = True) -> Projected:
        """Only the heads learn: the encoder's batch norms keep their statistics."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: torch.Tensor) -> Seen:
        images = images.float()
        if (scale := self.least / min(images.shape[2:])) > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        maps = list(self.encoder(images)[0])
        scores = [head(seen).flatten(1) for head, seen in zip(self.heads, maps, strict=True)]
        return torch.cat(scores, 1), maps


class Watched(nn.Module):
    """A discriminator of images in its own value range; its maps are the outputs of all layers but the last."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(True)
        self._maps: list[torch.Tensor] = []
        for layer in module.modules():
            if isinstance(layer, WEIGHTED):
                layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: Any, out: torch.Tensor) -> None:
        self._maps.append(out)

    def forward(self, images: torch.Tensor) -> Seen:
        self._maps.clear()
        found: Any = self.module(images)
        scores = (found[0] if isinstance(found, (list, tuple)) else found).flatten(1)
        maps, self._maps = self._maps[:-1], []
        return scores, maps


class Critic(nn.Module):
    """Images (N, C, H, W) of one size, and their classes (N,) where there are any, to scores (N,), float32.

    Spectral norm everywhere (Miyato et al., 2018, arXiv:1802.05957). Halved until the smaller side is below 8, then one
    number. The class is seen by projection: its vector times the sum of the last map (Miyato & Koyama, 2018,
    arXiv:1802.05637).

    Args:
        size: height and width. classes: how many, 0 for none. width: channels after the first halving, then doubled
            up to eight times as many.
    """

    GAIN = 8.0  # with spectral norm alone the scores stay closer than the hinge's margin

    def __init__(self, channels: int, size: tuple[int, int], classes: int = 0, width: int = 64) -> None:
        super().__init__()
        widths, (height, wide) = [channels], size
        while min(height, wide) >= 8:
            widths.append(width * min(8, 2 ** (len(widths) - 1)))
            height, wide = height // 2, wide // 2
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, (height, wide)))
        self.embed = spectral_norm(nn.Embedding(classes, widths[-1])) if classes else None

    def forward(self, images: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        y = self.layers(images)
        scores = self.score(y).float().flatten()
        if self.embed is not None:
            scores = scores + (self.embed(label) * y.float().sum((2, 3))).sum(1)
        return self.GAIN * scores


def feature_distance(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the maps of the squared error relative to the teacher's mean square; 0 when equal."""
    parts = [(a.float() - b.float()).pow(2).mean() / b.float().pow(2).mean().clamp_min(1e-8)
             for a, b in zip(student, teacher, strict=True)]  # fmt: skip
    return torch.stack(parts).mean()
