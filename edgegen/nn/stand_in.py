"""What a removed residual block leaves in its place where nothing would be too little: one cheap convolution.

Chollet, 2017, Xception, arXiv:1610.02357: depthwise, then pointwise; around it the skip that the block had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class StandIn(nn.Module):
    """x + pointwise(relu(depthwise(x))) of maps (N, C, H, W); further arguments (a time embedding) are not looked at.

    It starts as the identity: the pointwise weights are 0.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"channels": channels, "kernel": kernel}
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.act, self.pointwise = nn.ReLU(), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.pointwise.weight)
        nn.init.zeros_(self.pointwise.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.pointwise(self.act(self.depthwise(x)))
