"""The class that a conditional generator draws: as an index, as one-hot numbers, or at the end of the latent vector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LABELS = ("joined", "one-hot", "index")


def check(label: str) -> str:
    """The name, if it is a way to give the class.

    Raises:
        ValueError: it is none.
    """
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {label!r}")
    return label


def record(label: str, classes: int) -> dict[str, Any]:
    """The part of RECORD that says how the class is given beside the latents; empty for "joined"."""
    kinds: dict[str, dict[str, Any]] = {
        "one-hot": {"shape": [1, classes], "value_range": [0, 1]},
        "index": {"shape": [1], "dtype": "int64", "value_range": [0, classes - 1]},
    }
    return {"inputs": [{"name": "label", **kinds[label]}]} if label in kinds else {}


def split(x: Tensor, label: Tensor | None, latent: int, classes: int, mode: str) -> tuple[Tensor, Tensor]:
    """(latents (N, latent), classes as one-hot (N, classes), float).

    mode: "joined": x is (N, latent + classes), and the largest of the last numbers names the class, so that normal
    numbers draw all classes alike and a one-hot end asks for one. "one-hot": label is (N, classes), float, and may mix
    classes. "index": label is (N,), int64.
    """
    if mode == "joined":
        scores = x[:, latent:]
        # 1 where a number is the largest, 0 elsewhere, without truth values: those some runtimes do not have
        return x[:, :latent], 1 - torch.sign(scores.amax(1, keepdim=True) - scores)
    if label is None:
        raise ValueError(f"a class is needed beside the latents: {mode}")
    return x, label if mode == "one-hot" else F.one_hot(label, classes).to(x.dtype)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift depend on the class: x (N, C, H, W), one-hot classes (N, classes).

    De Vries et al., 2017, arXiv:1707.00683. `embed` holds scales, then shifts: (classes, 2 C).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.embed = nn.Embedding(classes, 2 * channels)
        nn.init.constant_(self.embed.weight[:, :channels].detach(), 1.0)
        nn.init.zeros_(self.embed.weight[:, channels:].detach())

    def forward(self, x: Tensor, hot: Tensor) -> Tensor:
        scale, shift = (hot @ self.embed.weight).chunk(2, 1)
        return self.bn(x) * scale[:, :, None, None] + shift[:, :, None, None]


class SelfAttention(nn.Module):
    """x + gamma * attention over all positions, keys and values max-pooled: (N, C, H, W), H and W even, to the same.

    Zhang et al., 2019, SAGAN, arXiv:1805.08318, section 3; C / 8 channels of queries and keys, C / 2 of values.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, middle = max(1, channels // 8), max(1, channels // 2)
        self.query, self.key = nn.Conv2d(channels, narrow, 1, bias=False), nn.Conv2d(channels, narrow, 1, bias=False)
        self.value, self.out = nn.Conv2d(channels, middle, 1, bias=False), nn.Conv2d(middle, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x).flatten(2), self.pool(self.key(x)).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)  # (N, H W, H W / 4)
        y = self.pool(self.value(x)).flatten(2) @ weights.transpose(1, 2)
        return x + self.gamma * self.out(y.reshape(y.shape[0], -1, *x.shape[2:]))
