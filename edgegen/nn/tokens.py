"""Fewer tokens from block to block of a vision transformer: merged or dropped, a fixed number at fixed blocks.

Bolya et al., 2023, Token Merging (ToMe), arXiv:2210.09461; Liang et al., 2022, EViT, arXiv:2202.07800, for dropping by
the attention of the class token. Everything exports with static shapes: TopK, Gather and matrix products, no scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

METHODS = ("merge", "drop")
SCORES = ("class", "norm")
_PARTS = ("norm1", "attn", "norm2", "mlp")


class TokenStages(nn.Sequential):
    """The blocks of a transformer, under their own names; after the attention of some blocks tokens are taken out.

    Args:
        inner: blocks of timm's form (x + attn(norm1(x)), x + mlp(norm2(x))); others run as they are.
        cuts: [[block, number of tokens that leave there]]. prefix: class and register tokens, in front; they stay.
        method: "merge" (the most similar pairs become their mean) or "drop" (the least important leave).
        by: for "drop": "class" (attention of the first token, mean over heads) or "norm" (L2 norm of the token).
        proportional: a merged token counts in later attentions as the tokens that it is made of (ToMe, section 3).
    """

    WRAPS = True

    def __init__(
        self, inner: nn.Sequential, cuts: Sequence[Sequence[int]], prefix: int, method: str, by: str, proportional: bool
    ) -> None:
        super().__init__(*inner)
        self.config: dict[str, Any] = {
            "cuts": [[int(at), int(count)] for at, count in cuts], "prefix": prefix, "method": method, "by": by,
            "proportional": proportional,
        }  # fmt: skip
        if method not in METHODS or by not in SCORES:
            raise ValueError(f"method must be one of {METHODS} and by one of {SCORES}, got {method!r} and {by!r}")
        self.counts = dict(self.config["cuts"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, tokens, C) to (N, fewer tokens, C)."""
        sizes: torch.Tensor | None = None  # (N, tokens, 1): how many tokens each one is made of
        for index, block in enumerate(self):
            count = self.counts.get(index, 0)
            if not has_parts(block) or not (count or sizes is not None):
                x = block(x)
                continue
            x, given = attended(block, x, sizes if self.config["proportional"] else None)
            if count:
                x, sizes = self._fewer(block, x, given, sizes, count)
            x = fed_forward(block, x)
        return x

    def _fewer(
        self, block: Any, x: torch.Tensor, given: torch.Tensor, sizes: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        prefix = self.config["prefix"]
        if self.config["method"] == "drop":
            by_class = self.config["by"] == "class"
            score = class_attention(block.attn, given) if by_class else x.norm(dim=-1)
            return drop(x, score, count, prefix), None
        sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
        return merge(x, keys(block.attn, given), sizes, count, prefix)


def has_parts(block: Any) -> bool:
    """Whether a module looks like a block of timm's VisionTransformer."""
    return all(isinstance(getattr(block, name, None), nn.Module) for name in _PARTS)


def attended(
    block: Any, x: torch.Tensor, sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + attention, what the attention was given); with `sizes` a key counts that many times."""
    given = block.norm1(x)
    counted = sizes is not None and not isinstance(block.attn, nn.Identity)  # removed: there is nothing to count
    more = {"attn_mask": sizes.log().transpose(1, 2)[:, None]} if counted else {}  # type: ignore[union-attr]
    return x + _optional(block, 1, block.attn(given, **more)), given


def fed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    """x + MLP, with the layer scale and the stochastic depth of the block."""
    return x + _optional(block, 2, block.mlp(block.norm2(x)))


def _optional(block: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    for name in (f"ls{number}", f"drop_path{number}"):
        part = getattr(block, name, None)
        x = x if part is None else part(x)
    return x


def merge(
    x: torch.Tensor, metric: torch.Tensor, sizes: torch.Tensor, count: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: every second token looks for its most similar partner, the `count` best pairs merge.

    Args:
        x: (N, tokens, C). metric: (N, tokens, D), compared by cosine. sizes: (N, tokens, 1).
        count: at most half of the tokens behind `prefix`, rounded up.
    Returns:
        Tokens (N, tokens - count, C), the weighted means of what merged, and their sizes.
    """
    head, body, weight = x[:, :prefix], x[:, prefix:], sizes[:, prefix:]
    metric = F.normalize(metric[:, prefix:], dim=-1)
    a, b, size_a, size_b = body[:, ::2], body[:, 1::2], weight[:, ::2], weight[:, 1::2]
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)  # (N, a)
    order = best.topk(best.shape[1]).indices  # one full order, so that no token can be on both sides
    gone, kept = order[:, :count], order[:, count:]
    size_gone = _take(size_a, gone)
    moved = torch.cat([_take(a, gone) * size_gone, size_gone], -1)  # (N, count, C + 1)
    to = partner.gather(1, gone)[:, None] == torch.arange(b.shape[1], device=x.device)[None, :, None]
    added = to.to(x.dtype) @ moved  # (N, b, C + 1)
    size_b_new = size_b + added[..., -1:]
    b = (b * size_b + added[..., :-1]) / size_b_new
    return (torch.cat([head, _take(a, kept), b], 1),
            torch.cat([sizes[:, :prefix], _take(size_a, kept), size_b_new], 1))  # fmt: skip


def drop(x: torch.Tensor, score: torch.Tensor, count: int, prefix: int) -> torch.Tensor:
    """Tokens (N, tokens - count, C): behind `prefix` those with the highest `score` (N, tokens)."""
    body = x[:, prefix:]
    best = score[:, prefix:].topk(body.shape[1] - count).indices
    return torch.cat([x[:, :prefix], _take(body, best)], 1)


def _take(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Tokens of (N, tokens, C) at (N, chosen)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def keys(attn: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """The keys of an attention, mean over its heads (N, tokens, D); what it is given where it has none of its own.

    The mean of the heads' weights gives it in one small product; a norm of the keys is left out.
    """
    found = _projection(attn, "k")
    if found is None:
        return given
    weight, bias, heads = found
    weight = weight.reshape(heads, -1, weight.shape[-1]).mean(0)
    return F.linear(given, weight, None if bias is None else bias.reshape(heads, -1).mean(0))


def class_attention(attn: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """How much the first token attends to each (N, tokens), mean over heads.

    Without the keys: q (W_k x) = (q W_k) x, and a key's bias is the same for all tokens. Norms of queries and keys are
    left out.
    """
    query, key = _projection(attn, "q"), _projection(attn, "k")
    if query is None or key is None:
        raise ValueError("this attention has no queries and keys of its own")
    heads = query[2]
    q = F.linear(given[:, :1], query[0], query[1])  # (N, 1, heads * D)
    size = q.shape[-1] // heads
    weight = key[0].reshape(1, heads, size, -1)
    looked = q.reshape(-1, heads, 1, size) @ weight  # (N, heads, 1, C)
    return (looked @ given[:, None].transpose(2, 3) * size**-0.5).softmax(-1).mean(1)[:, 0]


def _projection(attn: nn.Module, which: str) -> tuple[torch.Tensor, torch.Tensor | None, int] | None:
    """(weight, bias, heads) of the queries or keys, of timm's attention or of one that was split into q and kv."""
    heads = getattr(attn, "num_heads", None)
    fused, q, kv = (getattr(attn, name, None) for name in ("qkv", "q", "kv"))
    if not isinstance(heads, int):
        return None
    if isinstance(fused, nn.Linear):
        start, parts, layer = (0 if which == "q" else 1), 3, fused
    elif isinstance(q, nn.Linear) and isinstance(kv, nn.Linear):
        start, parts, layer = 0, (1 if which == "q" else 2), (q if which == "q" else kv)
    else:
        return None
    rows = layer.out_features // parts
    own = slice(start * rows, (start + 1) * rows)
    return layer.weight[own], None if layer.bias is None else layer.bias[own], heads
