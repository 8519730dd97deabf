"""Attention that keeps its queries and looks at fewer keys: a coarser grid of them, or only those around.

Smith et al., 2024, ToDo: Token Downsampling, arXiv:2402.13573; Liu et al., 2024, CLEAR: Conv-Like Linearization,
arXiv:2412.16112, as blocks of queries with a border of keys (Vaswani et al., 2021, HaloNet, arXiv:2103.12731). Both use
the weights of the attention that they replace, and are equal to it at factor 1, or a radius that covers the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MODES = ("average", "stride", "nearest")
NAMES = (("to_q", "to_k", "to_v"), ("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
_OUT = ("to_out", "proj", "out_proj", "proj_out", "out")
_FAR = -1e4  # added to the logit of a key that is too far: e^-10000 is 0, and FP16 has it


def pooled(x: torch.Tensor, grid: Sequence[int], prefix: int, factor: int, mode: str) -> torch.Tensor:
    """Tokens (N, prefix + H * W, C) to (N, prefix + H * W / factor^2, C); maps (N, C, H, W) likewise.

    average: the mean of each cell; stride: its upper left token; nearest: the one next to its centre.
    """
    at = factor // 2 if mode == "nearest" else 0
    if x.ndim == 4:
        return F.avg_pool2d(x, factor) if mode == "average" else x[:, :, at::factor, at::factor]
    height, width, channels = int(grid[0]) // factor, int(grid[1]), x.shape[-1]
    body = x[:, prefix:].reshape(-1, factor, width * channels)  # rows of a cell
    body = body.mean(1) if mode == "average" else body[:, at]
    body = body.reshape(-1, factor, channels)  # columns of a cell
    body = body.mean(1) if mode == "average" else body[:, at]
    body = body.reshape(-1, height * (width // factor), channels)
    return torch.cat([x[:, :prefix], body], 1) if prefix else body


def _check_grid(grid: Sequence[int], step: int, what: str) -> None:
    if step < 1 or any(side % step for side in grid):
        raise ValueError(f"{what} must divide the grid {grid[0]}x{grid[1]}, got {step}")


class DownsampledTokens(nn.Module):
    """A projection to keys or values that is given a coarser grid: tokens (N, tokens, C) or a map (N, C, H, W)."""

    WRAPS = True

    def __init__(self, inner: nn.Module, grid: Sequence[int], prefix: int, factor: int, mode: str) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"grid": list(grid), "prefix": prefix, "factor": factor, "mode": mode}
        _check_grid(grid, factor, "factor")
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(pooled(x, **self.config))


class Projections(nn.Module):
    """The queries, keys, values and the output of an attention of timm's form, or with three projections."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.num_heads = heads_of(inner)
        q, k, v = split(inner)
        self.head_dim = q.out_features // self.num_heads
        self.q, self.kv = q, _stacked(k, v)
        self.q_norm, self.k_norm = (or_identity(inner, (f"{x}_norm", f"norm_{x}")) for x in "qk")
        self.norm = or_identity(inner, ("norm",))
        self.proj = output_layer(inner)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(N, tokens, heads * D) to (N, heads, tokens, D)."""
        return x.reshape(x.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)

    def project(self, x: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of `x`, keys and values of `source`, each (N, heads, tokens, D)."""
        k, v = self.kv(source).chunk(2, -1)
        return self.q_norm(self.heads(self.q(x))), self.k_norm(self.heads(k)), self.heads(v)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """(N, heads, tokens, D) to the output (N, tokens, C)."""
        x = x.transpose(1, 2).reshape(x.shape[0], -1, self.num_heads * self.head_dim)
        return self.proj(self.norm(x))


class DownsampledAttention(Projections):
    """Full queries; keys and values on a grid that is `factor` times coarser. The first `prefix` tokens stay."""

    WRAPS = True

    def __init__(self, inner: nn.Module, grid: Sequence[int], prefix: int, factor: int, mode: str) -> None:
        super().__init__(inner)
        self.config: dict[str, Any] = {"grid": list(grid), "prefix": prefix, "factor": factor, "mode": mode}
        _check_grid(grid, factor, "factor")

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Tokens (N, tokens, C); the pass has seen that there is no mask."""
        return self.join(F.scaled_dot_product_attention(*self.project(x, pooled(x, **self.config))))


class WindowAttention(Projections):
    """Every token looks at the tokens within `radius` (Euclidean, in tokens) and at the prefix, which looks at all.

    Queries go in squares of `window` tokens, each with the keys around it: the cost grows with the tokens, not with
    their square. The cells that a square needs are constants of the graph (Gather).
    """

    WRAPS = True

    def __init__(self, inner: nn.Module, grid: Sequence[int], prefix: int, window: int, radius: float) -> None:
        super().__init__(inner)
        self.config: dict[str, Any] = {"grid": list(grid), "prefix": prefix, "window": window, "radius": radius}
        _check_grid(grid, window, "window")
        order, keys, far = _neighbours(grid, prefix, window, radius)
        self.order: torch.Tensor
        self.back: torch.Tensor
        self.keys: torch.Tensor
        self.far: torch.Tensor
        self.register_buffer("order", order, persistent=False)  # (H * W): tokens square by square
        self.register_buffer("back", order.argsort(), persistent=False)
        self.register_buffer("keys", keys, persistent=False)  # (squares, K), into all tokens
        self.register_buffer("far", far, persistent=False)  # (squares, window^2, K)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Tokens (N, tokens, C); the pass has seen that there is no mask."""
        prefix, (squares, count) = self.config["prefix"], self.keys.shape
        q, k, v = self.project(x, x)
        size = (-1, squares, count, self.head_dim)
        near_k, near_v = (part.index_select(2, self.keys.flatten()).reshape(size) for part in (k, v))
        body = q[:, :, prefix:].index_select(2, self.order).reshape(-1, squares, self.far.shape[1], self.head_dim)
        out = F.scaled_dot_product_attention(body, near_k, near_v, attn_mask=self.far.to(q.dtype))
        out = out.reshape(-1, self.num_heads, q.shape[2] - prefix, self.head_dim).index_select(2, self.back)
        if prefix:
            out = torch.cat([F.scaled_dot_product_attention(q[:, :, :prefix], k, v), out], 2)
        return self.join(out)


def _neighbours(
    grid: Sequence[int], prefix: int, window: int, radius: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens square by square, the keys of each square, what is added to the logits)."""
    height, width = int(grid[0]), int(grid[1])
    reach = int(radius)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    order = torch.arange(height * width).reshape(height // window, window, width // window, window)
    order = order.permute(0, 2, 1, 3).reshape(-1, window * window)  # (squares, window^2)
    tall, wide = min(height, window + 2 * reach), min(width, window + 2 * reach)
    top = (y.flatten()[order[:, 0]] - reach).clamp(0, height - tall)  # at the border the patch moves inside
    left = (x.flatten()[order[:, 0]] - reach).clamp(0, width - wide)
    rows = (top[:, None] + torch.arange(tall))[:, :, None]
    columns = (left[:, None] + torch.arange(wide))[:, None]
    keys = (rows * width + columns).flatten(1)  # (squares, tall * wide)
    away = [p.flatten()[order][:, :, None] - p.flatten()[keys][:, None] for p in (y, x)]
    far = torch.where(away[0] ** 2 + away[1] ** 2 <= radius**2, 0.0, _FAR)
    always = torch.arange(prefix).expand(len(keys), -1)
    far = torch.cat([torch.zeros(*far.shape[:2], prefix), far], -1)
    return order.flatten(), torch.cat([always, keys + prefix], 1), far


def heads_of(inner: nn.Module) -> int:
    """How many heads an attention has; one where it does not say."""
    found = (getattr(inner, name, None) for name in ("num_heads", "heads"))
    return next((heads for heads in found if isinstance(heads, int)), 1)


def split(inner: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The three projections as linear layers: new ones of a fused `qkv`, else those that are there.

    Raises:
        ValueError: no attention of a known form.
    """
    fused = getattr(inner, "qkv", None)
    if isinstance(fused, nn.Linear) and fused.out_features % 3 == 0:
        rows = fused.out_features // 3
        return tuple(_slice(fused, slice(i * rows, (i + 1) * rows)) for i in range(3))  # type: ignore[return-value]
    for names in NAMES:
        found = [getattr(inner, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in found):
            return tuple(found)  # type: ignore[return-value]
    raise ValueError(f"{type(inner).__name__} has no qkv layer, and no three linear layers for it")


def output_layer(inner: Any) -> nn.Linear:
    """The layer behind the heads.

    Raises:
        ValueError: there is none of a known name.
    """
    for name in _OUT:
        layer = getattr(inner, name, None)
        layer = layer[0] if isinstance(layer, nn.ModuleList | nn.Sequential) and len(layer) else layer
        if isinstance(layer, nn.Linear):
            return layer
    raise ValueError(f"{type(inner).__name__} has no output layer of a known name: {', '.join(_OUT)}")


def _slice(layer: nn.Linear, rows: slice) -> nn.Linear:
    part = nn.Linear(layer.in_features, rows.stop - rows.start, layer.bias is not None)
    return _filled(part, layer.weight[rows], None if layer.bias is None else layer.bias[rows], layer)


def _stacked(a: nn.Linear, b: nn.Linear) -> nn.Linear:
    both = nn.Linear(a.in_features, a.out_features + b.out_features, a.bias is not None)
    bias = None if a.bias is None or b.bias is None else torch.cat([a.bias, b.bias])
    return _filled(both, torch.cat([a.weight, b.weight]), bias, a)


def _filled(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Linear) -> nn.Linear:
    layer = layer.to(dtype=like.weight.dtype, device=like.weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.train(like.training).requires_grad_(like.weight.requires_grad)


def or_identity(inner: Any, names: Sequence[str]) -> nn.Module:
    """The first child of these names, or an identity."""
    found = next((part for name in names if isinstance(part := getattr(inner, name, None), nn.Module)), None)
    return nn.Identity() if found is None else found
