"""DDPM's U-Net, small, for handwritten digits: 32x32 grey images; diffusers' UNet2DModel.

Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239: residual blocks with the time added,
self-attention at the lowest resolution. It predicts v (Salimans & Ho, 2022, arXiv:2202.00512) on the cosine schedule
(Nichol & Dhariwal, 2021, arXiv:2102.09672), which stays well defined where there is nothing but noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from edgegen.models import _diffusers

RECORD: dict[str, Any] = {
    "task": "unconditional",
    "input": {"shape": [1, 1, 32, 32]},
    "output": {"shape": [1, 1, 32, 32], "value_range": [-1, 1]},
    "options": {
        "features": "mnist",
        "prediction": "v",
        "schedule": "cosine",
        "train_steps": 1000,
        "sampler": {"name": "ddim", "steps": 50},
    },
    "paper": "Ho et al., 2020, DDPM, arXiv:2006.11239; Salimans & Ho, 2022, arXiv:2202.00512",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/diffusion.py, trained on the MNIST training images padded to 32x32",
}


def create(
    channels: int = 1,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    attention: Sequence[bool] = (False, False, True),
    groups: int = 8,
    labels: int = 0,
    size: int = 32,
) -> nn.Module:
    """A fresh denoiser (sample, timestep[, label]) -> v.

    Args:
        channels: of the images. size: their height and width.
        widths: channels at each resolution, each half the one before.
        blocks: residual blocks a resolution on the way down; one more on the way up.
        attention: whether a resolution has self-attention.
        groups: of each group norm.
        labels: classes; 0: none. One more embedding stands for "no class".
    """
    down = ["AttnDownBlock2D" if there else "DownBlock2D" for there in attention]
    config = {
        "sample_size": size, "in_channels": channels, "out_channels": channels, "block_out_channels": tuple(widths),
        "layers_per_block": blocks, "down_block_types": tuple(down), "norm_num_groups": groups,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "num_class_embeds": labels + 1 if labels else None, "attention_head_dim": None,
    }  # fmt: skip
    return _diffusers.Denoiser(_diffusers.network("unets.unet_2d", "UNet2DModel", config), labelled=labels > 0)


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the sample's channels and size, and the number of classes where there are any."""
    channels, size, labels = config.get("channels", 1), config.get("size", 32), config.get("labels", 0)
    shape = [1, channels, size, size]
    options = {**RECORD["options"], **({"labels": labels} if labels else {})}
    return {**RECORD, "input": {"shape": shape}, "output": {**RECORD["output"], "shape": shape}, "options": options}
