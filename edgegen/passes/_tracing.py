"""torch-pruning's dependency graph of a network, with sizes that it cannot infer, and a walk through it that ends.

Fang et al., 2023, DepGraph, arXiv:2301.12900. torch-pruning's own walk compares lists of indices, so that where a
reshape moves channels forth and back it goes on for ever with the same indices in another order. Here an index comes to
an operation once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex as Index
from torch_pruning.dependency import index_mapping

from edgegen import graph
from edgegen.passes import _groups


@dataclass
class Member:
    """What leaves one side of one operation. `moved`: on the way there, indices changed their meaning."""

    node: Any
    function: Callable[..., Any]
    indices: set[int] = field(default_factory=set)
    moved: bool = False


class _Traced(nn.Module):
    """The network with a layer at each float input and an operation at each output, so that both have nodes."""

    def __init__(self, net: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.net = net
        self.probes = nn.ModuleList(_probe(x) for x in inputs)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(out * 1 for out in graph.flatten(self.net(*(p(x) for p, x in zip(self.probes, inputs)))))


def _probe(x: torch.Tensor) -> nn.Module:
    if x.is_floating_point() and x.ndim == 4:
        return nn.Conv2d(x.shape[1], x.shape[1], 1)
    return nn.Linear(x.shape[1], x.shape[1]) if x.is_floating_point() and x.ndim == 2 else nn.Identity()


class Dependencies(tp.DependencyGraph):
    """The dependency graph, and the walk through it."""

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        super()._build_dependency(module2node)
        for node in module2node.values():
            if node.type == ops.OPTYPE.CONCAT:  # torch-pruning adds up None where it cannot infer the parts' sizes
                parts = [_channels(function, place) for function, place in node.grad_fn.next_functions]
                if None not in parts and len(parts) == len(node.inputs):
                    node.module.concat_sizes = parts

    def _detect_unwrapped_parameters(self, unwrapped_parameters: Any) -> Any:
        names, found = super()._detect_unwrapped_parameters(unwrapped_parameters)
        return names, [one._replace(pruning_dim=_groups.channel_dim(one.parameters)) for one in found]

    def path(self, part: Any) -> str:
        """Path of a real layer or parameter; "" for what the graph itself has put there."""
        name = self._param_to_name[part] if isinstance(part, nn.Parameter) else self._module2name.get(part, "")
        return name.removeprefix("net.") if name.startswith("net.") else ""

    def writes(self, member: Member) -> bool:
        """Whether channels leave the side that an operation writes."""
        return bool(self.is_out_channel_pruning_fn(member.function))

    def group(self, root: nn.Module, function: Callable[..., Any], indices: Iterable[int]) -> list[Member]:
        """All that has to leave with channels of `root`, itself first.

        Indices that an operation does not have are listed, and not followed.
        """
        if isinstance(root, ops.TORCH_CONV) and root.groups == root.out_channels > 1:
            function = tp.pruner.function.prune_depthwise_conv_out_channels
        first = Member(self.module2node[root], function, set(indices))
        members, stack = {(id(first.node), function): first}, [(first, first.indices)]
        while stack:
            member, new = stack.pop()
            for dep in member.node.dependencies:
                if not dep.is_triggered_by(member.function):
                    continue
                reached = [Index(idx=i, root_idx=i) for i in sorted(new)]
                maps = [mapping for mapping in dep.index_mapping if mapping is not None]
                for mapping in maps:
                    reached = mapping(reached)
                other = members.get((id(dep.target), dep.handler)) or Member(dep.target, dep.handler)
                fresh = {index.idx for index in reached} - other.indices
                other.moved |= bool(maps)
                if fresh:
                    members[id(dep.target), dep.handler] = other
                    other.indices |= fresh
                    width = self._width(other)
                    stack.append((other, {i for i in fresh if 0 <= i < width}))
        return list(members.values())

    def _width(self, member: Member) -> int:
        """Channels of one side of an operation; of those without weights, more than any layer has."""
        found = (self.get_out_channels if self.writes(member) else self.get_in_channels)(member.node)
        return int(found) if found is not None else 2**24

    def groups(self) -> Iterator[list[Member]]:
        """Each group there is, with all its channels."""
        visited: set[int] = set()
        for root in list(self.module2node):
            if isinstance(root, (ops.TORCH_CONV, ops.TORCH_LINEAR)) and id(root) not in visited:
                pruner = self.get_pruner_of_module(root)
                found = self.group(root, pruner.prune_out_channels, range(pruner.get_out_channels(root)))
                visited |= {id(member.node.module) for member in found if self.writes(member)}
                yield found


def trace(net: nn.Module, inputs: Sequence[torch.Tensor]) -> Dependencies:
    """The dependencies of a network whose parameters all need gradients."""
    traced = _Traced(net, inputs)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Dependencies = Dependencies().build_dependency(
            traced, tuple(inputs), forward_fn=lambda net, inputs: net(*inputs), verbose=False
        )
        index_mapping.update_index_mapping(made)  # the first time, some sizes were not known yet
    return made


def _channels(function: Any, place: int) -> int | None:
    """Channels of an output of an operation that autograd recorded, None for what was not recorded."""
    shape = tuple(function._input_metadata[place].shape) if function is not None else ()
    return shape[1] if len(shape) > 1 else None
