"""Feed-forward style transfer: the image-to-image ResNet generator.

Johnson, Alahi, Fei-Fei, 2016, Perceptual Losses for Real-Time Style Transfer, arXiv:1603.08155, with the instance
normalization of Ulyanov et al., 2016, arXiv:1607.08022. Weights: style-mosaic and style-candy in ../shared/assets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORD = {
    "task": "image-to-image",
    "input": {
        "shape": [1, 3, 256, 256],
        "value_range": [0, 255],
        "mean": [],
        "std": [],
        "colour": "RGB",
        "resize": 256,
        "crop": [256, 256],
    },
    "output": {"shape": [1, 3, 256, 256], "value_range": [0, 255]},
    "options": {"calibration": "photos"},
    "paper": "Johnson et al., 2016, arXiv:1603.08155",
    "licence": "BSD-3-Clause",
    "source": "pytorch/examples fast_neural_style, as carried by nihui/ncnn-android-styletransfer",
}


class PaddedConv(nn.Module):
    """Reflection padding and a convolution, with an optional nearest-neighbour enlargement before them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, enlarge: int = 1):
        super().__init__()
        self.enlarge = enlarge
        self.pad = nn.ReflectionPad2d(kernel // 2)
        self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H * enlarge / stride, W * enlarge / stride)."""
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=self.enlarge, mode="nearest")
        return self.conv2d(self.pad(x))


class Residual(nn.Module):
    """Two 3x3 convolutions with instance normalization around a shortcut; nothing after the sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = PaddedConv(channels, channels, 3)
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = PaddedConv(channels, channels, 3)
        self.in2 = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape."""
        return x + self.in2(self.conv2(F.relu(self.in1(self.conv1(x)))))


class Style(nn.Module):
    """9x9 convolution, two strided ones, five residual blocks, two enlarging ones, 9x9 convolution."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.conv1 = PaddedConv(3, width, 9)
        self.in1 = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = PaddedConv(width, 2 * width, 3, stride=2)
        self.in2 = nn.InstanceNorm2d(2 * width, affine=True)
        self.conv3 = PaddedConv(2 * width, 4 * width, 3, stride=2)
        self.in3 = nn.InstanceNorm2d(4 * width, affine=True)
        self.res1, self.res2, self.res3, self.res4, self.res5 = (Residual(4 * width) for _ in range(5))
        self.deconv1 = PaddedConv(4 * width, 2 * width, 3, enlarge=2)
        self.in4 = nn.InstanceNorm2d(2 * width, affine=True)
        self.deconv2 = PaddedConv(2 * width, width, 3, enlarge=2)
        self.in5 = nn.InstanceNorm2d(width, affine=True)
        self.deconv3 = PaddedConv(width, 3, 9)

    def forward(self, x: Tensor) -> Tensor:
        """RGB 0..255 (N, 3, H, W), H and W divisible by 4 -> RGB 0..255 of the same shape."""
        x = F.relu(self.in1(self.conv1(x)))
        x = F.relu(self.in2(self.conv2(x)))
        x = F.relu(self.in3(self.conv3(x)))
        x = self.res5(self.res4(self.res3(self.res2(self.res1(x)))))
        x = F.relu(self.in4(self.deconv1(x)))
        x = F.relu(self.in5(self.deconv2(x)))
        return torch.clamp(self.deconv3(x), 0.0, 255.0)


def style(*, width: int = 32) -> nn.Module:
    """The generator with `width`, 2 * `width` and 4 * `width` channels at full, half and quarter size."""
    return Style(width)
