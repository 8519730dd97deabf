"""A small block that corrects what a denoiser's deep blocks gave at a step before, for the time it is now.

Gwilliam et al., 2025, Accelerate High-Quality Diffusion Models with Inner Loop Feedback, arXiv:2501.13107: a learned
module predicts from features and time what the deep blocks would give. Deviation: the paper's block is one of the
network's own kind with a learned step; here it is a bottleneck, and starts as no correction at all:

    cache + give(silu(look(take(cache)) + tell(silu(time))))

with pointwise layers `take` and `give` and, of maps, a depthwise 3x3 `look`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu


class Feedback(nn.Module):
    """The network's own module `inner`, which does as before, and beside it the block that `correct` runs.

    channels: of the cached features, (N, C, H, W) where `space`, else (N, L, C). told: width of the time's embedding.
    width: channels inside the block.
    """

    WRAPS = True

    def __init__(self, inner: nn.Module, channels: int, told: int, width: int, space: bool) -> None:
        super().__init__()
        self.config = {"channels": channels, "told": told, "width": width, "space": space}
        self.inner = inner
        self.take: nn.Module = nn.Conv2d(channels, width, 1) if space else nn.Linear(channels, width)
        self.look: nn.Module = nn.Conv2d(width, width, 3, padding=1, groups=width) if space else nn.Identity()
        self.tell = nn.Linear(told, width)
        self.give = nn.Conv2d(width, channels, 1) if space else nn.Linear(width, channels)
        nn.init.zeros_(self.give.weight)
        nn.init.zeros_(self.give.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def correct(self, cache: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The cached features as they should be now; time: (N, told), its embedding."""
        told = self.tell(silu(time))
        told = told[:, :, None, None] if self.config["space"] else told[:, None]
        return cache + self.give(silu(self.look(self.take(cache)) + told))

    def own(self) -> list[nn.Parameter]:
        """The parameters of the block, without those of `inner`."""
        return [value for name, value in self.named_parameters() if not name.startswith("inner.")]
