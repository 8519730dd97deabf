"""Skip connections of a U-Net with a factor: what comes across, and half of what comes from below.

Ma et al., 2024, Skip-Tuning, arXiv:2402.15170: weaker skips at few steps. Si et al., 2024, FreeU, arXiv:2309.11497: a
stronger backbone (its Fourier filter of the skips is left out: a plain factor stands for it, which exports).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ScaledSkips(nn.Module):
    """An up block of diffusers' U-Nets with `skip` on its skips and `backbone` on half of its input's channels."""

    WRAPS = True

    def __init__(self, inner: nn.Module, skip: float, backbone: float) -> None:
        super().__init__()
        self.inner = inner
        self.config = {"skip": float(skip), "backbone": float(backbone)}

    @property
    def resnets(self) -> Any:
        """What the U-Net counts its skips by."""
        return self.inner.resnets

    def forward(
        self, hidden_states: torch.Tensor, res_hidden_states_tuple: tuple[torch.Tensor, ...], *args: Any, **more: Any
    ) -> torch.Tensor:
        skips = tuple(skip * self.config["skip"] for skip in res_hidden_states_tuple)
        if self.config["backbone"] != 1.0:
            half = hidden_states.shape[1] // 2
            first = hidden_states[:, :half] * self.config["backbone"]
            hidden_states = torch.cat((first, hidden_states[:, half:]), dim=1)
        return self.inner(hidden_states, skips, *args, **more)
