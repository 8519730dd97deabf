"""Blocks of style-based generators: modulated convolutions, dense and depthwise separable, and Haar wavelet output.

Karras et al., 2020, StyleGAN2, arXiv:1912.04958, section 2.2: the kernel of each sample is w s d, with a style s for
input channels and d = 1 / sqrt(sum (w s)^2) for output channels. It is computed as scale, static convolution, scale:
the same numbers, one constant kernel. Belousov, 2021, MobileStyleGAN, arXiv:2104.04767: depthwise separable kernels,
the image as Haar wavelet coefficients. Gains of the equalised learning rate (1 / sqrt(fan in)) and of the activations
(sqrt 2) lie in the weights, so that linear layers and convolutions are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping as Dict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
EPSILON = 1e-8
FIR = (1.0, 3.0, 3.0, 1.0)  # the low-pass filter of StyleGAN2


def fir() -> Tensor:
    """The 4x4 low-pass kernel with sum 4, for signals at twice the density: (1, 1, 4, 4)."""
    row = torch.tensor(FIR)
    kernel = row[:, None] * row[None, :]
    return (4 * kernel / kernel.sum())[None, None]


def linear(inputs: int, outputs: int, bias: float = 0.0, gain: float = 1.0) -> nn.Linear:
    """A linear layer with weights N(0, gain^2 / inputs) and one value for all biases."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(inputs))
    nn.init.constant_(layer.bias, bias)
    return layer


class PixelNorm(nn.Module):
    """(N, C) to the same with mean square 1 a row."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + EPSILON)


class Upsample(nn.Module):
    """(N, C, H, W) to (N, C, 2 H, 2 W) through the low-pass filter."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", fir(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv_transpose2d(x, self.kernel.expand(channels, 1, 4, 4), stride=2, padding=1, groups=channels)


class Blur(nn.Module):
    """(N, C, 2 H + 1, 2 W + 1), out of a transposed convolution, to (N, C, 2 H, 2 W) through the low-pass filter."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", fir(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 4, 4), padding=1, groups=channels)


class Mapping(nn.Module):
    """Latents z (N, latent) to styles w (N, style): pixel norm, then linear layers with leaky ReLU.

    truncation: 1 is none, 0 the mean style; below 1 there is a buffer `average` (style), the mean of w over z.
    """

    average: Tensor

    def __init__(self, latent: int, style: int, layers: int, truncation: float = 1.0) -> None:
        super().__init__()
        self.norm, self.truncation = PixelNorm(), truncation
        widths = [latent] + [style] * layers
        self.fc = nn.ModuleList(linear(a, b, gain=math.sqrt(2)) for a, b in pairwise(widths))
        if truncation != 1.0:
            self.register_buffer("average", torch.zeros(style))

    def forward(self, z: Tensor) -> Tensor:
        w = self.norm(z)
        for layer in self.fc:
            w = F.leaky_relu(layer(w), SLOPE)
        return w if self.truncation == 1.0 else self.average + self.truncation * (w - self.average)


class Generator(nn.Module):
    """Latents z (N, latent), N(0, 1), to RGB (N, 3, H, W), about -1..1; noise maps that are inputs follow z."""

    def __init__(self, mapping: nn.Module, synthesis: nn.Module) -> None:
        super().__init__()
        self.mapping, self.synthesis = mapping, synthesis

    def forward(self, z: Tensor, *noise: Tensor) -> Tensor:
        return self.synthesis(self.mapping(z), *noise)


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU: (N, inputs, H, W), w (N, style) to outputs (up: at 2 H, 2 W).

    noise: "constant" (a buffer of the output's size), "input" (given to forward, (N or 1, 1, H, W)) or "none".
    """

    def __init__(
        self, inputs: int, outputs: int, style: int, size: int, kernel: int = 3, up: bool = False,
        noise: str = "constant",
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "inputs": inputs, "outputs": outputs, "style": style, "size": size, "kernel": kernel, "up": up,
            "noise": noise,
        }  # fmt: skip
        self.up, self.noise_mode = up, noise
        self.affine = linear(style, inputs, bias=1.0)
        if up:
            self.conv: nn.Conv2d | nn.ConvTranspose2d = nn.ConvTranspose2d(
                inputs, outputs, kernel, stride=2, bias=False
            )
            self.blur = Blur()
        else:
            self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(self.conv.weight, 0.0, 1 / math.sqrt(inputs * kernel**2))
        self.bias = nn.Parameter(torch.zeros(outputs))
        add_noise(self, noise, size)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        s = self.affine(w)
        sums = self.conv.weight.square().sum((2, 3))  # (out, in), (in, out) of a transposed convolution
        d = math.sqrt(2) * torch.rsqrt(s.square() @ (sums if self.up else sums.T) + EPSILON)
        y = self.conv(x * s[:, :, None, None])
        y = (self.blur(y) if self.up else y) * d[:, :, None, None]
        return F.leaky_relu(noised(self, y, noise) + self.bias[None, :, None, None], SLOPE)


class SeparableStyledConv(nn.Module):
    """A `StyledConv` with a pointwise and then a depthwise kernel: w[o, i, y, x] = pointwise[o, i] depthwise[o, y, x].

    Haase and Amthor, 2020, BSConv, arXiv:2003.13549: kernels of one output channel are alike, so this order loses less
    than depthwise first. And with `up` the pointwise part runs before the enlargement, at a quarter of the positions,
    and the depthwise part is a transposed convolution that contains the low-pass filter (6x6 for 3x3).
    """

    def __init__(
        self, inputs: int, outputs: int, style: int, size: int, kernel: int = 3, up: bool = False,
        noise: str = "constant",
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {
            "inputs": inputs, "outputs": outputs, "style": style, "size": size, "kernel": kernel, "up": up,
            "noise": noise,
        }  # fmt: skip
        self.up, self.noise_mode = up, noise
        self.affine = linear(style, inputs, bias=1.0)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        if up:
            length = kernel + len(FIR) - 1
            self.depthwise: nn.Conv2d | nn.ConvTranspose2d = nn.ConvTranspose2d(
                outputs, outputs, length, stride=2, padding=length // 2 - 1, groups=outputs, bias=False
            )
        else:
            self.depthwise = nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2, groups=outputs, bias=False)
        nn.init.normal_(self.pointwise.weight, 0.0, 1 / math.sqrt(inputs))
        nn.init.normal_(self.depthwise.weight, 0.0, 1 / kernel)
        self.bias = nn.Parameter(torch.zeros(outputs))
        add_noise(self, noise, size)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        s = self.affine(w)
        sums = self.pointwise.weight.square().sum((2, 3))  # (out, in); depthwise kernels count as of norm 1
        d = math.sqrt(2) * torch.rsqrt(s.square() @ sums.T + EPSILON)
        y = self.depthwise(self.pointwise(x * s[:, :, None, None])) * d[:, :, None, None]
        return F.leaky_relu(noised(self, y, noise) + self.bias[None, :, None, None], SLOPE)


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation: (N, inputs, H, W), w (N, style) to (N, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.affine = linear(style, inputs, bias=1.0)
        self.conv = nn.Conv2d(inputs, outputs, 1)
        nn.init.normal_(self.conv.weight, 0.0, 1 / math.sqrt(inputs))
        nn.init.constant_(self.conv.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.conv(x * self.affine(w)[:, :, None, None])


class InverseHaar(nn.Module):
    """Haar coefficients (N, 4 C, H, W), in the order low, rows, columns, both, C each, to (N, C, 2 H, 2 W)."""

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        low, rows, columns, both = x.chunk(4, 1)
        a, b, c, d = low + rows, low - rows, columns + both, columns - both
        pixels = torch.stack((a + c, a - c, b + d, b - d), 2)  # (N, C, 4, H, W): top left, top right, bottom ...
        return 0.5 * F.pixel_shuffle(pixels.reshape(count, channels, height, width), 2)


def haar(x: Tensor) -> Tensor:
    """What InverseHaar inverts: (N, C, 2 H, 2 W) to (N, 4 C, H, W)."""
    a, b = x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2]
    c, d = x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]
    return 0.5 * torch.cat((a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d), 1)


class WaveletOutput(nn.Module):
    """The last block of a generator in the wavelet domain: the image so far is the low band, the features the rest.

    Takes (features (N, inputs, H, W), image (N, 3, H, W), styles (N, count, style), noise) as the block in whose place
    it stands, and gives (features, image (N, 3, 2 H, 2 W)). Without details this is nearest enlargement.
    """

    def __init__(self, inputs: int, style: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"inputs": inputs, "style": style}
        self.detail = ToImage(inputs, 9, style)
        self.inverse = InverseHaar()

    def forward(self, x: Tensor, image: Tensor, styles: Tensor, noise: Any = ()) -> tuple[Tensor, Tensor]:
        return x, self.inverse(torch.cat((2 * image, self.detail(x, styles[:, 0])), 1))


def add_noise(module: nn.Module, mode: str, size: int) -> None:
    """Give a styled layer the strength of its noise, and with mode "constant" the noise, (1, 1, size, size)."""
    if mode == "none":
        return
    # 0.05, and not 0 as in the paper: a compiler would fold the addition of nothing away, and timings would miss it
    module.strength = nn.Parameter(torch.tensor(0.05))
    if mode == "constant":
        module.register_buffer("noise", torch.randn(1, 1, size, size))


def noised(module: Any, y: Tensor, noise: Tensor | None) -> Tensor:
    """y and the noise of a styled layer."""
    if module.noise_mode == "none":
        return y
    return y + module.strength * (module.noise if module.noise_mode == "constant" else noise)


def noise_sizes(last: int) -> tuple[int, ...]:
    """Height and width of each noise map: one at 4 pixels, then two at each size up to `last`, a power of two."""
    return tuple(2**i for i in range(2, last.bit_length()) for _ in range(2 if i > 2 else 1))


def part_record(config: Dict[str, Any], last: int) -> dict[str, Any]:
    """The part of RECORD that follows from a style-based generator's part and noise.

    A mapping takes z and gives w, a vector; a synthesis takes w; with noise="input" maps up to size `last` follow.
    """
    part = config.get("part", "all")
    wide = config.get("style", 512) if part == "synthesis" else config.get("latent", 512)
    given: dict[str, Any] = {"input": {"shape": [1, wide]}, "output": {"value_range": [-1, 1]}}
    if part == "mapping":
        return {**given, "output": {"kind": "vector"}}
    if part == "synthesis":
        given["options"] = {"calibration": "latents", "latents": "styles"}  # w is not distributed as z is
    if config.get("noise") == "input":
        given["inputs"] = [{"name": f"noise{i}", "shape": [1, 1, r, r]} for i, r in enumerate(noise_sizes(last))]
    return given
