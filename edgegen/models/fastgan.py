"""FastGAN generator: nearest enlargement, gated convolutions, and skip-layer excitation from small to large features.

Liu et al., 2021, Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image Synthesis,
arXiv:2101.04775. Checkpoints of odegeasslbc/FastGAN-pytorch load, spectral norm folded; its second output, 128 pixels
for the discriminator, is left out. Published noise is drawn anew for each image; here it is fixed, or none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgegen.models import _published

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 256]},
    "output": {"shape": [1, 3, 1024, 1024], "value_range": [-1, 1]},
    "options": {"calibration": "latents"},
    "paper": "Liu et al., 2021, FastGAN, arXiv:2101.04775",
    "licence": "Apache-2.0",
    "source": "models of odegeasslbc/FastGAN-pytorch (GPL-3.0), saved with key 'g'; edgegen ships none",
}
_FACTORS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 0.5, 512: 0.25, 1024: 0.125}
_SKIPS = {64: 4, 128: 8, 256: 16, 512: 32}  # size -> the size whose features excite it


class Gate(nn.Module):
    """Half of the channels times the sigmoid of the other half."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Swish(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Noise(nn.Module):
    """x plus a learned share of one fixed noise map."""

    noise: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.05))
        self.register_buffer("noise", torch.randn(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * self.noise


def _up(inputs: int, outputs: int, size: int, double: bool, noise: bool) -> nn.Sequential:
    """Enlarge, convolve, gate; `double` adds noise and a second convolution."""

    def unit(source: int) -> list[nn.Module]:
        maps: list[nn.Module] = [Noise(size) if noise else nn.Identity()] if double else []
        conv = nn.Conv2d(source, 2 * outputs, 3, padding=1, bias=False)
        return [conv, *maps, nn.BatchNorm2d(2 * outputs), Gate()]

    return nn.Sequential(nn.Upsample(scale_factor=2), *unit(inputs), *(unit(outputs) if double else []))


class Excitation(nn.Module):
    """Large features times channel weights from small features of size x size."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.AvgPool2d(size // 4), nn.Conv2d(inputs, outputs, 4, bias=False), Swish(),
            nn.Conv2d(outputs, outputs, 1, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        return large * self.main(small)


class Init(nn.Module):
    """Latents (N, latent) to (N, channels, 4, 4)."""

    def __init__(self, latent: int, channels: int) -> None:
        super().__init__()
        self.init = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * channels, 4, bias=False), nn.BatchNorm2d(2 * channels), Gate()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.init(z[:, :, None, None])


class Generator(nn.Module):
    """Latents (N, latent), N(0, 1), to RGB (N, 3, size, size), about -1..1 (tanh at 1024 alone, as published)."""

    def __init__(self, size: int, latent: int, width: int, noise: bool) -> None:
        super().__init__()
        widths = {r: max(1, int(factor * width)) for r, factor in _FACTORS.items()}
        self.sizes = tuple(r for r in _FACTORS if r <= size)
        self.init = Init(latent, widths[4])
        for r in self.sizes[1:]:
            double = r in (8, 32, 128, 512)
            setattr(self, f"feat_{r}", _up(widths[r // 2], widths[r], r, double, noise))
            if r in _SKIPS:
                setattr(self, f"se_{r}", Excitation(widths[_SKIPS[r]], widths[r], _SKIPS[r]))
        self.to_big = nn.Conv2d(widths[size], 3, 3, padding=1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        features = {4: self.init(z)}
        for r in self.sizes[1:]:
            x = getattr(self, f"feat_{r}")(features[r // 2])
            features[r] = getattr(self, f"se_{r}")(features[_SKIPS[r]], x) if r in _SKIPS else x
        x = self.to_big(features[self.sizes[-1]])
        return torch.tanh(x) if self.sizes[-1] == 1024 else x


def create(size: int = 1024, latent: int = 256, width: int = 64, noise: bool = True) -> nn.Module:
    """A fresh generator.

    Args:
        size: height and width of the image; published are 256, 512 and 1024, and 32 to 128 work alike.
        width: channels at 128 pixels; 16 times as many at 4, an eighth at 1024. noise: with fixed noise maps.
    Raises:
        ValueError: a size that is none of these.
    """
    if size not in _FACTORS or size < 32:
        raise ValueError(f"size must be one of 32, 64, 128, 256, 512, 1024, got {size}")
    return Generator(size, latent, width, noise)


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Spectral norm folded; without the 128-pixel output; with noise maps, which are not published."""
    folded = _published.fold_spectral_norm(state, transposed=r"init\.init\.0")
    result = {}
    for name, tensor in folded.items():
        match = re.fullmatch(r"feat_(\d+)\.(2|6)\.weight", name)
        is_noise = match is not None and int(match[1]) in (8, 32, 128, 512) and tensor.numel() == 1
        if name.startswith("to_128.") or (is_noise and not config.get("noise", True)):
            continue
        result[name] = tensor
        if match is not None and is_noise:
            size, place = int(match[1]), name.removesuffix("weight") + "noise"
            drawn = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(size + int(match[2])))
            result[place] = state.get(place, drawn)
    return result
