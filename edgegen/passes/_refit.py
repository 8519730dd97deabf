"""Give the last layer of a chain the weights that best reproduce the outputs of the layer that the chain replaces.

Least squares on samples, as in `reconstruct` (He et al., 2017, arXiv:1707.06168), with a ridge towards the weights as
they are. The other layers of the chain stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import graph
from edgegen.nn.chain import Chain
from edgegen.passes import _swap

_POSITIONS = 2048  # of each call that are looked at
_RIDGE = 1e-3  # relative to the mean square of the inputs


@dataclass
class _Sums:
    """Normal equations of one layer, with a last row for the bias."""

    gram: Tensor
    cross: Tensor
    count: int = 0


def refit(module: nn.Module, parts: Mapping[str, nn.Module], inputs: _swap.Inputs, seed: int) -> None:
    """Refit every chain that ends in a 1x1 convolution or a linear layer, in place.

    Args:
        module: the network that still has the layers; parts: layer -> its replacement.
    """
    chains = {name: part for name, part in parts.items() if isinstance(part, Chain) and _is_pointwise(part[-1])}
    layers = {name: module.get_submodule(name) for name in chains}
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, _Sums] = {}

    def note(name: str, args: Any, out: Tensor) -> None:
        x = args[0]
        for part in list(chains[name])[:-1]:
            x = part(x)
        x, y = (_rows(value, isinstance(layers[name], nn.Conv2d)) for value in (x, out))
        chosen = torch.randperm(len(x), generator=generator)[:_POSITIONS]
        x, y = x[chosen].double(), y[chosen].double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        total = sums.setdefault(name, _Sums(torch.zeros_like(x[:1].T @ x[:1]), torch.zeros_like(x[:1].T @ y[:1])))
        total.gram += x.T @ x
        total.cross += x.T @ y
        total.count += len(x)

    with _swap.hooked(layers, note):
        for sample in inputs:
            graph.outputs(module, sample)
    for name, total in sums.items():
        _solve(chains[name][-1], total)


def _solve(last: Any, sums: _Sums) -> None:
    """Put the solution into the layer; where it has no bias, none is fitted."""
    weight = last.weight.flatten(1).double().T  # (inputs, outputs)
    start = weight if last.bias is None else torch.cat([weight, last.bias.double()[None]])
    size = len(start)
    gram, cross = sums.gram[:size, :size], sums.cross[:size]
    # few positions say little about many weights: then the pull is stronger
    pull = (_RIDGE + size / max(1, sums.count)) * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    found = torch.linalg.solve(gram + pull, cross + pull @ start)
    last.weight.copy_(found[: len(weight)].T.reshape(last.weight.shape))
    if last.bias is not None:
        last.bias.copy_(found[-1])


def _is_pointwise(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def _rows(value: Tensor, image: bool) -> Tensor:
    """(positions, channels)."""
    value = value.movedim(1, -1) if image else value
    return value.reshape(-1, value.shape[-1])
