"""MobileNetV2 1.0 for ImageNet with batch norms folded into the convolutions and TensorFlow's "SAME" padding.

Sandler et al., 2018, arXiv:1801.04381. Weights: mobilenet_v2-imagenet.safetensors in ../shared/assets. The head holds
1001 outputs, of which the first ("background") is dropped, so that an output's index is the ImageNet class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "classification",
    "input": {
        "shape": [1, 3, 224, 224],
        "value_range": [0, 255],
        "mean": [127.5, 127.5, 127.5],
        "std": [127.5, 127.5, 127.5],
        "colour": "RGB",
        "resize": 256,
        "crop": [224, 224],
    },
    "output": {"shape": [1, 1000]},
    "options": {"calibration": "photos"},
    "paper": "Sandler et al., 2018, arXiv:1801.04381",
    "licence": "Apache-2.0",
    "source": "google-coral/test_data, dequantized",
}
# (expansion, output channels, repeats, first stride), table 2 of the paper
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvReLU6(nn.Module):
    """TensorFlow's padding (at stride 2 and even sizes right and bottom only), convolution, ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ):
        super().__init__()
        self.after = kernel - stride if stride > 1 else 0
        self.linear = linear
        padding = 0 if stride > 1 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W), H and W even when strided -> (N, outputs, H / stride, W / stride)."""
        if self.after:
            x = F.pad(x, (0, self.after, 0, self.after))
        x = self.conv(x)
        return x if self.linear else F.relu6(x)


class InvertedResidual(nn.Module):
    """1x1 expansion (none at factor 1), 3x3 depthwise, linear 1x1; shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        layers = [] if expansion == 1 else [ConvReLU6(inputs, inner)]
        layers += [ConvReLU6(inner, inner, 3, stride, groups=inner), ConvReLU6(inner, outputs, linear=True)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """Stem, the seven stages of STAGES, 1x1 convolution to 1280, mean, 1x1 head."""

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = [ConvReLU6(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, repeats, stride in STAGES:
            for index in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, ConvReLU6(channels, 1280))
        self.head = nn.Conv2d(1280, classes + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(RGB 0..255 - 127.5) / 127.5 (N, 3, 224, 224) -> logits (N, classes), without the background class."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        # cut before flattening: torch-pruning cannot follow a slice of a flattened (N, channels * 1 * 1) tensor
        return torch.flatten(self.head(x)[:, 1:], 1)


def mobilenet_v2(*, classes: int = 1000) -> nn.Module:
    """3.5 M parameters at 1000 classes."""
    return MobileNetV2(classes)
