"""What stands in the place of a removed block that was called with more than its input, such as a time embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Passthrough(nn.Module):
    """Gives its first argument back and ignores the others (`nn.Identity` takes one only)."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """x as it is."""
        return x
