"""pix2pix's U-Net, small: a photo of 128x128 pixels as if painted; `pix2pix` in another size.

Isola et al., 2017, pix2pix, arXiv:1611.07004. It learns the filter of Kuwahara et al., 1976, Processing of
RI-Angiocardiographic Images: every pixel takes the mean of the calmest of the four squares that meet in it, so that
strokes end at edges.
"""

from __future__ import annotations

from torch import nn

from edgegen.models import pix2pix

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 128, 128], "value_range": [-1, 1], "mean": [], "std": [], "colour": "RGB", "resize": 128,
              "crop": [128, 128]},
    "output": {"shape": [1, 3, 128, 128], "value_range": [-1, 1]},
    "options": {"calibration": "photos"},
    "paper": "Isola et al., 2017, pix2pix, arXiv:1611.07004",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/paint.py, trained on kodak24 and ten photos under CC-BY-2.0 or in the public domain",
}  # fmt: skip


def create(width: int = 20, levels: int = 5) -> nn.Module:
    """A fresh U-Net, RGB -1..1 (N, 3, H, W), H and W divisible by 2^levels, to the same; as `pix2pix.create`."""
    return pix2pix.create(width, levels)
