"""SAGAN's generator, small, for CIFAR-10: 32x32 colour images of ten classes; `sagan` in another size.

Zhang et al., 2019, Self-Attention Generative Adversarial Networks, arXiv:1805.08318. The latent vector ends in ten
numbers, the largest of which names the class.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from edgegen.models import sagan

RECORD: dict[str, Any] = {
    "task": "unconditional",
    "input": {"shape": [1, 138]},
    "output": {"shape": [1, 3, 32, 32], "value_range": [-1, 1]},
    "options": {"calibration": "latents", "features": "cifar", "labels": 10},
    "paper": "Zhang et al., 2019, SAGAN, arXiv:1805.08318",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/sagan.py, trained on the CIFAR-10 training images (Krizhevsky 2009)",
}


def create(latent: int = 128, classes: int = 10, width: int = 48, attention: int = 16) -> nn.Module:
    """A fresh generator, latents (N, latent + classes) to RGB (N, 3, 32, 32) in -1..1; arguments as `sagan.create`."""
    return sagan.create(32, latent, classes, width, attention)


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the length of the input, the number of classes."""
    classes = config.get("classes", 10)
    options = {**RECORD["options"], "labels": classes}
    return {**RECORD, "input": {"shape": [1, config.get("latent", 128) + classes]}, "options": options}
