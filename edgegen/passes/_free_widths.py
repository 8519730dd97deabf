"""Which channels of a network are free to go together: made by convolutions, taken by others, with nothing in between
that would turn a zero into something else. Found by tracing the network with torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgegen.nn.passthrough import Passthrough

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_ZERO_STAYS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Dropout, nn.Hardswish,
               Passthrough)  # fmt: skip
_SPATIAL = ("ReflectionPad", "ReplicationPad", "ZeroPad", "Upsample", "AvgPool", "MaxPool", "AdaptiveAvgPool")
_SUMS = (operator.add, operator.iadd, torch.add)
_FUNCTIONS = (F.relu, torch.relu, F.interpolate, F.leaky_relu, F.avg_pool2d, F.max_pool2d)


@dataclass(frozen=True)
class Width:
    """Channels that are free together. writers: layers that make them (masked), norms: on them, readers: that take
    them. full: how many there are. Names are module paths."""

    name: str
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]
    full: int


def chain(module: nn.Module) -> list[Width]:
    """The free widths of a network whose channels are made by one convolution and taken by the next ones.

    Found by tracing it: which convolution reads what which one wrote, through norms and functions that keep zero at
    zero. Sums tie the widths of their terms together. What anything else touches, or the output shows, is not free. A
    linear layer reads channels where a global pooling and a flattening lie between.

    Raises:
        ValueError: the network cannot be traced, because its code looks at its tensors.
    """
    traced, parts = _traced(module)
    tie: dict[Any, Any] = {}
    told: tuple[dict[Any, set[str]], dict[Any, set[str]], dict[Any, set[str]]] = ({}, {}, {})
    made, norms, readers = told
    fixed: set[Any] = set()

    def root(node: Any) -> Any:
        while tie.get(node, node) is not node:
            node = tie[node]
        return node

    def join(a: Any, b: Any) -> None:
        a, b = root(a), root(b)
        if a is not b:
            tie[b] = a

    calls = Counter(str(node.target) for node in traced.nodes if node.op == "call_module")
    for node in traced.nodes:
        kind = _kind(node, parts)
        sources = list(node.all_input_nodes)
        if kind in ("conv", "linear", "norm") and calls[str(node.target)] > 1:  # used at two places: left as it is
            fixed |= {node, *sources}
        elif kind in ("conv", "linear"):
            readers.setdefault(sources[0], set()).add(str(node.target))
            made.setdefault(node, set()).add(str(node.target))
            fixed |= {node} if kind == "linear" else set()
        elif kind == "norm":
            norms.setdefault(node, set()).add(str(node.target))
            join(sources[0], node)
        elif kind == "same":
            for source in sources:
                join(source, node)
        elif sources or node.op == "placeholder":
            fixed |= {node, *sources}
    return _widths(traced, parts, root, told, {root(node) for node in fixed})


def _traced(module: nn.Module) -> tuple[Any, dict[str, nn.Module]]:
    """The graph of a network, with the layers that are looked at as its leaves, and all modules by name."""
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            known = (*_CONVS, *NORMS, *_ZERO_STAYS, nn.Linear)
            return isinstance(m, known) or super().is_leaf_module(m, module_qualified_name)

    try:
        return Tracer().trace(module), dict(module.named_modules())
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"it cannot be traced: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _kind(node: Any, parts: Mapping[str, nn.Module]) -> str:
    """How a node treats channels: "conv", "linear", "norm", "same" (each by itself, zero to zero) or ""."""
    if node.op == "call_module":
        part = parts[str(node.target)]
        if isinstance(part, _CONVS) and part.groups == 1:
            return "conv"
        if isinstance(part, nn.Linear):
            return "linear" if _is_flat(node.all_input_nodes[0], parts) else ""
        if isinstance(part, NORMS):
            return "norm"
        if isinstance(part, nn.Flatten):
            return "same" if _is_flat(node, parts) else ""
        return "same" if isinstance(part, _ZERO_STAYS) or type(part).__name__.startswith(_SPATIAL) else ""
    if _is_flat(node, parts):
        return "same"
    one_by_one = node.op == "call_function" and node.target in (*_SUMS, *_FUNCTIONS)
    tensors = all(hasattr(argument, "op") for argument in node.args[: 2 if node.target in _SUMS else 1])
    return "same" if one_by_one and tensors else ""


def _is_flat(node: Any, parts: Mapping[str, nn.Module]) -> bool:
    """Whether the node gives (N, channels): the flattened output of a pooling to one pixel."""
    if node.op == "call_module" and isinstance(parts[str(node.target)], nn.Flatten):
        flattens = parts[str(node.target)].start_dim == 1
    else:
        flattens = node.target in ("flatten", torch.flatten) and tuple(node.args[1:]) == (1,) and not node.kwargs
    source = node.all_input_nodes[0] if flattens and node.all_input_nodes else None
    pool = parts.get(str(source.target)) if source is not None and source.op == "call_module" else None
    return isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))


def _widths(
    traced: Any, parts: Mapping[str, nn.Module], root: Callable[[Any], Any], told: Sequence[dict], fixed: set[Any]
) -> list[Width]:
    groups: dict[Any, list[set[str]]] = {}
    for place, table in enumerate(told):
        for node, names in table.items():
            groups.setdefault(root(node), [set(), set(), set()])[place] |= names
    order = {str(node.target): i for i, node in enumerate(traced.nodes) if node.op == "call_module"}
    found = []
    for group, (writers, norms, readers) in groups.items():
        if group in fixed or not writers or not readers:
            continue
        names = [tuple(sorted(part, key=lambda name: order[name])) for part in (writers, norms, readers)]
        full = int(parts[names[0][0]].out_channels)  # type: ignore[arg-type]
        found.append(Width(names[0][0], names[0], names[1], names[2], full))
    return sorted(found, key=lambda width: order[width.name])
