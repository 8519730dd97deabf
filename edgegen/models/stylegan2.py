"""StyleGAN2 generator: mapping network and synthesis network with modulated convolutions, 256 to 1024 pixels.

Karras et al., 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958, config F (skip
architecture). Checkpoints in the layout of rosinality/stylegan2-pytorch (`g_ema`) and of NVIDIA's stylegan2-ada-pytorch
(`state_dict()` of G_ema) load. Their gains are moved into the weights. Class-conditional mappings do not load.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgegen.models import _published
from edgegen.nn import modulated

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 512]},
    "output": {"shape": [1, 3, 256, 256], "value_range": [-1, 1]},
    "options": {"calibration": "latents"},
    "paper": "Karras et al., 2020, StyleGAN2, arXiv:1912.04958",
    "licence": "Apache-2.0",
    "source": "stylegan2-ffhq-config-f of NVlabs/stylegan2-ada-pytorch (state_dict of G_ema saved as .pt; Nvidia source"
    " licence, non-commercial) or rosinality/stylegan2-pytorch; edgegen ships none",
}
NOISES = ("constant", "input", "none")
PARTS = ("all", "mapping", "synthesis")


class Block(nn.Module):
    """One resolution: an enlarging convolution (not in the first), a convolution, and an addition to the image."""

    def __init__(self, inputs: int, outputs: int, style: int, size: int, noise: str) -> None:
        super().__init__()
        self.first = inputs == 0
        if self.first:
            self.const = nn.Parameter(torch.randn(1, outputs, size, size))
        else:
            self.conv0 = modulated.StyledConv(inputs, outputs, style, size, up=True, noise=noise)
            self.enlarge = modulated.Upsample()
        self.conv1 = modulated.StyledConv(outputs, outputs, style, size, noise=noise)
        self.to_rgb = modulated.ToImage(outputs, 3, style)

    def forward(
        self, x: Tensor | None, image: Tensor | None, styles: Tensor, noise: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """styles (N, 2 or 3, style): one a convolution, one for the image; noise: one map a convolution, or none."""
        maps = iter(noise or (None, None))
        x = self.const.repeat(len(styles), 1, 1, 1) if self.first else self.conv0(x, styles[:, 0], next(maps))
        x = self.conv1(x, styles[:, -2], next(maps))
        part = self.to_rgb(x, styles[:, -1])
        return x, part if image is None else self.enlarge(image) + part


class Synthesis(nn.Module):
    """Styles w (N, style), or one a layer (N, layers, style), to RGB (N, 3, size, size), about -1..1.

    With noise="input" the noise maps follow, in the order of `noise_sizes`.
    """

    def __init__(self, size: int, style: int, widths: Dict[int, int], noise: str) -> None:
        super().__init__()
        self.sizes = tuple(2**i for i in range(2, size.bit_length()))
        self.noise_mode = noise
        for i, r in enumerate(self.sizes):
            inputs = widths[self.sizes[i - 1]] if i else 0
            setattr(self, f"b{r}", Block(inputs, widths[r], style, r, noise))

    @property
    def layers(self) -> int:
        """Styles that the network takes; consecutive blocks share one."""
        return 2 * len(self.sizes)

    @property
    def noise_sizes(self) -> tuple[int, ...]:
        """Height and width of each noise map (1, 1, r, r)."""
        return modulated.noise_sizes(self.sizes[-1])

    def forward(self, w: Tensor, *noise: Tensor) -> Tensor:
        styles = w[:, None].expand(-1, self.layers, -1) if w.ndim == 2 else w
        x: Any = None
        image: Any = None
        for i, r in enumerate(self.sizes):
            start = max(0, 2 * i - 1)
            maps = noise[start : 2 * i + 1] if self.noise_mode == "input" else ()
            x, image = getattr(self, f"b{r}")(x, image, styles[:, start : 2 * i + 2], maps)
        return image


def create(
    size: int = 256, latent: int = 512, style: int = 512, layers: int = 8, width: int = 512, base: int = 32768,
    noise: str = "constant", truncation: float = 1.0, part: str = "all",
) -> nn.Module:  # fmt: skip
    """A fresh generator, or one of its two parts.

    Args:
        size: height and width of the image, a power of two. base, width: channels at resolution r are base / r, at
            most width; 16384 is config E, and NVIDIA's models of 256 pixels.
        layers: of the mapping network. truncation: 1 is none; below, styles are drawn to their mean.
        noise: "constant" (fixed maps), "input" (maps follow the latent, one a convolution) or "none".
        part: "all", "mapping" (z to w) or "synthesis" (w to image; --input-shape 1,512, or 1,LAYERS,512).
    Raises:
        ValueError: a size that is no power of two, an unknown noise or part.
    """
    if size < 8 or size & (size - 1):
        raise ValueError(f"size must be a power of two of 8 or more, got {size}")
    if noise not in NOISES or part not in PARTS:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, part of {', '.join(PARTS)}, got {noise}, {part}")
    sizes = [2**i for i in range(2, size.bit_length())]
    if part == "mapping":
        return modulated.Mapping(latent, style, layers, truncation)
    first = modulated.Mapping(latent, style, layers, truncation) if part == "all" else None
    second = Synthesis(size, style, {r: max(1, min(base // r, width)) for r in sizes}, noise)
    return modulated.Generator(first, second) if first is not None else second


def mapping(**config: Any) -> nn.Module:
    """The mapping network alone: z (N, latent) to w (N, style)."""
    return create(**config, part="mapping")


def synthesis(**config: Any) -> nn.Module:
    """The synthesis network alone: w (N, style) to RGB."""
    return create(**config, part="synthesis")


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the shape of the input is that of the part, noise maps follow, a mapping gives w."""
    return {**RECORD, **modulated.part_record(config, config.get("size", 256))}


def from_published(state: Dict[str, Tensor], config: Dict[str, Any]) -> dict[str, Tensor]:
    """Weights of the two public layouts under the names and with the gains of this file."""
    return _published.stylegan2(state, config)
