"""A small vision transformer for MNIST: 16 patches of 7 pixels and a class token, width 49, five blocks, seven heads.

Dosovitskiy et al., 2020, An Image is Worth 16x16 Words, arXiv:2010.11929. Weights: vit-mnist.pth in ../shared/assets,
rewritten by `from_published` (`benchmarks/prepare_data.py --only mnist` keeps them beside the images): there, linears
of query, key and value stand before the ones inside `nn.MultiheadAttention`, two that make one, and a block's two
normalisations share their weights. This one has timm's VisionTransformer, which every pass for attention knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

RECORD = {
    "task": "classification",
    "input": {
        "shape": [1, 1, 28, 28],
        "value_range": [0, 1],
        "mean": [0.1307],
        "std": [0.3081],
        "colour": "L",
        "resize": 28,
        "crop": [28, 28],
    },
    "output": {"shape": [1, 10]},
    "options": {"classes": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]},
    "paper": "Dosovitskiy et al., 2020, arXiv:2010.11929",
    "licence": "see ../shared/assets/README.md",
    "source": "vit-mnist.pth",
}
DEPTH = 5


def vit_mnist() -> nn.Module:
    """The network with fresh weights; images (N, 1, 28, 28), normalised, to logits (N, 10)."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=49, depth=DEPTH, num_heads=7,
        final_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip


def from_published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published weights under timm's names; the two linears of each of query, key and value multiplied."""
    named = {
        "cls_token": state["embedding.cls_token"], "pos_embed": state["embedding.position_div_imgs"],
        "patch_embed.proj.weight": state["embedding.div_img.weight"],
        "patch_embed.proj.bias": state["embedding.div_img.bias"],
        "head.weight": state["classifer.weight"], "head.bias": state["classifer.bias"],
    }  # fmt: skip
    for block in range(DEPTH):
        there, here = f"layers.{block}.", f"blocks.{block}."
        heads = f"{there}multihead_attention."
        inner = f"{heads}multihead_attention."
        weights, biases = [], []
        for name, weight, bias in zip(("query", "key", "value"), state[f"{inner}in_proj_weight"].double().chunk(3),
                                      state[f"{inner}in_proj_bias"].double().chunk(3), strict=True):  # fmt: skip
            weights.append(weight @ state[f"{heads}{name}.weight"].double())
            biases.append(weight @ state[f"{heads}{name}.bias"].double() + bias)
        for kind, parts in (("weight", weights), ("bias", biases)):
            named[f"{here}attn.qkv.{kind}"] = torch.cat(parts).float()
        for kind in ("weight", "bias"):
            named |= {f"{here}{norm}.{kind}": state[f"{there}norm.{kind}"].clone() for norm in ("norm1", "norm2")}
            named[f"{here}attn.proj.{kind}"] = state[f"{inner}out_proj.{kind}"]
            named[f"{here}mlp.fc1.{kind}"] = state[f"{there}FFL.0.{kind}"]
            named[f"{here}mlp.fc2.{kind}"] = state[f"{there}FFL.3.{kind}"]
    return named
