"""U-GAT-IT generator: an attention map from an auxiliary classifier, and adaptive layer-instance normalisation.

Kim et al., 2020, U-GAT-IT, arXiv:1907.10830. The classifier's logits and the heat map serve training alone and are not
computed. Checkpoints of znxlwm/UGATIT-pytorch (genA2B) load. Full mode feeds all positions to a linear layer, so its
size is fixed; light mode feeds the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgegen.nn.mixed_norm import ILN, AdaILN, ChannelWeights

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 256, 256], "value_range": [-1, 1], "mean": [], "std": [], "colour": "RGB", "resize": 256,
              "crop": [256, 256]},
    "output": {"shape": [1, 3, 256, 256], "value_range": [-1, 1]},
    "options": {"calibration": "photos"},
    "paper": "Kim et al., 2020, U-GAT-IT, arXiv:1907.10830",
    "licence": "Apache-2.0",
    "source": "selfie2anime checkpoints of znxlwm/UGATIT-pytorch and taki0112/UGATIT (MIT); edgegen ships none",
}  # fmt: skip


def _unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
    return [nn.ReflectionPad2d(kernel // 2), conv, nn.InstanceNorm2d(outputs)]


class Block(nn.Module):
    """Residual block with instance norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(*_unit(channels, channels), nn.ReLU(), *_unit(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class AdaptiveBlock(nn.Module):
    """Residual block with AdaILN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, bias=False), AdaILN(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, bias=False), AdaILN(channels)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(self.pad(x)), gamma, beta))
        return self.norm2(self.conv2(self.pad(y)), gamma, beta) + x


class Generator(nn.Module):
    """RGB -1..1 (N, 3, size, size) to RGB -1..1 of the same size."""

    def __init__(self, width: int, blocks: int, size: int, light: bool) -> None:
        super().__init__()
        inner = 4 * width
        self.light, self.blocks = light, blocks
        self.DownBlock = nn.Sequential(
            *_unit(3, width, 7), nn.ReLU(), *_unit(width, 2 * width, stride=2), nn.ReLU(),
            *_unit(2 * width, inner, stride=2), nn.ReLU(), *(Block(inner) for _ in range(blocks)),
        )  # fmt: skip
        self.gap_fc, self.gmp_fc = ChannelWeights(inner), ChannelWeights(inner)
        self.conv1x1 = nn.Conv2d(2 * inner, inner, 1)
        flat = inner if light else (size // 4) ** 2 * inner
        self.FC = nn.Sequential(
            nn.Linear(flat, inner, bias=False), nn.ReLU(), nn.Linear(inner, inner, bias=False), nn.ReLU()
        )
        self.gamma, self.beta = nn.Linear(inner, inner, bias=False), nn.Linear(inner, inner, bias=False)
        for i in range(blocks):
            setattr(self, f"UpBlock1_{i + 1}", AdaptiveBlock(inner))
        up: list[nn.Module] = []
        for channels in (inner, inner // 2):
            conv = nn.Conv2d(channels, channels // 2, 3, bias=False)
            up += [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), conv, ILN(channels // 2), nn.ReLU()]
        up += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7, bias=False), nn.Tanh()]
        self.UpBlock2 = nn.Sequential(*up)

    def forward(self, x: Tensor) -> Tensor:
        x = self.DownBlock(x)
        x = torch.relu(self.conv1x1(torch.cat((self.gap_fc(x), self.gmp_fc(x)), 1)))
        code = self.FC(x.mean((2, 3)) if self.light else x.flatten(1))
        gamma, beta = self.gamma(code), self.beta(code)
        for i in range(self.blocks):
            x = getattr(self, f"UpBlock1_{i + 1}")(x, gamma, beta)
        return self.UpBlock2(x)


def create(width: int = 64, blocks: int = 4, size: int = 256, light: bool = False) -> nn.Module:
    """A fresh generator.

    Args:
        width: channels at full size; four times as many in the blocks. blocks: residual blocks of each kind.
        size: height and width of the image; free in light mode, whose first linear layer sees the mean alone.
    """
    return Generator(width, blocks, size, light)
