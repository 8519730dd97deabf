"""MobileStyleGAN generator: StyleGAN2's mapping, depthwise separable modulated convolutions, image by inverse wavelets.

Belousov, 2021, MobileStyleGAN, arXiv:2104.04767. Enlargement is an inverse Haar transform of the channels, and the last
one of twelve channels is the image. The demodulation of its convolutions does not depend on the style, so it lies in
the weights here, with the other gains. Checkpoints of bes-dev/MobileStyleGAN.pytorch load; heads that only training
needs are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.models import _published
from edgegen.nn import modulated

RECORD = {
    "task": "unconditional",
    "input": {"shape": [1, 512]},
    "output": {"shape": [1, 3, 1024, 1024], "value_range": [-1, 1]},
    "options": {"calibration": "latents"},
    "paper": "Belousov, 2021, MobileStyleGAN, arXiv:2104.04767",
    "licence": "Apache-2.0",
    "source": "mobilestylegan_ffhq.ckpt of bes-dev/MobileStyleGAN.pytorch (Apache-2.0; teacher under Nvidia's licence);"
    " edgegen ships none",
}
WIDTHS = (512, 512, 512, 512, 512, 256, 128, 64)


class StyledConv(nn.Module):
    """Scale by style, convolution (dense or depthwise and pointwise), noise, bias, leaky ReLU; the size stays."""

    def __init__(self, inputs: int, outputs: int, style: int, size: int, separable: bool, noise: str) -> None:
        super().__init__()
        self.affine = modulated.linear(style, inputs, bias=1.0)
        self.separable, self.noise_mode = separable, noise
        if separable:
            self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
            nn.init.normal_(self.depthwise.weight, 0.0, 1 / 3)
        self.conv = nn.Conv2d(inputs, outputs, 1 if separable else 3, padding=0 if separable else 1, bias=False)
        nn.init.normal_(self.conv.weight, 0.0, 1 / math.sqrt(self.conv.weight[0].numel()))
        self.bias = nn.Parameter(torch.zeros(outputs))
        modulated.add_noise(self, noise, size)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        s = self.affine(w)[:, :, None, None]
        x = self.depthwise(x * torch.tanh(s)) if self.separable else x * s
        x = modulated.noised(self, self.conv(x), noise)
        return F.leaky_relu(x + self.bias[None, :, None, None], modulated.SLOPE)


class ModulatedHaar(nn.Module):
    """Scale by style, inverse Haar transform; channels are low (a quarter), then rows, columns, both of each."""

    def __init__(self, inputs: int, style: int) -> None:
        super().__init__()
        self.affine = modulated.linear(style, inputs, bias=1.0)
        self.inverse = modulated.InverseHaar()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        x = x * self.affine(w)[:, :, None, None]
        high = x[:, channels // 4 :].reshape(count, channels // 4, 3, height, width).transpose(1, 2)
        return self.inverse(torch.cat((x[:, : channels // 4], high.reshape(count, -1, height, width)), 1))


class Block(nn.Module):
    """Inverse Haar transform, two convolutions: (N, inputs, H, W) to (N, outputs, 2 H, 2 W)."""

    def __init__(self, inputs: int, outputs: int, style: int, size: int, noise: str, modulated_up: bool) -> None:
        super().__init__()
        self.modulated_up = modulated_up
        self.up = ModulatedHaar(inputs, style) if modulated_up else modulated.InverseHaar()
        self.conv1 = StyledConv(inputs // 4, outputs, style, size, True, noise)
        self.conv2 = StyledConv(outputs, outputs, style, size, True, noise)

    def forward(self, x: Tensor, w: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        x = self.up(x, w) if self.modulated_up else self.up(x)
        return self.conv2(self.conv1(x, w, first), w, second)


class Synthesis(nn.Module):
    """Styles w (N, style) to RGB (N, 3, size, size), about -1..1, with size = 8 * 2^(number of widths - 1)."""

    def __init__(self, style: int, widths: Sequence[int], noise: str, modulated_up: bool) -> None:
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.conv1 = StyledConv(widths[0], widths[0], style, 4, False, noise)
        self.layers = nn.ModuleList(
            Block(a, b, style, 2 ** (i + 3), noise, modulated_up) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.to_image = modulated.ToImage(widths[-1], 12, style)
        self.inverse = modulated.InverseHaar()

    def forward(self, w: Tensor, *noise: Tensor) -> Tensor:
        maps = iter(noise or [None] * (2 * len(self.layers) + 1))
        x = self.conv1(self.const.repeat(len(w), 1, 1, 1), w, next(maps))
        for layer in self.layers:
            x = layer(x, w, next(maps), next(maps))
        return self.inverse(self.to_image(x, w))


def create(
    widths: Sequence[int] = WIDTHS, latent: int = 512, style: int = 512, layers: int = 8, noise: str = "constant",
    truncation: float = 1.0, part: str = "all", modulated_up: bool = False,
) -> nn.Module:  # fmt: skip
    """A fresh generator of 8 * 2^(number of widths - 1) pixels, or one of its two parts.

    Args:
        widths: channels at 4, 8, 16 ... pixels; each but the last divisible by four.
        layers: of the mapping network. truncation: 1 is none; below, styles are drawn to their mean.
        noise: "constant", "input" (maps follow the latent, one a convolution) or "none".
        part: "all", "mapping" or "synthesis".
        modulated_up: scale channels by style before each inverse transform, as the first version of the code did.
    Raises:
        ValueError: widths that are not divisible by four, an unknown noise or part.
    """
    if len(widths) < 2 or any(width % 4 for width in widths[:-1]):
        raise ValueError(f"widths must be two or more, all but the last divisible by 4, got {list(widths)}")
    if noise not in ("constant", "input", "none") or part not in ("all", "mapping", "synthesis"):
        raise ValueError(f"noise must be constant, input or none, part all, mapping or synthesis, got {noise}, {part}")
    if part == "mapping":
        return modulated.Mapping(latent, style, layers, truncation)
    first = modulated.Mapping(latent, style, layers, truncation) if part == "all" else None
    second = Synthesis(style, widths, noise, modulated_up)
    return modulated.Generator(first, second) if first is not None else second


def record(**config: Any) -> dict[str, Any]:
    """RECORD for a configuration: the shape of the input is that of the part, noise maps follow, a mapping gives w."""
    return {**RECORD, **modulated.part_record(config, 2 ** (len(config.get("widths", WIDTHS)) + 1))}


def from_published(state: Dict[str, Tensor], config: Dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint of bes-dev/MobileStyleGAN.pytorch (distiller, or its student alone) as the weights of this file."""
    if not any(".weight_dw" in name or name.endswith("style_inv") for name in state):
        return dict(state)
    student = {n.removeprefix("student."): t for n, t in state.items() if n.startswith("student.")} or dict(state)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"mapping_net\.layers\.(\d+)\.(weight|bias)", name):
            result.update(_published.baked(f"mapping.fc{int(match[1]) - 1}.{match[2]}", tensor, ""))
    if "input.input" in student:
        result["synthesis.const"] = student["input.input"].reshape(1, *student["input.input"].shape[-3:])
    count = 1 + max((int(n.split(".")[1]) for n in student if re.match(r"layers\.\d+\.", n)), default=-1)
    noise = str(config.get("noise", "constant"))
    result.update(_conv(student, "conv1.", "synthesis.conv1.", 4, noise))
    for i in range(count):
        for layer in ("conv1", "conv2"):
            to = f"synthesis.layers.{i}.{layer}."
            result.update(_conv(student, f"layers.{i}.{layer}.", to, 2 ** (i + 3), noise))
        for end in ("weight", "bias"):
            if f"layers.{i}.up.modulation.{end}" in student:
                result[f"synthesis.layers.{i}.up.affine.{end}"] = student[f"layers.{i}.up.modulation.{end}"]
    result.update(_image(student, f"layers.{count - 1}.to_img."))
    if config.get("truncation", 1.0) != 1.0:
        result["mapping.average"] = _published.mean_style(result)
    prefix = f"{config.get('part', 'all')}."
    return {n.removeprefix(prefix): t for n, t in result.items() if n.startswith(prefix)} or result


def _conv(state: Dict[str, Tensor], place: str, to: str, size: int, noise: str) -> dict[str, Tensor]:
    """One styled convolution: scale and demodulation go into the (pointwise) weights."""
    part = {n.removeprefix(place): t for n, t in state.items() if n.startswith(place)}
    result = {f"{to}affine.{end}": part[key] for end in ("weight", "bias") if (key := f"conv.modulation.{end}") in part}
    if "conv.weight_dw" in part and "conv.weight_permute" in part:
        deep, wide = part["conv.weight_dw"], part["conv.weight_permute"]
        whole, static = deep.transpose(0, 1) * wide, wide
        result[f"{to}depthwise.weight"] = deep
    elif "conv.weight" in part and "conv.style_inv" in part:
        static = part["conv.weight"]
        whole = static * part["conv.style_inv"][0]
    else:
        return result  # the loader names what is missing
    scale = 1 / math.sqrt(whole[0].numel())
    demodulation = torch.rsqrt((scale * whole).square().sum((1, 2, 3)) + modulated.EPSILON)
    result[f"{to}conv.weight"] = static * scale * demodulation[:, None, None, None]
    if "bias" in part:
        result[f"{to}bias"] = part["bias"].reshape(-1)
    if noise != "none" and "noise.weight" in part:
        result[f"{to}strength"] = part["noise.weight"].reshape(())
    if noise == "constant":  # published without: drawn anew for each image; here one fixed draw
        made = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(size))
        result[f"{to}noise"] = part.get("noise.noise", made)
    return result


def _image(state: Dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The last head; its channels are low (3), then rows, columns, both of each colour: made into bands of colours."""
    order = [0, 1, 2, *(3 + 3 * colour + band for band in range(3) for colour in range(3))]
    result = {}
    for name, to in (("conv.modulation.weight", "affine.weight"), ("conv.modulation.bias", "affine.bias")):
        if place + name in state:
            result[f"synthesis.to_image.{to}"] = state[place + name]
    if f"{place}conv.weight" in state:
        weight = state[f"{place}conv.weight"]
        result["synthesis.to_image.conv.weight"] = weight[order] / math.sqrt(weight[0].numel())
    if f"{place}bias" in state:
        result["synthesis.to_image.conv.bias"] = state[f"{place}bias"].reshape(-1)[order]
    return result
