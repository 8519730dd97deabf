"""Taking channels out of layers for good, and the masked twin that proves it right.

The masked network has its full shapes, and zeros wherever a removed channel is written or read; its norms over the
channels take their statistics from those that stay. The pruned network must compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch_pruning import ops

from edgegen import graph
from edgegen.nn import mixed_norm
from edgegen.passes import _groups
from edgegen.passes._groups import Coupled, Key

Removals = Mapping[Key, frozenset[int]]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def part_at(module: nn.Module, path: str) -> Any:
    """The submodule or parameter at a path."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name) if path else module


def width(part: Any, side: str) -> int:
    """Number of channels of a layer or parameter on one side."""
    if isinstance(part, nn.Parameter):
        return part.shape[_groups.channel_dim(part)]
    if isinstance(part, nn.LayerNorm):
        return part.normalized_shape[-1]
    pruner = tp.pruner.function.PrunerBox[ops.module2type(part)]
    return pruner.get_out_channels(part) if side == "out" else pruner.get_in_channels(part)


def misfit(module: nn.Module, group: Coupled) -> str:
    """Why a group cannot be as it was traced (an index that a layer does not have), or ""."""
    for path, side in group.keys:
        size = width(part_at(module, path), side)
        if any(max(unit.get((path, side), (0,))) >= size for unit in group.units):
            return f"cannot be removed safely: the trace takes channels from {path} that it does not have"
    return ""


def remove(module: nn.Module, removals: Removals, heads: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A copy of `module` without the given channels.

    Args:
        removals: (path, side) -> indices into the original layer.
        heads: path of an attention module -> its new number of heads and head size.
    """
    pruned = graph.clone(module)
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for (path, side), indices in removals.items():
        part = part_at(pruned, path)
        if isinstance(part, nn.Parameter):
            parent, _, name = path.rpartition(".")
            kept = _without(part, indices, _groups.channel_dim(part))
            setattr(pruned.get_submodule(parent), name, nn.Parameter(kept))
        else:
            _shrink(part, side, sorted(indices))
    for path, (count, size) in heads.items():
        _set_heads(part_at(pruned, path), count, size)
    for part in pruned.modules():
        if isinstance(part, nn.MultiheadAttention):
            _rescale_heads(part, module)
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(flags[name])
    return pruned


def _shrink(part: Any, side: str, indices: list[int]) -> None:
    """Remove channels of one layer in place, by torch-pruning's functions."""
    if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.running_mean is not None:
        for name in ("running_mean", "running_var"):  # torch-pruning forgets these
            setattr(part, name, _without(getattr(part, name), indices, 0))
    if isinstance(part, nn.MultiheadAttention):
        part.size_before = part.head_dim
    pruner = tp.pruner.function.PrunerBox[ops.module2type(part)]
    pruner.pruning_dim = -1
    (pruner.prune_out_channels if side == "out" else pruner.prune_in_channels)(part, indices)


def _set_heads(part: Any, count: int, size: int) -> None:
    """Tell an attention module its heads; the queries make up for a changed 1 / sqrt(size)."""
    part.num_heads = count
    with torch.no_grad():
        rows = count * size
        factor = math.sqrt(size / part.head_dim)
        layer = part.qkv if hasattr(part, "qkv") else part.q
        layer.weight[:rows] *= factor
        if layer.bias is not None:
            layer.bias[:rows] *= factor
    part.head_dim = size
    if hasattr(part, "attn_dim"):
        part.attn_dim = rows
    if hasattr(part, "scale"):
        part.scale = size**-0.5


def _rescale_heads(part: nn.MultiheadAttention, original: nn.Module) -> None:
    """The same for torch's own attention."""
    before = part.__dict__.pop("size_before", part.head_dim)
    if before == part.head_dim or part.in_proj_weight is None:
        return
    factor = math.sqrt(part.head_dim / before)
    with torch.no_grad():
        part.in_proj_weight[: part.embed_dim] *= factor
        if part.in_proj_bias is not None:
            part.in_proj_bias[: part.embed_dim] *= factor


def mask(module: nn.Module, removals: Removals) -> nn.Module:
    """A copy of `module` with zeros in place of the given channels: at the layers that write and that read them."""
    masked = graph.clone(module)
    with torch.no_grad():
        for (path, side), indices in removals.items():
            part, at = part_at(masked, path), sorted(indices)
            if isinstance(part, nn.Parameter):
                part.index_fill_(_groups.channel_dim(part), torch.tensor(at), 0.0)
            elif isinstance(part, graph.WEIGHTED):
                _mask_weight(part, side, at)
            elif isinstance(part, nn.Embedding):
                part.weight[:, at] = 0
            elif isinstance(part, nn.LayerNorm | nn.GroupNorm):
                put(masked, path, _KeptNorm(part, at))
            elif isinstance(part, _NORMS) and part.weight is not None:
                part.weight[at] = 0
                part.bias[at] = 0
    for (path, _), indices in removals.items():
        owner, _, name = path.rpartition(".")
        if name == "rho" and isinstance(part_at(masked, owner), mixed_norm.AdaILN | mixed_norm.ILN):
            put(masked, owner, _KeptMixedNorm(part_at(masked, owner), sorted(indices)))
    return masked


def put(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put `part` in the place of a submodule."""
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = part


class _KeptNorm(nn.Module):
    """A LayerNorm over the last dimension, or a GroupNorm, over the channels that stay; the others become 0."""

    def __init__(self, norm: Any, gone: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.groups = norm, norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        self.first = bool(self.groups) or "2d" in type(norm).__name__.lower()  # timm: a LayerNorm of maps (N, C, H, W)
        size = norm.num_channels if self.groups else norm.normalized_shape[-1]
        self.kept = torch.tensor([i for i in range(size) if i not in set(gone)], dtype=torch.long)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis = 1 if self.first else x.ndim - 1
        few, out = x.index_select(axis, self.kept), torch.zeros_like(x)
        scale, shift = (None if p is None else p[self.kept] for p in (self.norm.weight, self.norm.bias))
        if self.groups:
            few = F.group_norm(few, self.groups, scale, shift, self.norm.eps)
        else:
            few = few.movedim(axis, -1)
            few = F.layer_norm(few, few.shape[-1:], scale, shift, self.norm.eps).movedim(-1, axis)
        return out.index_copy_(axis, self.kept, few)


class _KeptMixedNorm(nn.Module):
    """A layer-instance norm whose statistics are those of the channels that stay; the others become 0."""

    def __init__(self, norm: nn.Module, gone: Sequence[int]) -> None:
        super().__init__()
        size = norm.get_parameter("rho").shape[1]
        self.norm, self.kept = norm, torch.tensor([i for i in range(size) if i not in set(gone)], dtype=torch.long)
        for name, parameter in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(_without(parameter, gone, 1)))

    def forward(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        few = self.norm(*(value.index_select(1, self.kept) for value in (x, *given)))
        return torch.zeros_like(x).index_copy_(1, self.kept, few)


def _mask_weight(layer: Any, side: str, at: list[int]) -> None:
    """Zero the rows (and biases) or the columns of a convolution or linear layer."""
    if side == "out" and layer.bias is not None:
        layer.bias[at] = 0
    channels_first = side == "out"
    if getattr(layer, "transposed", False):
        channels_first = side == "in" or layer.groups == layer.out_channels > 1
    if channels_first:
        layer.weight[at] = 0
    else:
        layer.weight[:, [i % layer.weight.shape[1] for i in at]] = 0


def weight_slices(part: Any, side: str, of: torch.Tensor | None = None) -> torch.Tensor | None:
    """The weight (or `of`, of its shape) as (channels on that side, the rest) for scores.

    None for what has no weights, or is read in groups.
    """
    if isinstance(part, graph.WEIGHTED):
        weight = part.weight.detach() if of is None else of
        if isinstance(part, graph.CONVS) and part.groups > 1 and part.groups != part.out_channels and side == "in":
            return None
        first = (side == "out") != bool(getattr(part, "transposed", False)) or (
            isinstance(part, graph.CONVS) and part.groups == part.out_channels > 1
        )
        return (weight if first else weight.transpose(0, 1)).flatten(1)
    if isinstance(part, (*_NORMS, nn.LayerNorm)) and part.weight is not None:
        return part.weight.detach().reshape(-1, 1)
    return None


def _without(tensor: torch.Tensor, indices: Any, dim: int) -> torch.Tensor:
    keep = [i for i in range(tensor.shape[dim]) if i not in set(indices)]
    return tensor.detach().index_select(dim, torch.tensor(keep, dtype=torch.long))


def changes(module: nn.Module, pruned: nn.Module) -> dict[str, str]:
    """Layer -> its widths before and after, for every layer or parameter with another shape."""
    changed = {}
    for path, part in module.named_modules():
        other = pruned.get_submodule(path)
        shapes = [tuple(p.shape) for p in part.parameters(recurse=False)]
        if shapes == [tuple(p.shape) for p in other.parameters(recurse=False)]:
            continue
        if isinstance(part, graph.WEIGHTED):
            sides = [(side, width(part, side), width(other, side)) for side in ("in", "out")]
            changed[path] = ", ".join(f"{side} {a} -> {b}" for side, a, b in sides if a != b)
        else:
            for name, a in part.named_parameters(recurse=False):
                b = getattr(other, name)
                if a.shape != b.shape:  # a bare parameter goes by its own name, a norm by the module's
                    own = f"{path}.{name}".lstrip(".") if any(part.children()) else path
                    changed[own] = f"{'x'.join(map(str, a.shape))} -> {'x'.join(map(str, b.shape))}"
    return changed


def unchanged(module: nn.Module, pruned: nn.Module, groups: Sequence[Coupled]) -> dict[str, str]:
    """Every convolution and linear layer that kept all its outputs -> why."""
    reasons = {path: group.blocked for group in groups for path in group.producers}
    parts = {path: (part, pruned.get_submodule(path)) for path, part in graph.layers(module).items()}
    return {
        path: reasons.get(path) or "its channels are coupled to layers that stay"
        for path, (a, b) in parts.items()
        if width(a, "out") == width(b, "out")
    }
