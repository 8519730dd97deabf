"""A convolution whose output channels look at the image with dilations of their own.

Liu et al., 2020, Inception Convolution with Efficient Dilation Search (EDO), arXiv:2012.13587.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Dilated(nn.Module):
    """Small windows with a dilation for each axis and group of output channels, in the place of a large window.

    (N, inputs, H, W) to (N, outputs, H', W'), with H' and W' those of the window replaced.

    Args:
        inputs: channels. groups: [[dilation down, dilation across, [output channels]]]; each channel stands in one.
        window: of the small kernels, odd. stride: (down, across). margin: padding of the window replaced, minus its
            reach to one side, (down, across); 0 keeps the size.
    """

    order: Tensor

    def __init__(
        self, inputs: int, groups: Sequence[Sequence[Any]], window: int, stride: Sequence[int], margin: Sequence[int],
        bias: bool, padding_mode: str,
    ) -> None:  # fmt: skip
        super().__init__()
        told: list[Any] = [[int(down), int(across), [int(c) for c in own]] for down, across, own in groups]
        self.config = {
            "inputs": inputs, "groups": told, "window": window, "stride": list(stride), "margin": list(margin),
            "bias": bias, "padding_mode": padding_mode,
        }  # fmt: skip
        channels = [channel for _, _, own in told for channel in own]
        if sorted(channels) != list(range(len(channels))):
            raise ValueError(f"each output channel must stand in one group, got {channels}")
        self.crops: list[list[int]] = []
        parts = []
        for down, across, own in told:
            pads = [edge + step * (window // 2) for edge, step in zip(margin, (down, across), strict=True)]
            self.crops.append([max(0, -pad) for pad in pads])
            options: dict[str, Any] = {
                "stride": tuple(stride), "padding": tuple(max(0, pad) for pad in pads), "dilation": (down, across),
                "bias": bias, "padding_mode": padding_mode,
            }  # fmt: skip
            parts.append(nn.Conv2d(inputs, len(own), window, **options))
        self.parts = nn.ModuleList(parts)
        self.sorted = channels == sorted(channels)
        self.register_buffer("order", torch.argsort(torch.tensor(channels)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for part, (down, across) in zip(self.parts, self.crops, strict=True):
            made.append(part(x[:, :, down : x.shape[2] - down, across : x.shape[3] - across]))
        out = made[0] if len(made) == 1 else torch.cat(made, 1)
        return out if self.sorted else out.index_select(1, self.order)
