"""A denoiser as two networks: the full one, and a partial one that takes what the deep blocks gave before.

Ma et al., 2024, DeepCache, arXiv:2312.00858: from step to step the deep features of a U-Net change little, so they are
handed over as a tensor and only the outermost blocks run. Chen et al., 2024, Delta-DiT, arXiv:2406.01125: a transformer
has no skips across, so it is what a range of blocks adds that is handed over. `samplers` runs the full network at every
`cache_every`-th step. A trained block (`feedback`) may correct what is handed over for the time of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen import samplers
from edgegen.nn import diffusion
from edgegen.nn.feedback import Feedback
from edgegen.types import Stage, TensorSpec

CACHE = "cache"


class Full(nn.Module):
    """(sample, timestep[, label]) -> (output, cache): the network itself, and what its deep blocks gave.

    keep: up blocks of a U-Net, or blocks at each end of a transformer, that the partial network runs itself. blocks:
    of a transformer, the first of the cached blocks and the one after the last, in place of `keep`.
    """

    def __init__(self, denoiser: Any, keep: int = 1, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.net, self.keep, self.span = _network(denoiser, keep, blocks)
        self.labelled, self.learned_sigma = denoiser.labelled, denoiser.learned_sigma

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.span:
            made, cache = _transformer(self.net, sample, timestep, more[0].long(), self.span, None)
            return made[:, : sample.shape[1]], cache
        emb = _embedding(self.net, timestep, more[0] if self.labelled else None)
        x, skips = _down(self.net, sample, emb, len(self.net.down_blocks))
        if self.net.mid_block is not None:
            x = self.net.mid_block(x, emb)
        split = len(self.net.up_blocks) - self.keep
        cache, skips = _up(self.net.up_blocks[:split], x, skips, emb)
        x, _ = _up(self.net.up_blocks[split:], cache, skips, emb)
        return _end(self.net, x, sample), cache


class Partial(nn.Module):
    """(sample, timestep[, label], cache) -> output: the outermost blocks alone, the rest from the cache."""

    def __init__(self, denoiser: Any, keep: int = 1, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.net, self.keep, self.span = _network(denoiser, keep, blocks)
        self.labelled, self.learned_sigma = denoiser.labelled, denoiser.learned_sigma

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        if self.span:
            made, _ = _transformer(self.net, sample, timestep, more[0].long(), self.span, more[-1])
            return made[:, : sample.shape[1]]
        emb = _embedding(self.net, timestep, more[0] if self.labelled else None)
        outer = self.net.up_blocks[len(self.net.up_blocks) - self.keep :]
        _, skips = _down(self.net, sample, emb, self.keep)  # its last downsampling falls out of a graph
        x, _ = _up(outer, _corrected(self.net, more[-1], emb), skips[: sum(len(block.resnets) for block in outer)], emb)
        return _end(self.net, x, sample)


def unfit(module: nn.Module) -> str:
    """Why the blocks of a network cannot be cached, at any depth; empty where they can."""
    net: Any = getattr(module, "net", None)
    if hasattr(net, "transformer_blocks") and hasattr(net, "proj_out_1"):
        return ""
    if net is None or not hasattr(net, "up_blocks") or any(hasattr(block, "skip_conv") for block in net.up_blocks):
        kind = type(module if net is None else net).__name__
        return f"caching is for DiT and for U-Nets without skip convolutions, of diffusers; got {kind}"
    if net.config.center_input_sample or net.config.time_embedding_type == "fourier":
        return "caching is for U-Nets with positional times and inputs as they are"
    return ""


def runs(module: nn.Module, settings: Mapping[str, Any]) -> dict[str, samplers.Run]:
    """Both networks of a denoiser as a sampler takes them.

    Raises:
        ValueError: the denoiser cannot be split so; says why.
    """
    where = (settings["cache_depth"], settings["cache_blocks"])
    return {
        "full": diffusion.runner(Full(module, *where), names=("output", CACHE)),
        "partial": diffusion.runner(Partial(module, *where)),
    }


def stages(stage: Stage, settings: Mapping[str, Any]) -> tuple[Stage, Stage]:
    """The full and the partial network of a denoiser's stage, to be exported.

    Raises:
        ValueError: there is no torch network, or it cannot be split so; says why.
    """
    if stage.module is None:
        raise ValueError("cached blocks need a torch network, and there is only a graph")
    where = (settings["cache_depth"], settings["cache_blocks"])
    full, partial = (kind(stage.module, *where).eval() for kind in (Full, Partial))
    given = [torch.zeros([int(d) for d in spec.shape]) for spec in stage.inputs]
    with torch.no_grad():
        shape = tuple(int(d) for d in full(*given)[1].shape)
    cache = TensorSpec(CACHE, shape, layout="NCHW" if len(shape) == 4 else "NLC")
    return (
        dataclasses.replace(stage, module=full, outputs=(stage.outputs[0], cache)),
        dataclasses.replace(stage, name=f"{stage.name}, partial", module=partial, inputs=(*stage.inputs, cache)),
    )


def add_feedback(denoiser: Any, cache: Sequence[int], seed: int) -> Feedback:
    """Put a fresh block that corrects a cache of that shape into a denoiser, in place of one that is there.

    It sits beside a module that makes or takes the time's embedding, so that the full network does as before.
    """
    name = _place(denoiser.net)
    old = getattr(denoiser.net, name)
    inner: Any = old.inner if isinstance(old, Feedback) else old
    space, told = len(cache) == 4, inner.in_features if name == "proj_out_1" else inner.linear_2.out_features
    channels = int(cache[1] if space else cache[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = Feedback(inner, channels, int(told), max(8, channels // 2), space)
    setattr(denoiser.net, name, block.train(inner.training))
    return block


def _place(net: Any) -> str:
    return "proj_out_1" if hasattr(net, "transformer_blocks") else "time_embedding"


def _corrected(net: Any, cache: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """The cache, by the block where there is one."""
    block = getattr(net, _place(net))
    return block.correct(cache, emb) if isinstance(block, Feedback) else cache


def _network(denoiser: Any, keep: int, blocks: Sequence[int]) -> tuple[Any, int, tuple[int, int] | tuple[()]]:
    """The network inside, the up blocks that are kept, and the cached blocks of a transformer."""
    if why := unfit(denoiser):
        raise ValueError(why)
    net = denoiser.net
    if hasattr(net, "transformer_blocks"):
        count = len(net.transformer_blocks)
        first, end = tuple(blocks) or (keep, count - keep)
        if not 0 <= first < end <= count or end - first == count:
            raise ValueError(f"some blocks must be cached and some not: there are {count}, got {first} to {end}")
        return net, keep, (first, end)
    if blocks:
        raise ValueError(f"ranges of blocks are for transformers; give a U-Net's depth instead, got {list(blocks)}")
    if not 1 <= keep < len(net.up_blocks):
        raise ValueError(f"keep must be from 1 to {len(net.up_blocks) - 1}, the up blocks less one; got {keep}")
    return net, keep, ()


def _transformer(
    net: Any, sample: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, span: tuple[int, int],
    cache: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(output, what the blocks of the span add); with a cache, that is added and they do not run."""
    blocks, (first, end) = list(net.transformer_blocks), span

    def through(x: torch.Tensor, some: Sequence[Any]) -> torch.Tensor:
        for block in some:
            x = block(x, timestep=timestep, class_labels=label)
        return x

    x = through(net.pos_embed(sample), blocks[:first])
    emb = net.transformer_blocks[0].norm1.emb(timestep, label, hidden_dtype=x.dtype)
    if cache is None:
        deep = through(x, blocks[first:end])
        x, cache = deep, deep - x
    else:
        x = x + _corrected(net, cache, emb)
    x = through(x, blocks[end:])
    shift, scale = net.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
    x = net.proj_out_2(net.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    side, patch = int(x.shape[1] ** 0.5), int(net.patch_size)
    x = x.reshape(-1, side, side, patch, patch, net.out_channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, net.out_channels, side * patch, side * patch), cache


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


def _end(net: Any, x: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    return net.conv_out(net.conv_act(net.conv_norm_out(x)))[:, : sample.shape[1]]
