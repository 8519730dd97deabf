"""Modules that torch-pruning cannot follow: a layer of simple form stands in for each while it traces.

What is inside them is put back into the groups that it finds, and the groups that lie wholly inside are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from edgegen.nn import conditional, modulated
from edgegen.passes._groups import Coupled, Unit

# Path of a stand-in -> (what leaves with its channel i, groups inside it)
Stood = Mapping[str, tuple[Callable[[int], Unit], list[Coupled]]]


class _Same(nn.BatchNorm2d):
    """As many channels out as in; other arguments are not looked at."""

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return super().forward(x)


def put(net: nn.Module) -> Stood:
    """Put stand-ins into `net`, in place."""
    stood = {}
    for path, part in list(net.named_modules()):
        if isinstance(part, modulated.StyledConv | modulated.SeparableStyledConv):
            part.forward = MethodType(_undemodulated, part)  # type: ignore[method-assign]
        if isinstance(part, conditional.ConditionalBatchNorm):
            width, found = part.bn.num_features, _of_norm(path, part)
        elif isinstance(part, conditional.SelfAttention):
            width, found = part.query.in_channels, _of_attention(path, part)
        else:
            continue
        parent, _, name = path.rpartition(".")
        net.get_submodule(parent)._modules[name] = _Same(width).eval()
        stood[path] = found
    return stood


def _undemodulated(part: Any, x: torch.Tensor, w: torch.Tensor, *noise: Any) -> torch.Tensor:
    """A modulated convolution whose outputs are not brought to one size: that looks at weights as at tensors."""
    y = x * part.affine(w)[:, :, None, None]
    if isinstance(part, modulated.StyledConv):
        y = part.conv(y)
        y = y[..., 1:, 1:] if part.up else y  # the low-pass filter makes 2 H of 2 H + 1
    else:
        y = part.depthwise(part.pointwise(y))
    return y + part.bias[None, :, None, None]


def _of_norm(path: str, norm: conditional.ConditionalBatchNorm) -> tuple[Callable[[int], Unit], list[Coupled]]:
    """The norm's statistics, and its scales and shifts beside each other."""
    width = norm.bn.num_features
    return lambda i: {(f"{path}.bn", "out"): (i,), (f"{path}.embed", "out"): (i, width + i)}, []


def _of_attention(path: str, part: conditional.SelfAttention) -> tuple[Callable[[int], Unit], list[Coupled]]:
    """Convolutions around attention over positions: queries fit keys, values fit what is made of them."""
    inputs = [(f"{path}.{name}", "in") for name in ("query", "key", "value")]
    query, key, value, out = (f"{path}.{name}" for name in ("query", "key", "value", "out"))
    inside = [
        Coupled(query, [{(query, "out"): (i,), (key, "out"): (i,)} for i in range(part.query.out_channels)],
                producers=(query, key)),
        Coupled(value, [{(value, "out"): (i,), (out, "in"): (i,)} for i in range(part.value.out_channels)],
                producers=(value,)),
    ]  # fmt: skip
    return lambda i: {**dict.fromkeys(inputs, (i,)), (out, "out"): (i,)}, inside


def expand(stood: Stood, groups: list[Coupled]) -> list[Coupled]:
    """The groups with what stand-ins stand for, and those inside them."""
    for group in groups:
        group.units = [_expanded(stood, unit) for unit in group.units]
        group.producers = tuple(
            name for path in group.producers
            for name in ([key for key, side in stood[path][0](0) if side == "out"] if path in stood else [path])
        )  # fmt: skip
    return groups + [group for _, inside in stood.values() for group in inside]


def _expanded(stood: Stood, unit: Unit) -> Unit:
    made: Unit = {}
    for (path, side), indices in unit.items():
        if path not in stood:
            made[path, side] = indices
            continue
        for i in indices:
            for key, own in stood[path][0](i).items():
                made[key] = tuple(sorted({*made.get(key, ()), *own}))
    return made
