"""DiT, a transformer denoiser with class labels; diffusers' DiTTransformer2DModel, by default a small one for 32x32.

Peebles & Xie, 2023, Scalable Diffusion Models with Transformers, arXiv:2212.09748: patches as tokens, time and class
through adaptive layer norms whose gates start at zero. DiT-XL/2 is layers 28, heads 16, width 72 a head, on latents of
(4, 32, 32), `learned_sigma` with 1000 classes. Model folders of diffusers' DiTTransformer2DModel load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from edgegen.models import _diffusers

RECORD: dict[str, Any] = {
    "task": "unconditional",
    "input": {"shape": [1, 3, 32, 32]},
    "output": {"shape": [1, 3, 32, 32], "value_range": [-1, 1]},
    "options": {
        "features": "cifar",
        "prediction": "epsilon",
        "schedule": "linear",
        "train_steps": 1000,
        "labels": 10,
        "sampler": {"name": "ddim", "steps": 50},
    },
    "paper": "Peebles & Xie, 2023, DiT, arXiv:2212.09748",
    "licence": "Apache-2.0",
    "source": "no weights ship; edgegen train --model dit, or the transformer folder of facebook/DiT-XL-2-256",
}


def create(
    channels: int = 3,
    size: int = 32,
    patch: int = 4,
    layers: int = 6,
    heads: int = 4,
    head_width: int = 32,
    labels: int = 10,
    learned_sigma: bool = False,
) -> nn.Module:
    """A fresh denoiser (sample, timestep, label) -> noise.

    Args:
        channels: of the images or latents. size: their height and width. patch: side of a token in pixels.
        labels: classes; the label of that number means no class.
        learned_sigma: the network also predicts a variance, as the published ones do; it is dropped.
    """
    net = _diffusers.network(FOLDER.module, FOLDER.name, _config(**locals()))
    return _diffusers.Denoiser(net, labelled=True, learned_sigma=learned_sigma)


def _config(
    *, channels: int, size: int, patch: int, layers: int, heads: int, head_width: int, labels: int, learned_sigma: bool
) -> dict[str, Any]:  # fmt: skip
    """DiTTransformer2DModel's arguments for those of `create`."""
    return {
        "num_attention_heads": heads, "attention_head_dim": head_width, "in_channels": channels,
        "out_channels": channels * (2 if learned_sigma else 1), "num_layers": layers, "sample_size": size,
        "patch_size": patch, "num_embeds_ada_norm": labels,
    }  # fmt: skip


def _arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a config.json of DiTTransformer2DModel states."""
    return {
        "channels": found["in_channels"], "size": found["sample_size"], "patch": found["patch_size"],
        "layers": found["num_layers"], "heads": found["num_attention_heads"],
        "head_width": found["attention_head_dim"], "labels": found["num_embeds_ada_norm"],
        "learned_sigma": found["out_channels"] == 2 * found["in_channels"],
    }  # fmt: skip


FOLDER = _diffusers.Folder(
    "transformers.dit_transformer_2d", "DiTTransformer2DModel", _config, _arguments,
    frozenset({"dropout", "norm_num_groups", "upcast_attention"}), ("Transformer2DModel",),
)  # fmt: skip


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the sample's channels and size, the number of classes."""
    channels, size = config.get("channels", 3), config.get("size", 32)
    options = {**RECORD["options"], "labels": config.get("labels", 10)}
    shape = [1, channels, size, size]
    return _diffusers.record(RECORD, shape, options)
