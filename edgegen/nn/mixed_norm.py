"""Layer-instance normalisation: statistics of each channel and of all of them, mixed by a learned share.

Kim et al., 2020, U-GAT-IT, arXiv:1907.10830. Variances are unbiased, as published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layer_instance_norm(x: Tensor, rho: Tensor, epsilon: float = 1e-5) -> Tensor:
    """rho times the instance norm of x (N, C, H, W) and 1 - rho times its layer norm."""
    parts = []
    for axes in ((2, 3), (1, 2, 3)):
        mean = x.mean(axes, keepdim=True)
        count = x[0].numel() if len(axes) == 3 else x[0, 0].numel()
        variance = (x - mean).square().mean(axes, keepdim=True) * (count / (count - 1))
        parts.append((x - mean) / torch.sqrt(variance + epsilon))
    return rho * parts[0] + (1 - rho) * parts[1]


class AdaILN(nn.Module):
    """Layer-instance norm with scale and shift given to forward: x (N, C, H, W), gamma and beta (N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, channels, 1, 1), 0.9))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return layer_instance_norm(x, self.rho) * gamma[:, :, None, None] + beta[:, :, None, None]


class ILN(nn.Module):
    """Layer-instance norm with its own scale and shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return layer_instance_norm(x, self.rho) * self.gamma + self.beta


class ChannelWeights(nn.Module):
    """A factor for each channel, as a classifier's weights give it: (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels).uniform_(-(channels**-0.5), channels**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, :, None, None]
