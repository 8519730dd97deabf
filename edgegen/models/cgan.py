"""Class-conditional GAN generator of 28x28 grey images: embedded class beside the latents, two enlargements.

Mirza and Osindero, 2014, Conditional GAN, arXiv:1411.1784; the layout is that of the conditional WGAN-GP of
HayatoHongo/MNIST-Conditional-WGAN-gp, whose weights load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgegen.nn import conditional

RECORD: dict[str, Any] = {
    "task": "unconditional",
    "input": {"shape": [1, 20]},
    "output": {"shape": [1, 1, 28, 28], "value_range": [-1, 1]},
    "options": {"calibration": "latents", "features": "mnist", "labels": 10},
    "paper": "Mirza and Osindero, 2014, Conditional GAN, arXiv:1411.1784",
    "licence": "Apache-2.0",
    "source": "HayatoHongo/MNIST-Conditional-WGAN-gp (MIT), generator weights; edgegen ships none",
}


class Generator(nn.Module):
    """Latents N(0, 1) and a class (see `edgegen.nn.conditional.split`) to grey images (N, 1, 4 s, 4 s) in -1..1."""

    def __init__(self, latent: int, classes: int, width: int, size: int, label: str) -> None:
        super().__init__()
        self.latent, self.classes, self.label = latent, classes, label
        self.width, self.start = width, size // 4
        self.label_emb = nn.Embedding(classes, classes)
        self.l1 = nn.Sequential(nn.Linear(latent + classes, width * self.start**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, 0.8), nn.ReLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, 0.8), nn.ReLU(),
            nn.Conv2d(width // 2, 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        z, hot = conditional.split(z, label, self.latent, self.classes, self.label)
        x = self.l1(torch.cat((z, hot @ self.label_emb.weight), 1))
        return self.conv_blocks(x.reshape(x.shape[0], -1, self.start, self.start))


def create(latent: int = 10, classes: int = 10, width: int = 128, size: int = 28, label: str = "joined") -> nn.Module:
    """A fresh generator.

    Args:
        latent: numbers in one latent. classes: how many. width: channels of the first layers. size: height and width
            of the image, divisible by four.
        label: "joined" (one input, the class is the largest of its last numbers), "one-hot" or "index" (a second
            input: float (N, classes), or int64 (N,)).
    Raises:
        ValueError: a size that is not divisible by four, or an unknown label.
    """
    if size < 4 or size % 4:
        raise ValueError(f"size must be divisible by 4, got {size}")
    return Generator(latent, classes, width, size, conditional.check(label))


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the length of the input, the number of classes."""
    wide = config.get("latent", 10) + (config.get("classes", 10) if config.get("label", "joined") == "joined" else 0)
    classes = config.get("classes", 10)
    return {
        **RECORD, "input": {"shape": [1, wide]}, "output": {"value_range": [-1, 1]},
        **conditional.record(config.get("label", "joined"), classes),
        "options": {**RECORD["options"], "labels": classes},
    }  # fmt: skip
