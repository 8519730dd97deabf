"""AnimeGANv2 generator: inverted residual blocks between two halvings and two bilinear enlargements, layer norm.

Chen et al., 2020, AnimeGAN, doi:10.1007/978-981-15-5577-0_18, version 2 (tachibanayoshino.github.io/AnimeGANv2). The
layout of bryandlee/animegan2-pytorch; its checkpoints load.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 512, 512], "value_range": [-1, 1], "mean": [], "std": [], "colour": "RGB", "resize": 512,
              "crop": [512, 512]},
    "output": {"shape": [1, 3, 512, 512], "value_range": [-1, 1]},
    "options": {"calibration": "photos"},
    "paper": "Chen et al., 2020, AnimeGAN, doi:10.1007/978-981-15-5577-0_18",
    "licence": "Apache-2.0",
    "source": "weights/*.pt of bryandlee/animegan2-pytorch (MIT; not for commercial use); edgegen ships none",
}  # fmt: skip


class Unit(nn.Sequential):
    """Reflection padding, convolution, layer norm over all channels, leaky ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> None:
        # a stride-2 convolution looks one pixel further to the right and below, as TensorFlow's "SAME" does
        padding = (0, 1, 0, 1) if stride == 2 else (kernel // 2,) * 4
        super().__init__(
            nn.ReflectionPad2d(padding),
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=bias),
            nn.GroupNorm(1, outputs),
            nn.LeakyReLU(0.2),
        )


class Inverted(nn.Module):
    """Inverted residual block: pointwise to twice the width, depthwise, pointwise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = 2 * inputs
        self.layers = nn.Sequential(
            Unit(inputs, inner, 1), Unit(inner, inner, groups=inner, bias=True),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.GroupNorm(1, outputs),
        )  # fmt: skip
        self.skip = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.skip else y


class Generator(nn.Module):
    """RGB -1..1 (N, 3, H, W), H and W divisible by 4, to RGB -1..1 of the same size."""

    def __init__(self, width: int, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.block_a = nn.Sequential(Unit(3, a, 7), Unit(a, b, stride=2), Unit(b, b))
        self.block_b = nn.Sequential(Unit(b, c, stride=2), Unit(c, c))
        self.block_c = nn.Sequential(Unit(c, c), Inverted(c, d), *(Inverted(d, d) for _ in range(3)), Unit(d, c))
        self.block_d = nn.Sequential(Unit(c, c), Unit(c, c))
        self.block_e = nn.Sequential(Unit(c, b), Unit(b, b), Unit(b, a, 7))
        self.out_layer = nn.Sequential(nn.Conv2d(a, 3, 1, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.block_a(x)
        half = y.shape[-2:]
        y = self._enlarged(self.block_c(self.block_b(y)), half)
        y = self._enlarged(self.block_d(y), x.shape[-2:])
        return self.out_layer(self.block_e(y))

    def _enlarged(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


def create(width: int = 32, align_corners: bool = True) -> nn.Module:
    """A fresh generator.

    Args:
        width: channels at full size; 2, 4 and 8 times as many inside. align_corners: how the enlargements place
            pixels; True is the default of the published code, False is what runtimes compute fastest.
    """
    return Generator(width, align_corners)
