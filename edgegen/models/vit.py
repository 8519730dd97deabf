"""A small vision transformer for CIFAR-10 (ten classes, 32x32): patches of 4 pixels, width 192, nine blocks.

Dosovitskiy et al., 2020, An Image is Worth 16x16 Words, arXiv:2010.11929; the proportions are DeiT-Ti's (Touvron et
al., 2020, arXiv:2012.12877). It has timm's VisionTransformer, so that every pass for attention finds what it knows.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from edgegen.errors import MissingExtra

RECORD: dict[str, Any] = {
    "task": "classification",
    "input": {
        "shape": [1, 3, 32, 32],
        "value_range": [0, 1],
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "colour": "RGB",
        "resize": 32,
        "crop": [32, 32],
    },
    "output": {"shape": [1, 10]},
    "options": {
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    },
    "paper": "Dosovitskiy et al., 2020, ViT, arXiv:2010.11929",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/vit.py, trained on the CIFAR-10 training images (Krizhevsky 2009)",
}


def create(
    size: int = 32, patch: int = 4, width: int = 192, depth: int = 9, heads: int = 3, classes: int = 10,
    pool: Literal["token", "avg"] = "token", drop_path: float = 0.0,
) -> nn.Module:  # fmt: skip
    """A fresh network.

    Args:
        size: height and width of the image in pixels, a multiple of `patch`.
        width: channels of a token, a multiple of `heads`. depth: blocks. classes: outputs.
        pool: "token" (the class token) or "avg" (the mean of the others).
        drop_path: largest share of blocks that are left out at random in training, 0 to 1.
    Raises:
        ValueError: sizes that do not divide, or another `pool`.
        MissingExtra: timm is not installed.
    """
    if size % patch or width % heads:
        raise ValueError(f"size {size} must be a multiple of patch {patch}, and width {width} of heads {heads}")
    if pool not in ("token", "avg"):
        raise ValueError(f"pool must be token or avg, got {pool!r}")
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise MissingExtra("timm", "for the built-in model vit", "timm") from error
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes,
        global_pool=pool, drop_path_rate=drop_path,
    )  # fmt: skip


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the image's size, the number of classes (other than ten have no names)."""
    size, classes = config.get("size", 32), config.get("classes", 10)
    taken = {**RECORD["input"], "shape": [1, 3, size, size], "resize": size, "crop": [size, size]}
    options = RECORD["options"] if classes == 10 else {}
    return {**RECORD, "input": taken, "output": {"shape": [1, classes]}, "options": options}
