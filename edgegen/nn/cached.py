"""A diffusers U-Net as two networks: the full one, and a partial one that takes what the deep blocks gave before.

Ma et al., 2024, DeepCache, arXiv:2312.00858: from step to step the deep features change little, so they are handed over
as a tensor and only the outermost blocks run. `samplers` runs the full one at every `cache_every`-th step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CACHE = "cache"


class Full(nn.Module):
    """(sample, timestep[, label]) -> (output, cache): the network itself, and what its last `keep` up blocks get."""

    def __init__(self, denoiser: Any, keep: int = 1) -> None:
        super().__init__()
        self.net, self.labelled, self.keep = _network(denoiser, keep), denoiser.labelled, keep

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        emb = _embedding(self.net, timestep, more[0] if self.labelled else None)
        x, skips = _down(self.net, sample, emb, len(self.net.down_blocks))
        if self.net.mid_block is not None:
            x = self.net.mid_block(x, emb)
        split = len(self.net.up_blocks) - self.keep
        cache, skips = _up(self.net.up_blocks[:split], x, skips, emb)
        x, _ = _up(self.net.up_blocks[split:], cache, skips, emb)
        return _end(self.net, x), cache


class Partial(nn.Module):
    """(sample, timestep[, label], cache) -> output: the outermost `keep` blocks on either side, the rest from cache."""

    def __init__(self, denoiser: Any, keep: int = 1) -> None:
        super().__init__()
        self.net, self.labelled, self.keep = _network(denoiser, keep), denoiser.labelled, keep

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        emb = _embedding(self.net, timestep, more[0] if self.labelled else None)
        outer = self.net.up_blocks[len(self.net.up_blocks) - self.keep :]
        _, skips = _down(self.net, sample, emb, self.keep)  # its last downsampling falls out of a graph
        x, _ = _up(outer, more[-1], skips[: sum(len(block.resnets) for block in outer)], emb)
        return _end(self.net, x)


def _network(denoiser: Any, keep: int) -> Any:
    net = getattr(denoiser, "net", None)
    if net is None or not hasattr(net, "up_blocks") or any(hasattr(block, "skip_conv") for block in net.up_blocks):
        raise ValueError(f"caching is for U-Nets of diffusers without skip convolutions, got {type(net).__name__}")
    if not 1 <= keep < len(net.up_blocks):
        raise ValueError(f"keep must be from 1 to {len(net.up_blocks) - 1}, the up blocks less one; got {keep}")
    if net.config.center_input_sample or net.config.time_embedding_type == "fourier":
        raise ValueError("caching is for U-Nets with positional times and inputs as they are")
    return net


def _embedding(net: Any, timestep: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    emb = net.time_embedding(net.time_proj(timestep).to(net.conv_in.weight.dtype))
    return emb if label is None else emb + net.class_embedding(label.long())


def _down(net: Any, sample: torch.Tensor, emb: torch.Tensor, blocks: int) -> tuple[torch.Tensor, tuple]:
    x = net.conv_in(sample)
    skips: tuple[torch.Tensor, ...] = (x,)
    for block in net.down_blocks[:blocks]:
        x, found = block(hidden_states=x, temb=emb)
        skips += found
    return x, skips


def _up(blocks: Any, x: torch.Tensor, skips: tuple, emb: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    for block in blocks:
        count = len(block.resnets)
        x, skips = block(x, skips[-count:], emb), skips[:-count]
    return x, skips


def _end(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.conv_out(net.conv_act(net.conv_norm_out(x)))
