"""DDPM's U-Net, small, for CIFAR-10: 32x32 colour images of ten classes; `ddpm_unet` in another size.

Ho et al., 2020, arXiv:2006.11239; classes are left out of one image in ten, so that guidance without a classifier
(Ho & Salimans, 2022, arXiv:2207.12598) can be used.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from edgegen.models import ddpm_unet

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 3, 32, 32]},
    "output": {"shape": [1, 3, 32, 32], "value_range": [-1, 1]},
    "options": {
        "features": "cifar",
        "prediction": "v",
        "schedule": "cosine",
        "train_steps": 1000,
        "labels": 10,
        "sampler": {"name": "ddim", "steps": 50},
    },
    "paper": "Ho et al., 2020, DDPM, arXiv:2006.11239; Ho & Salimans, 2022, arXiv:2207.12598",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/diffusion.py, trained on the CIFAR-10 training images (Krizhevsky 2009)",
}


def create(
    widths: Sequence[int] = (16, 32, 96),
    blocks: int = 1,
    attention: Sequence[bool] = (False, False, True),
    groups: int = 8,
    labels: int = 10,
) -> nn.Module:
    """A fresh denoiser (sample, timestep, label) -> v; the arguments are those of `ddpm_unet.create`."""
    return ddpm_unet.create(3, widths, blocks, attention, groups, labels)
