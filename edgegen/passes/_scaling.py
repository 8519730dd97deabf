"""Channel ranges of a layer's weight, and channels multiplied by factors, for convolutions and linear layers alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgegen import onnx_narrow

EIGHT_BITS = 127  # integers on each side of zero
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _view(layer: Any) -> tuple[torch.Tensor, int, int]:
    """The weight as (groups, a, b, places), and which of the axes are outputs and inputs of a group."""
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.data.reshape(groups, layer.weight.shape[0] // groups, layer.weight.shape[1], -1)
    return (weight, 2, 1) if isinstance(layer, _TRANSPOSED) else (weight, 1, 2)


def widths(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    weight, out_axis, in_axis = _view(layer)
    return weight.shape[0] * weight.shape[in_axis], weight.shape[0] * weight.shape[out_axis]


def output_range(layer: Any) -> torch.Tensor:
    """Largest magnitude of the weights of each output channel."""
    weight, _, in_axis = _view(layer)
    return weight.abs().amax((in_axis, 3)).flatten()


def input_range(layer: Any) -> torch.Tensor:
    """Largest magnitude of the weights that each input channel meets."""
    weight, out_axis, _ = _view(layer)
    return weight.abs().amax((out_axis, 3)).flatten()


def scale_outputs(layer: Any, factor: torch.Tensor) -> None:
    """Multiply each output channel by its factor; the bias too."""
    weight, out_axis, _ = _view(layer)
    _multiply(layer, weight, out_axis, factor)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data * factor


def scale_inputs(layer: Any, factor: torch.Tensor) -> None:
    """Multiply the weights that each input channel meets by its factor."""
    weight, _, in_axis = _view(layer)
    _multiply(layer, weight, in_axis, factor)


def _multiply(layer: Any, weight: torch.Tensor, axis: int, factor: torch.Tensor) -> None:
    shape = [weight.shape[0], 1, 1, 1]
    shape[axis] = weight.shape[axis]
    layer.weight.data = (weight * factor.reshape(shape)).reshape(layer.weight.shape)


def grid(layer: Any, levels: int = EIGHT_BITS) -> torch.Tensor:
    """Step of each output channel, shaped to go with the weight: largest magnitude / levels (symmetric, as builds do).
    """
    weight, _, in_axis = _view(layer)
    steps = weight.abs().amax((in_axis, 3), keepdim=True) / levels
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return steps.expand_as(weight).reshape(layer.weight.shape).clone()


def by_output(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """One value an output channel (of a convolution without groups, if transposed), shaped to go with the weight."""
    shape = [1] * layer.weight.ndim
    shape[1 if isinstance(layer, _TRANSPOSED) else 0] = -1
    return values.reshape(shape)


def snapped(layer: Any, steps: torch.Tensor | None = None, levels: int = EIGHT_BITS) -> torch.Tensor:
    """The weight on the INT8 grid that a build makes of it: the largest of a channel is on it, so the grid stays.

    steps: of 15 levels, for a weight stored in 4 bits.
    """
    most = levels if steps is None else onnx_narrow.LEVELS
    steps = grid(layer, levels) if steps is None else steps
    return (layer.weight.data / steps).round().clamp(-most, most) * steps
