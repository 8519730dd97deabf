"""DDPM's U-Net, small, for handwritten digits: 32x32 grey images; diffusers' UNet2DModel.

Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239: residual blocks with the time added,
self-attention at the lowest resolution. It predicts v (Salimans & Ho, 2022, arXiv:2202.00512) on the cosine schedule
(Nichol & Dhariwal, 2021, arXiv:2102.09672), which stays well defined where there is nothing but noise.

With scale_shift, resample="resnet", head_width=64 and learned_sigma it is ADM's U-Net (Dhariwal & Nichol, 2021,
arXiv:2105.05233). Model folders of diffusers' UNet2DModel load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from edgegen.models import _diffusers, _published

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
    *,
    scale_shift: bool = False,
    resample: str = "conv",
    head_width: int = 0,
    learned_sigma: bool = False,
    freq_shift: int = 0,
    flip_sin_to_cos: bool = True,
    downsample_padding: int = 1,
    norm_eps: float = 1e-5,
) -> nn.Module:
    """A fresh denoiser (sample, timestep[, label]) -> v.

    Args:
        channels: of the images. size: their height and width.
        widths: channels at each resolution, each half the one before.
        blocks: residual blocks a resolution on the way down; one more on the way up.
        attention: whether a resolution has self-attention.
        groups: of each group norm.
        labels: classes; 0: none. One more embedding stands for "no class".
        scale_shift: the time scales and shifts the norms, instead of being added. resample: "conv", or "resnet": size
            changes inside residual blocks. head_width: channels of an attention head; 0: one head. learned_sigma: the
            network also predicts a variance, which is dropped.
        freq_shift, flip_sin_to_cos, downsample_padding, norm_eps: as UNet2DModel has them; published weights differ.
    Raises:
        ValueError: an unknown resample, or not as many flags of attention as widths.
    """
    net = _diffusers.network(FOLDER.module, FOLDER.name, _config(**locals()))
    return _diffusers.Denoiser(net, labelled=labels > 0, learned_sigma=learned_sigma)


def _config(
    *, channels: int, widths: Sequence[int], blocks: int, attention: Sequence[bool], groups: int, labels: int,
    size: int, scale_shift: bool, resample: str, head_width: int, learned_sigma: bool, **same: Any,
) -> dict[str, Any]:  # fmt: skip
    """UNet2DModel's arguments for those of `create`; `same` are those that have one name in both."""
    if resample not in ("conv", "resnet"):
        raise ValueError(f"resample must be conv or resnet, got {resample!r}")
    if len(widths) != len(attention):
        raise ValueError(f"attention must hold one flag a width, got {len(attention)} for {len(widths)}")
    plain = "DownBlock2D" if resample == "conv" else "ResnetDownsampleBlock2D"
    down = ["AttnDownBlock2D" if there else plain for there in attention]
    return {
        "sample_size": size, "in_channels": channels, "out_channels": channels * (2 if learned_sigma else 1),
        "block_out_channels": tuple(widths), "layers_per_block": blocks, "down_block_types": tuple(down),
        "up_block_types": tuple(_up(name) for name in reversed(down)), "norm_num_groups": groups,
        "num_class_embeds": labels + 1 if labels else None, "attention_head_dim": head_width or None,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default", "downsample_type": resample,
        "upsample_type": resample, **same,
    }  # fmt: skip


def _up(block: str) -> str:
    """The block of the way up that belongs to one of the way down."""
    return block.replace("Downsample", "Upsample").replace("Down", "Up")


def _arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a config.json of UNet2DModel states; its classes are for the user to state."""
    down = list(found["down_block_types"])
    resample = "resnet" if "ResnetDownsampleBlock2D" in down else str(found["downsample_type"])
    return {
        "channels": found["in_channels"], "widths": list(found["block_out_channels"]),
        "blocks": found["layers_per_block"], "attention": [name.startswith("Attn") for name in down],
        "groups": found["norm_num_groups"], "labels": 0, "size": found["sample_size"], "resample": resample,
        "scale_shift": found["resnet_time_scale_shift"] == "scale_shift",
        "head_width": found["attention_head_dim"] or 0,
        "learned_sigma": found["out_channels"] == 2 * found["in_channels"],
        **{key: found[key] for key in ("freq_shift", "flip_sin_to_cos", "downsample_padding", "norm_eps")},
    }  # fmt: skip


FOLDER = _diffusers.Folder(
    "unets.unet_2d", "UNet2DModel", _config, _arguments, frozenset({"dropout", "num_train_timesteps"})
)


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the sample's channels and size, and the number of classes where there are any.

    Only digits are judged in the features of digits.
    """
    channels, size, labels = config.get("channels", 1), config.get("size", 32), config.get("labels", 0)
    shape = [1, channels, size, size]
    options = {**RECORD["options"], **({"labels": labels} if labels else {})}
    if channels != 1:
        options["features"] = "cifar"
    return _diffusers.record(RECORD, shape, options)


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attention layers of older files of diffusers under their present names."""
    rules = tuple((rf"(.*attentions\.\d+)\.{old}\.(.*)", rf"\1.{new}.\2") for old, new in
                  (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")))  # fmt: skip
    return _published.renamed(state, rules)
