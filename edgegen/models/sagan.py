"""SAGAN generator: residual blocks with class-conditional batch norm and one self-attention, 32 to 128 pixels.

Zhang et al., 2019, Self-Attention Generative Adversarial Networks, arXiv:1805.08318: 1024 channels at 4 pixels, halved
with each enlargement down to 64, attention at 32x32. Spectral norm is a means of training: with spectral=False the
network is the one to export, and weights with torch's spectral norm (weight_orig, _u, _v) load folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.models import _published
from edgegen.nn import conditional

RECORD: dict[str, Any] = {
    "task": "unconditional",
    "input": {"shape": [1, 1128]},
    "output": {"shape": [1, 3, 128, 128], "value_range": [-1, 1]},
    "options": {"calibration": "latents", "labels": 1000},
    "paper": "Zhang et al., 2019, SAGAN, arXiv:1805.08318",
    "licence": "Apache-2.0",
    "source": "no checkpoint in this layout is published (brain-research/self-attention-gan is TensorFlow 1): train it"
    " first, or --latency-only; edgegen ships none",
}


class Block(nn.Module):
    """Norm, ReLU, enlarge, convolution, norm, ReLU, convolution, with an enlarged shortcut: H, W to 2 H, 2 W."""

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.norm1 = conditional.ConditionalBatchNorm(inputs, classes)
        self.norm2 = conditional.ConditionalBatchNorm(outputs, classes)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor, hot: Tensor) -> Tensor:
        y = self.conv1(self.up(F.relu(self.norm1(x, hot))))
        y = self.conv2(F.relu(self.norm2(y, hot)))
        return y + self.up(self.skip(x))  # a pointwise convolution and nearest enlargement commute


class Generator(nn.Module):
    """Latents N(0, 1) and a class (see `edgegen.nn.conditional.split`) to RGB (N, 3, size, size) in -1..1."""

    def __init__(self, size: int, latent: int, classes: int, width: int, attention: int, label: str) -> None:
        super().__init__()
        count = size.bit_length() - 3  # enlargements from 4 pixels
        widths = [width * 2 ** max(0, count - 1 - i) for i in range(count)]
        widths = [widths[0], *widths]
        self.latent, self.classes, self.label, self.attention = latent, classes, label, attention
        self.widths = tuple(widths)
        self.linear = nn.Linear(latent, 16 * widths[0])
        self.blocks = nn.ModuleList(Block(a, b, classes) for a, b in zip(widths, widths[1:]))  # noqa: RUF007
        if attention:
            self.attend = conditional.SelfAttention(widths[attention.bit_length() - 3])
        self.norm, self.out = nn.BatchNorm2d(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        z, hot = conditional.split(z, label, self.latent, self.classes, self.label)
        x = self.linear(z)
        x = x.reshape(x.shape[0], -1, 4, 4)
        for i, block in enumerate(self.blocks):
            x = block(x, hot)
            if 2 ** (i + 3) == self.attention:
                x = self.attend(x)
        return torch.tanh(self.out(F.relu(self.norm(x))))


def create(
    size: int = 128, latent: int = 128, classes: int = 1000, width: int = 64, attention: int = 32,
    label: str = "joined", spectral: bool = False,
) -> nn.Module:  # fmt: skip
    """A fresh generator.

    Args:
        size: height and width of the image: 32, 64 or 128 (any power of two from 8). width: channels at the last
            size, doubled with each halving. attention: the size at which self-attention sits, 0 for none.
        label: how the class is given: "joined", "one-hot" or "index". spectral: with spectral norm, for training.
    Raises:
        ValueError: a size that is no power of two, attention elsewhere than between 8 and size, an unknown label.
    """
    if size < 8 or size & (size - 1):
        raise ValueError(f"size must be a power of two of 8 or more, got {size}")
    if attention and not (8 <= attention <= size and attention & (attention - 1) == 0):
        raise ValueError(f"attention must be 0 or a power of two from 8 to {size}, got {attention}")
    network = Generator(size, latent, classes, width, attention, conditional.check(label))
    if spectral:
        for part in list(network.modules()):
            if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding):
                nn.utils.parametrizations.spectral_norm(part)
    return network


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the length of the input, the number of classes."""
    wide = config.get("latent", 128) + (config.get("classes", 1000) if config.get("label", "joined") == "joined" else 0)
    classes = config.get("classes", 1000)
    return {
        **RECORD, "input": {"shape": [1, wide]}, "output": {"value_range": [-1, 1]},
        **conditional.record(config.get("label", "joined"), classes),
        "options": {**RECORD["options"], "labels": classes},
    }  # fmt: skip


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """With spectral norm folded into the weights."""
    return _published.fold_spectral_norm(state)
