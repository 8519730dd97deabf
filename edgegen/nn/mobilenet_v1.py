"""MobileNetV1 as a feature extractor, batch norms folded into the convolutions.

Howard et al., 2017, arXiv:1704.04861. Padding is TensorFlow's "SAME": at stride 2 on even sizes, right and below only.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

# (output channels at width 1, stride) of the thirteen depthwise-pointwise blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)) + ((512, 1),) * 5 + ((1024, 2), (1024, 1))
# after these layers the maps are taken: the last of each resolution, 1/2 to 1/32
TAPS = (2, 6, 10, 22, 26)


class SameConv(nn.Module):
    """Convolution with TensorFlow's SAME padding, then ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        sides = [max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[2:]]
        (top, left) = (total // 2 for total in sides)
        return F.relu6(self.conv(F.pad(x, (left, sides[1] - left, top, sides[0] - top))))


class MobileNetV1(nn.Module):
    """RGB (N, 3, H, W) in 0..1, any size from 32, to ([maps at 1/2 ... 1/32], pooled (N, 1024 width))."""

    def __init__(self, width: float = 0.25, classes: int = 1001):
        super().__init__()
        channels = int(32 * width)
        layers = [SameConv(3, channels, 3, 2)]
        for full, stride in BLOCKS:
            layers.append(SameConv(channels, channels, 3, stride, groups=channels))
            layers.append(SameConv(channels, int(full * width), 1, 1))
            channels = int(full * width)
        self.features = nn.ModuleList(layers)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        x, maps = x * 2 - 1, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in TAPS:
                maps.append(x)
        return maps, x.mean((2, 3))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1000) of ImageNet's classes; the file's first, the background, is dropped."""
        return self.head(self(x)[1][:, :, None, None]).flatten(1)[:, 1:]
