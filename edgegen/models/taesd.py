"""TAESD decoder: latents of a diffusion model to an image, plain convolutions and ReLU, eight times enlarged.

Bohan, madebyollin/taesd: a tiny autoencoder for the latents of Stable Diffusion (4 channels), SD3 and FLUX.1 (16) and,
with pooled branches in the first blocks, FLUX.2 (32). Its decoder files and diffusers' AutoencoderTiny, file or
folder, load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.models import _diffusers

RECORD = {
    "task": "restoration",
    "input": {"shape": [1, 4, 32, 32], "mean": [], "std": []},
    "output": {"shape": [1, 3, 256, 256], "value_range": [0, 1]},
    "options": {},
    "paper": "",
    "licence": "Apache-2.0",
    "source": "taesd_decoder.pth of madebyollin/taesd, or huggingface.co/madebyollin/taesd (MIT); edgegen ships none",
}


class Clamp(nn.Module):
    """Soft limit to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three 3x3 convolutions around a shortcut; `pooled` adds a group-normalized 1x1 branch before them."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(self.conv(x) + x)


def create(latent: int = 4, width: int = 64, blocks: int = 3, pooled: bool = False) -> nn.Module:
    """A fresh decoder: latents (N, latent, h, w) to RGB (N, 3, 8 h, 8 w), nominally 0..1 (not clamped, as trained).

    Args:
        latent: 4 for Stable Diffusion 1, 2 and XL, 16 for SD3 and FLUX.1, 32 for FLUX.2.
        width: channels. blocks: of each of the first three sizes. pooled: as for FLUX.2.
    """
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent, width, 3, padding=1), nn.ReLU()]
    for stage in range(3):
        layers += [Block(width, pooled and stage == 0) for _ in range(blocks)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(width, False), nn.Conv2d(width, 3, 3, padding=1))


def _config(*, latent: int, width: int, blocks: int, pooled: bool = False) -> dict[str, Any]:
    """What AutoencoderTiny's config.json states of a decoder; it makes images in -1..1 of those in 0..1 here.

    Raises:
        ValueError: pooled, which it does not know.
    """
    if pooled:
        raise ValueError("AutoencoderTiny has no pooled branches")
    return {"latent_channels": latent, "decoder_block_out_channels": [width] * 4, "out_channels": 3,
            "num_decoder_blocks": [blocks] * 3 + [1]}  # fmt: skip


def _arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a config.json of AutoencoderTiny states."""
    return {"latent": found["latent_channels"], "width": found["decoder_block_out_channels"][0],
            "blocks": found["num_decoder_blocks"][0]}  # fmt: skip


FOLDER = _diffusers.Folder(
    "autoencoders.autoencoder_tiny", "AutoencoderTiny", _config, _arguments,
    frozenset({"in_channels", "encoder_block_out_channels", "num_encoder_blocks", "block_out_channels", "force_upcast",
               "latent_magnitude", "latent_shift", "scaling_factor", "shift_factor"}),  # the encoder's, the pipeline's
)  # fmt: skip


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the latent's channels."""
    shape = [1, config.get("latent", 4), 32, 32]
    return {**RECORD, "input": {"shape": shape, "mean": [], "std": []}, "output": {"value_range": [0, 1]}}


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder of diffusers' AutoencoderTiny counts its layers without the clamp; its encoder is left out."""
    if not any(name.startswith("decoder.layers.") for name in state):
        return dict(state)
    result = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            result[f"{int(match[1]) + 1}.{match[2]}"] = tensor
        elif not name.startswith("encoder."):
            result[name] = tensor
    return result
