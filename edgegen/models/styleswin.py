"""StyleSwin generator: Swin transformer blocks with double window attention, styled by adaptive instance norm.

Zhang et al., 2022, StyleSwin, arXiv:2112.10762. Checkpoints of microsoft/StyleSwin (`g_ema`) load. Sizes and window
masks are fixed, so the graph is static; shifted windows are rolls (`roll_to_slices` where a runtime has none).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.nn import modulated

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 512]},
    "output": {"shape": [1, 3, 256, 256], "value_range": [-1, 1]},
    "options": {"calibration": "latents"},
    "paper": "Zhang et al., 2022, StyleSwin, arXiv:2112.10762",
    "licence": "Apache-2.0",
    "source": "FFHQ_256.pt, FFHQ_1024.pt ... of microsoft/StyleSwin (MIT); edgegen ships none",
}
WIDTHS = (512, 512, 512, 512, 512, 256, 128)  # at 4, 8, 16 ... 256 pixels
WIDTHS_1024 = (512, 512, 512, 512, 256, 128, 64, 32, 16)


class AdaptiveInstanceNorm(nn.Module):
    """(N, L, C), normalised along L, scaled and shifted by the style (N, style)."""

    def __init__(self, channels: int, style: int) -> None:
        super().__init__()
        self.style = modulated.linear(style, 2 * channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.style(w)[:, :, None].chunk(2, 1)
        return (F.instance_norm(x.transpose(1, 2)) * scale + shift).transpose(1, 2)


class WindowAttention(nn.Module):
    """Attention inside windows with relative position bias: q, k, v (N, size, size, C) to the same shape."""

    index: Tensor
    mask: Tensor | None

    def __init__(self, channels: int, size: int, window: int, heads: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        steps = grid[:, :, None] - grid[:, None, :] + window - 1  # (2, T, T), 0..2 window - 2
        self.register_buffer("index", (steps[0] * (2 * window - 1) + steps[1]).flatten(), persistent=False)
        self.register_buffer("mask", _mask(size, window, shift) if shift else None, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count, size, _, channels = q.shape
        across, tokens, deep = size // self.window, self.window**2, channels // self.heads
        if self.shift:
            q, k, v = (torch.roll(x, (-self.shift, -self.shift), (1, 2)) for x in (q, k, v))
        cut = (count, across, self.window, across, self.window, self.heads, deep)
        order = (0, 1, 3, 5, 2, 4, 6)
        q, k, v = (x.reshape(cut).permute(order).reshape(count, -1, self.heads, tokens, deep) for x in (q, k, v))
        bias = self.relative_position_bias_table[self.index].reshape(tokens, tokens, -1).permute(2, 0, 1)
        scores = (q * deep**-0.5) @ k.transpose(-2, -1) + bias
        scores = scores if self.mask is None else scores + self.mask[:, None]
        y = (torch.softmax(scores, -1) @ v).reshape(count, across, across, self.heads, self.window, self.window, deep)
        y = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(count, size, size, channels)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


def _mask(size: int, window: int, shift: int) -> Tensor:
    """-100 between tokens that a roll brought into one window from far apart: (windows, T, T)."""
    region = torch.zeros(size)
    region[-window:-shift], region[-shift:] = 1, 2
    regions = (3 * region[:, None] + region[None, :]).reshape(size // window, window, size // window, window)
    flat = regions.transpose(1, 2).reshape(-1, window**2)
    return torch.where(flat[:, None, :] == flat[:, :, None], 0.0, -100.0)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, ratio * channels), nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Styled transformer block; one half of the channels attends in windows, the other in shifted ones: (N, L, C)."""

    def __init__(self, channels: int, size: int, style: int, ratio: int) -> None:
        super().__init__()
        heads, window = max(channels // 32, 4), min(size, 8)
        self.size = size
        self.norm1, self.norm2 = AdaptiveInstanceNorm(channels, style), AdaptiveInstanceNorm(channels, style)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attn = nn.ModuleList(
            WindowAttention(channels // 2, size, window, heads // 2, shift)
            for shift in (0, window // 2 if size > window else 0)
        )
        self.mlp = Mlp(channels, ratio)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        count, length, channels = x.shape
        parts = self.qkv(self.norm1(x, w)).reshape(count, self.size, self.size, 6, channels // 2)
        halves = [attend(*(parts[:, :, :, i + j] for j in (0, 2, 4))) for i, attend in enumerate(self.attn)]
        x = x + self.proj(torch.cat(halves, -1).reshape(count, length, channels))
        return x + self.mlp(self.norm2(x, w))


class Enlarge(nn.Module):
    """Bilinear x2, layer norm, linear, and sinusoidal positions: (N, size^2, inputs) to (N, 4 size^2, outputs)."""

    positions: Tensor

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm, self.reduction = nn.LayerNorm(inputs), nn.Linear(inputs, outputs, bias=False)
        self.alpha = nn.Parameter(torch.full((1,), 0.05))
        self.register_buffer("positions", _positions(outputs, 2 * size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, _, channels = x.shape
        x = x.transpose(1, 2).reshape(count, channels, self.size, self.size)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        return self.reduction(self.norm(x)) + self.alpha * self.positions


def _positions(channels: int, size: int) -> Tensor:
    """(size^2, channels): sine and cosine of column, then of row, both counted from one."""
    half = channels // 4
    rates = torch.exp(torch.arange(half) * (-math.log(10000) / max(1, half - 1)))
    angles = torch.arange(1, size + 1)[:, None] * rates
    table = torch.cat((angles.sin(), angles.cos()), 1)  # (size, channels / 2)
    columns, rows = table[None].expand(size, -1, -1), table[:, None].expand(-1, size, -1)
    return torch.cat((columns, rows), -1).reshape(size**2, channels)


class Layer(nn.Module):
    """Two blocks at one size, and the enlargement to the next."""

    def __init__(self, channels: int, outputs: int | None, size: int, style: int, ratio: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, size, style, ratio) for _ in range(2))
        self.upsample = Enlarge(channels, outputs, size) if outputs else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, w)
        return x if self.upsample is None else self.upsample(x)


class Generator(nn.Module):
    """Latents (N, style), N(0, 1), to RGB (N, 3, size, size), about -1..1."""

    def __init__(self, widths: Sequence[int], style: int, layers: int, ratio: int) -> None:
        super().__init__()
        self.mapping = modulated.Mapping(style, style, layers)
        self.const = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        after = [*widths[1:], None]
        self.layers = nn.ModuleList(
            Layer(width, after[i], 2 ** (i + 2), style, ratio) for i, width in enumerate(widths)
        )
        self.to_rgbs = nn.ModuleList(nn.Conv2d(after[i] or width, 3, 1) for i, width in enumerate(widths))
        self.enlarge = modulated.Upsample()

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.const.flatten(2).transpose(1, 2).repeat(len(z), 1, 1)
        image: Any = None
        for i, (layer, to_rgb) in enumerate(zip(self.layers, self.to_rgbs)):
            x = layer(x, w)
            size = 2 ** min(i + 3, len(self.layers) + 1)
            part = to_rgb(x.transpose(1, 2).reshape(len(z), -1, size, size))
            if image is not None:
                part = part + (self.enlarge(image) if i < len(self.layers) - 1 else image)
            image = part
        return image


def create(widths: Sequence[int] = WIDTHS, style: int = 512, layers: int = 8, ratio: int = 4) -> nn.Module:
    """A fresh generator of 2^(number of widths + 1) pixels.

    Args:
        widths: channels at 4, 8, 16 ... pixels, each divisible by 16; WIDTHS_1024 are those of 1024 pixels.
        style: numbers of a latent and of a style. layers: of the mapping network. ratio: of the MLPs.
    Raises:
        ValueError: widths that do not divide into heads.
    """
    if len(widths) < 2 or any(width % 16 or (width // 2) % (max(width // 32, 4) // 2) for width in widths):
        raise ValueError(f"widths must be two or more, each divisible by 16 and into heads of 32, got {list(widths)}")
    return Generator(widths, style, layers, ratio)


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """microsoft/StyleSwin's names; gains go into the weights, tables that follow from the sizes are left out."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"(relative_position_index|attn_mask\d|_float_tensor|upsample\.kernel)$", name):
            continue
        if match := re.fullmatch(r"style\.(\d+)\.(weight|bias)", name):
            gain = 0.01 * math.sqrt(2) / (math.sqrt(tensor.shape[1]) if tensor.ndim == 2 else 1)
            result[f"mapping.fc.{int(match[1]) - 1}.{match[2]}"] = tensor * gain
        elif re.fullmatch(r"layers\.\d+\.blocks\.\d+\.norm\d\.style\.weight", name) and "input.input" in state:
            result[name] = tensor / math.sqrt(tensor.shape[1])
        elif match := re.fullmatch(r"to_rgbs\.(\d+)\.bias", name):
            if tensor.ndim == 4 and f"to_rgbs.{match[1]}.conv.bias" in state:
                result[name] = tensor.reshape(-1) + state[f"to_rgbs.{match[1]}.conv.bias"]
            else:
                result[name] = tensor
        elif re.fullmatch(r"to_rgbs\.\d+\.conv\.weight", name):
            result[name.replace("conv.", "")] = tensor
        elif not re.fullmatch(r"to_rgbs\.\d+\.conv\.bias", name):
            result["const" if name == "input.input" else name] = tensor
    return result
