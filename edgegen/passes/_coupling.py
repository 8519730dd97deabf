"""Which channels can only leave a network together: torch-pruning's dependency graph, made exact where it guesses.

Fang et al., 2023, DepGraph: Towards Any Structural Pruning, arXiv:2301.12900. The graph follows autograd nodes, and
takes every operation that it does not know for an element-wise one. So edgegen adds what image networks need: pixel
shuffle, zero padding of channels (the option-A shortcut), the heads of attention, and identity layers at the inputs, so
that a concatenation with the input image has sizes. What is still wrong is found by `prune_channels`' own check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex as Index

from edgegen import graph
from edgegen.errors import PassError
from edgegen.nn import tokens
from edgegen.passes import _groups, _inverse, _standins, _tracing
from edgegen.passes._groups import Coupled, Key, Unit
from edgegen.passes._limited import limited
from edgegen.passes._tracing import Dependencies, Member

_NOT_MASKED = (nn.MultiheadAttention,)  # its masked twin is not built


def find(
    module: nn.Module, inputs: Sequence[torch.Tensor], *, seconds: float, heads: bool = False
) -> list[Coupled]:
    """All coupled groups of `module`.

    Args:
        module: eval mode; its gradients' state is not touched (a copy is traced).
        seconds: tracing gives up after this time (some networks make the dependency graph loop).
        heads: the units of attention are whole heads.
    Raises:
        PassError: tracing failed or took too long.
    """
    net = graph.clone(module).requires_grad_(True).eval()
    for part in net.modules():
        if isinstance(part, tokens.TokenStages):  # merging moves tokens, not channels, and cannot be traced
            part.counts = {}
    try:
        found = limited(lambda: _find(net, inputs), seconds)
    except TimeoutError as error:
        raise PassError(
            f"prune_channels: tracing the channel dependencies took more than {seconds:g} s; "
            "use another pass for this network, or raise trace_seconds"
        ) from error
    except (RuntimeError, ValueError, AssertionError, AttributeError, KeyError, IndexError, TypeError) as error:
        at = _inverse.first(net)
        flow = f"; {at} is invertible: a flow keeps its channels, use another pass" if at else ""
        raise PassError(f"prune_channels: the channel dependencies cannot be traced: {error}{flow}") from error
    own = _groups.of_attention(net, heads)
    taken = {path for group in own for path in group.producers}
    found = [group for group in found if not taken & set(group.producers)] + own
    strange = _groups.unknown_heads(net) if heads else []
    for group in found:
        if within := [path for path in strange if any(f"{own}.".startswith(f"{path}.") for own in group.producers)]:
            group.blocked = group.blocked or f"heads: those of {within[0]} are not known here; leave out heads"
        group.blocked = group.blocked or _inverse.reason(net, [path for path, _ in group.keys])
    return found


def _find(net: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Coupled]:
    stood = _standins.put(net)
    dg = _tracing.trace(net, inputs)
    maps = _add_mappings(dg)
    return _standins.expand(stood, [_coupled(dg, members, maps) for members in dg.groups()])


class _Mapping:
    """An index mapping that notices channels which have no counterpart, such as those that padding makes."""

    def __init__(self, function: Callable[[int], Iterable[int]], low: int = 0, high: float = math.inf) -> None:
        self.function, self.low, self.high = function, low, high
        self.touched = False

    def __call__(self, indices: list[Index]) -> list[Index]:
        self.touched |= any(not self.low <= i.idx < self.high for i in indices)
        inside = [i for i in indices if self.low <= i.idx < self.high]
        return list(dict.fromkeys(Index(idx=k, root_idx=i.root_idx) for i in inside for k in self.function(i.idx)))


def _add_mappings(dg: Dependencies) -> list[_Mapping]:
    """Teach the graph the operations that move channels. A node's own index space is that of its input."""
    made: list[_Mapping] = []
    for node in list(dg.module2node.values()):
        pair = _moves(node.grad_fn)
        if pair is None or node.type != ops.OPTYPE.ELEMENTWISE:
            continue
        for other in node.outputs:
            for source, target, mapping in ((node, other, pair[0]), (other, node, pair[1])):
                for dependency in source.dependencies:
                    if dependency.target is target:
                        dependency.index_mapping[0] = mapping
        made += pair
    return made


def _moves(grad_fn: Any) -> tuple[_Mapping, _Mapping] | None:
    """(input index -> output indices, back) of an operation that moves channels, None for any other."""
    name = grad_fn.name() if hasattr(grad_fn, "name") else ""
    if name.startswith("PixelShuffleBackward"):
        n = grad_fn._saved_upscale_factor**2
        return _Mapping(lambda i: [i // n]), _Mapping(lambda i: range(i * n, i * n + n))
    if name.startswith("PixelUnshuffleBackward"):
        n = grad_fn._saved_downscale_factor**2
        return _Mapping(lambda i: range(i * n, i * n + n)), _Mapping(lambda i: [i // n])
    if name.startswith("ConstantPadNdBackward"):
        shape = tuple(grad_fn._input_metadata[0].shape)  # of the padded tensor
        pad = [int(value) for value in grad_fn._saved_pad]
        at = 2 * (len(shape) - 2)
        if len(pad) <= at or not any(pad[at : at + 2]):
            return None
        before, after = pad[at], pad[at + 1]
        return _Mapping(lambda i: [i + before]), _Mapping(lambda i: [i - before], before, shape[1] - after)
    return None


def _coupled(dg: Dependencies, members: list[Member], maps: list[_Mapping]) -> Coupled:
    """A group of torch-pruning's graph as units in original indices."""
    first, side_of = members[0], _units(dg, members)
    root, count = first.node.module, len(first.indices)
    result = Coupled(dg.path(root), [], producers=tuple(path for path, side in side_of if side == "out"))
    parts = [member.node.module for member in members]
    result.blocked = _reason(dg, members)
    result.inexact = any(isinstance(part, _NOT_MASKED) for part in parts)
    if result.blocked:
        return result
    if all(member.indices == first.indices and not member.moved for member in members):
        result.units = [dict.fromkeys(side_of, (i,)) for i in range(count)]
    else:
        result.units, result.fixed = _closures(dg, first, maps)
    _merge_blocks(result, parts)
    return result


def _reason(dg: Dependencies, members: list[Member]) -> str:
    """Why no channel of this group may go, or an empty string."""
    if any(member.node.type == ops.OPTYPE.OUTPUT for member in members):
        return "produces the model's output"
    if any(str(dg._module2name.get(member.node.module, "")).startswith("probes.") for member in members):
        return "tied to the model's input"
    return ""


def _units(dg: Dependencies, members: list[Member]) -> Unit:
    """The real layers and parameters of a group with their indices; bookkeeping nodes are left out."""
    unit: Unit = {}
    for member in members:
        path, side = dg.path(member.node.module), "out" if dg.writes(member) else "in"
        if path:
            unit[path, side] = tuple(sorted({*unit.get((path, side), ()), *member.indices}))
    return unit


def _closures(dg: Dependencies, first: Member, maps: list[_Mapping]) -> tuple[list[Unit], set[int]]:
    """Units where one root channel drags others along; a unit that reaches channels which padding makes is fixed."""
    units: list[Unit] = []
    fixed: set[int] = set()
    left = set(first.indices)
    while left:
        for mapping in maps:
            mapping.touched = False
        members = dg.group(first.node.module, first.function, {min(left)})
        if any(mapping.touched for mapping in maps):
            fixed.add(len(units))
        units.append(_units(dg, members))
        left -= members[0].indices
    return units, fixed


def _merge_blocks(group: Coupled, parts: Sequence[Any]) -> None:
    """Join units so that grouped convolutions, group norms and heads lose the same positions in each block."""
    counts = {1}
    for part in parts:
        if isinstance(part, graph.CONVS) and not part.groups == part.out_channels == part.in_channels:
            counts.add(part.groups)
        elif isinstance(part, nn.GroupNorm):
            counts.add(part.num_groups)
        elif isinstance(part, nn.MultiheadAttention):
            counts.add(part.num_heads)
    blocks = math.lcm(*counts)
    if blocks == 1:
        return
    size, rest = divmod(len(group.units), blocks)
    if rest or group.fixed:
        group.blocked = f"{len(group.units)} channels do not divide into {blocks} equal groups or heads"
        return
    group.units = [_join(group.units[position::size]) for position in range(size)]
    group.blocks = blocks


def _join(units: Iterable[Unit]) -> Unit:
    joined: dict[Key, set[int]] = {}
    for unit in units:
        for key, indices in unit.items():
            joined.setdefault(key, set()).update(indices)
    return {key: tuple(sorted(indices)) for key, indices in joined.items()}
