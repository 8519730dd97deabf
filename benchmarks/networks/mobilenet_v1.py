"""MobileNetV1 0.25 for ImageNet, batch norms folded into the convolutions; the layers of `edgegen.nn.mobilenet_v1`.

Howard et al., 2017, arXiv:1704.04861. Weights: mobilenet_v1_025-imagenet.safetensors in ../shared/assets. Of its 1001
outputs the first ("background") is dropped, so that an output's index is the ImageNet class.
"""

from __future__ import annotations

import torch

from edgegen.nn.mobilenet_v1 import MobileNetV1

RECORD = {
    "task": "classification",
    "input": {
        "shape": [1, 3, 224, 224],
        "value_range": [0, 1],
        "mean": [],
        "std": [],
        "colour": "RGB",
        "resize": 256,
        "crop": [224, 224],
    },
    "output": {"shape": [1, 1000]},
    "options": {"calibration": "photos"},
    "paper": "Howard et al., 2017, arXiv:1704.04861",
    "licence": "Apache-2.0",
    "source": "google-coral/test_data, dequantized",
}


class Classifier(MobileNetV1):
    """RGB (N, 3, 224, 224) in 0..1 to logits (N, 1000)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits."""
        x = x * 2 - 1
        for layer in self.features:
            x = layer(x)
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)[:, 1:]


def mobilenet_v1_025() -> torch.nn.Module:
    """The network at a quarter of the published width."""
    return Classifier(0.25)
