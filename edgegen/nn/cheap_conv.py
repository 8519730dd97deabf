"""Convolutions that share work between channels: ghost features, and large depthwise windows split into small ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ghost(nn.Module):
    """A convolution to some of the channels, and the others as cheap depthwise functions of those.

    Han et al., 2020, GhostNet: More Features from Cheap Operations, arXiv:1911.11907; without the norm and activation
    of their module, as those follow the convolution that is replaced. (N, C, H, W) to (N, outputs, H', W').

    Args:
        primary: keyword arguments of the convolution that makes the first channels.
        outputs: channels of the result. window: size of the cheap depthwise kernels.
    """

    def __init__(self, primary: Mapping[str, Any], outputs: int, window: int = 3) -> None:
        super().__init__()
        self.config = {"primary": dict(primary), "outputs": outputs, "window": window}
        self.primary = nn.Conv2d(**primary)
        made = self.primary.out_channels
        times = -(-(outputs - made) // made)  # cheap channels of each primary one, rounded up
        self.cheap = nn.Conv2d(made, made * times, window, padding=window // 2, groups=made)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        both = torch.cat((first, self.cheap(first)), 1)
        return both if both.shape[1] == self.outputs else both[:, : self.outputs]


class SplitLarge(nn.Module):
    """A large depthwise convolution as four groups of channels: untouched, square, horizontal and vertical windows.

    Yu et al., 2024, InceptionNeXt, arXiv:2303.16900. (N, C, H, W) to the same.

    Args:
        channels: C. branch: channels of each of the three convolutions. window: of the original, odd. square: of the
            square one, odd.
    """

    def __init__(self, channels: int, branch: int, window: int, square: int = 3) -> None:
        super().__init__()
        self.config = {"channels": channels, "branch": branch, "window": window, "square": square}
        self.parts = [channels - 3 * branch, branch, branch, branch]
        self.square = nn.Conv2d(branch, branch, square, padding=square // 2, groups=branch)
        self.wide = nn.Conv2d(branch, branch, (1, window), padding=(0, window // 2), groups=branch)
        self.high = nn.Conv2d(branch, branch, (window, 1), padding=(window // 2, 0), groups=branch)

    def forward(self, x: Tensor) -> Tensor:
        kept, square, wide, high = torch.split(x, self.parts, 1)
        return torch.cat((kept, self.square(square), self.wide(wide), self.high(high)), 1)
