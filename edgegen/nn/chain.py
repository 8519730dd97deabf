"""Convolutions and linear layers one after the other, in the place of a single one: the factors of its kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_KINDS: dict[str, type[nn.Module]] = {"Conv2d": nn.Conv2d, "Linear": nn.Linear}
Layer = tuple[str, dict[str, Any]]


class Chain(nn.Sequential):
    """Layers without anything between them; the last one has the bias and makes the shape of the layer replaced.

    Args:
        layers: [["Conv2d" or "Linear", the keyword arguments that it is made with]], JSON values.
    """

    def __init__(self, layers: Sequence[Sequence[Any]]) -> None:
        unknown = [kind for kind, _ in layers if kind not in _KINDS]
        if unknown:
            raise ValueError(f"a chain holds {' and '.join(_KINDS)}, got {unknown[0]!r}")
        super().__init__(*(_KINDS[kind](**options) for kind, options in layers))
        self.config = {"layers": [[kind, dict(options)] for kind, options in layers]}


def linear(inputs: int, outputs: int, *, bias: bool = False) -> Layer:
    """A linear layer as `Chain` takes it."""
    return "Linear", {"in_features": inputs, "out_features": outputs, "bias": bias}


def pointwise(inputs: int, outputs: int, *, bias: bool = False) -> Layer:
    """A 1x1 convolution as `Chain` takes it."""
    return "Conv2d", {"in_channels": inputs, "out_channels": outputs, "kernel_size": [1, 1], "bias": bias}


def like(layer: nn.Conv2d, inputs: int, outputs: int, axes: str = "hw", **other: Any) -> Layer:
    """A convolution with the window, stride, dilation and padding of `layer`, along both axes or "h" or "w" alone."""
    one: dict[str, Any] = dict.fromkeys("hw", (1, 1, 1, 0))
    padding: Any = layer.padding
    for at, axis in enumerate("hw"):
        if axis in axes:
            pad = padding if isinstance(padding, str) else padding[at]
            one[axis] = (layer.kernel_size[at], layer.stride[at], layer.dilation[at], pad)
    window, stride, dilation, pads = (list(pair) for pair in zip(one["h"], one["w"], strict=True))
    options: Mapping[str, Any] = {
        "in_channels": inputs, "out_channels": outputs, "kernel_size": window, "stride": stride, "dilation": dilation,
        "padding": padding if isinstance(padding, str) else pads, "padding_mode": layer.padding_mode, "bias": False,
    }  # fmt: skip
    return "Conv2d", {**options, **other}
