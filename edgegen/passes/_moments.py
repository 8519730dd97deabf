"""Mean and covariance of what layers put out, on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import graph
from edgegen.passes import _swap


@dataclass(frozen=True)
class Moments:
    """Of a layer's outputs without bias: mean (outputs,), covariance (outputs, outputs), from `count` positions."""

    mean: Tensor
    covariance: Tensor
    count: int

    def mixed(self, weight: Tensor) -> Tensor:
        """The covariance, mixed with that for white inputs where there are too few positions to trust it.

        Args:
            weight: (outputs, inputs), float64. A covariance of n positions and d outputs counts n / (n + d).
        """
        white = weight @ weight.T
        power, base = self.covariance.trace(), white.trace().clamp_min(1e-300)
        if not self.count or power <= 0:
            return white
        trust = self.count / (self.count + len(weight))
        return trust * self.covariance + (1 - trust) * power / base * white


def of_weights(weight: Tensor) -> Moments:
    """Nothing known of the inputs: they count as white, without a mean."""
    return Moments(torch.zeros(len(weight), dtype=torch.float64), weight @ weight.T, 0)


def of_outputs(module: nn.Module, inputs: _swap.Inputs, places: Sequence[_swap.Place]) -> dict[str, Moments]:
    """Layer -> moments of its outputs over all samples, positions and calls."""
    layers = {place.name: place.layer for place in places}
    sums: dict[str, list[Any]] = {
        name: [torch.zeros(w, dtype=torch.float64), torch.zeros(w, w, dtype=torch.float64), 0]
        for name, w in ((name, layer.weight.shape[0]) for name, layer in layers.items())
    }

    def note(name: str, args: Any, out: Tensor) -> None:
        layer = layers[name]
        rows = out.movedim(1, -1) if isinstance(layer, nn.Conv2d) else out
        rows = rows.detach().reshape(-1, rows.shape[-1]).double()
        rows = rows - layer.bias.double() if layer.bias is not None else rows
        total = sums[name]
        total[0], total[1], total[2] = total[0] + rows.sum(0), total[1] + rows.T @ rows, total[2] + len(rows)

    with _swap.hooked(layers, note):
        for sample in inputs:
            graph.outputs(module, sample)
    found = {}
    for name, (total, squares, count) in sums.items():
        mean = total / max(1, count)
        found[name] = Moments(mean, squares / max(1, count) - torch.outer(mean, mean), count)
    return found
