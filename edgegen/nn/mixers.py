"""What can stand in the place of self-attention: a pyramid of convolutions, additive attention, a feed-forward mixer.

Dong et al., 2025, Distilling Self-Attention into Convolutions (ΔConvFusion), arXiv:2504.21292; Morales-Juarez and
Fuentes-Pineda, 2024, LadaGAN, arXiv:2401.09596; Bozic et al., 2023, Rethinking Attention, arXiv:2311.10642. All take
tokens (N, prefix + H * W, C), or a map (N, C, H, W) without prefix, and give the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgegen.nn import attention


class Mixer(nn.Module):
    """Tokens in, tokens out: `value` to the inner width, a way to mix tokens, `proj` back; with `residual` plus input.

    Args:
        dim, inner: channels of a token outside and inside. grid: (H, W). prefix: class and register tokens in front.
    """

    def __init__(self, dim: int, inner: int, grid: Sequence[int], prefix: int, residual: bool) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "inner": inner, "grid": list(grid), "prefix": prefix,
                                       "residual": residual}  # fmt: skip
        self.value, self.proj = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The pass has seen that there is nothing but tokens."""
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        out = self.proj(self.mix(tokens, self.value(tokens)))
        out = out + tokens if self.config["residual"] else out
        return out.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else out

    def mix(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(N, tokens, dim) and (N, tokens, inner) to (N, tokens, inner)."""
        raise NotImplementedError

    def start_from(self, old: nn.Module) -> None:
        """Take over values and output of the attention that is replaced, where they fit."""
        try:
            pairs = [(self.value, attention.split(old)[2]), (self.proj, attention.output_layer(old))]
        except ValueError:
            return
        for mine, theirs in pairs:
            if mine.weight.shape == theirs.weight.shape:
                with torch.no_grad():
                    mine.weight.copy_(theirs.weight)
                    mine.bias.copy_(theirs.bias if theirs.bias is not None else torch.zeros_like(mine.bias))


class PyramidConv(Mixer):
    """Depthwise convolutions at `levels` resolutions (each half of the one before) and the mean of all tokens.

    Deviation from the paper: no gate. A prefix token takes the mean of the values, weighted by a linear layer.
    """

    def __init__(
        self, dim: int, inner: int, grid: Sequence[int], prefix: int, residual: bool, levels: int, kernel: int
    ) -> None:
        super().__init__(dim, inner, grid, prefix, residual)
        self.config |= {"levels": levels, "kernel": kernel}
        if levels < 1 or kernel % 2 == 0 or any(side % 2 ** (levels - 1) for side in grid):
            raise ValueError(f"{levels} levels need a grid that divides by {2 ** (levels - 1)} and an odd kernel, "
                             f"got {grid[0]}x{grid[1]} and {kernel}")  # fmt: skip
        self.convs = nn.ModuleList(
            nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner) for _ in range(levels)
        )
        conv: Any
        for conv in self.convs:  # at first the mean over the neighbourhood: attention that is even and local
            nn.init.constant_(conv.weight, 1 / (kernel**2 * (levels + 1)))
            nn.init.zeros_(conv.bias)
        self.look = nn.Linear(dim, prefix) if prefix else None

    def mix(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        prefix, (height, width) = self.config["prefix"], self.config["grid"]
        body = value[:, prefix:].transpose(1, 2).reshape(-1, value.shape[-1], height, width)
        total = body.mean((2, 3), keepdim=True) / (len(self.convs) + 1)
        for level, conv in enumerate(self.convs):
            small = conv(F.avg_pool2d(body, 2**level) if level else body)
            total = total + (F.interpolate(small, scale_factor=float(2**level)) if level else small)
        out = total.flatten(2).transpose(1, 2)
        if self.look is None:
            return out
        weight = self.look(x).softmax(1)  # (N, tokens, prefix)
        return torch.cat([weight.transpose(1, 2) @ value, out], 1)


class AdditiveAttention(Mixer):
    """One global query a head, the weighted mean of the queries; times the keys, times the values."""

    def __init__(self, dim: int, inner: int, grid: Sequence[int], prefix: int, residual: bool, heads: int) -> None:
        super().__init__(dim, inner, grid, prefix, residual)
        self.config |= {"heads": heads}
        if inner % heads:
            raise ValueError(f"{inner} channels do not divide into {heads} heads")
        self.qk, self.weight = nn.Linear(dim, 2 * inner), nn.Linear(inner, heads)

    def mix(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads, size = self.config["heads"], value.shape[-1] // self.config["heads"]
        q, k = self.qk(x).chunk(2, -1)
        share = (self.weight(q) * size**-0.5).softmax(1)  # (N, tokens, heads)
        q = q.reshape(q.shape[0], -1, heads, size).transpose(1, 2)
        query = share.transpose(1, 2)[:, :, None] @ q  # (N, heads, 1, size)
        return value * k * query.reshape(-1, 1, heads * size)


class TokenFeedForward(Mixer):
    """Two linear layers over the tokens, the same for every channel: a fixed, learned attention.

    Deviation from the paper, whose layers see tokens and channels at once: there the weights grow with (tokens * C)^2.
    """

    def __init__(self, dim: int, inner: int, grid: Sequence[int], prefix: int, residual: bool, hidden: int) -> None:
        super().__init__(dim, inner, grid, prefix, residual)
        self.config |= {"hidden": hidden}
        tokens = prefix + int(grid[0]) * int(grid[1])
        self.down, self.act, self.up = nn.Linear(tokens, hidden), nn.GELU(), nn.Linear(hidden, tokens)

    def mix(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.up(self.act(self.down(value.transpose(1, 2)))).transpose(1, 2)
