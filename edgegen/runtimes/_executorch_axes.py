"""Tensors of more axes than XNNPACK has: permutations with fewer axes, and what is left stays outside the delegate.

XNNPACK's tensors have at most six axes. ExecuTorch hands it wider ones without a word, and the file cannot be loaded
(Swin's windows, StyleSwin: batch, rows, row, columns, column, heads, channels).
"""

from __future__ import annotations

import math
from typing import Any

from edgegen.runtimes import _executorch_names

MOST = 6
RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze")


def fits(node: Any) -> bool:
    """Whether a node's outputs and inputs have no more axes than XNNPACK takes."""
    return all(len(shape) <= MOST for one in (node, *node.all_input_nodes) for shape in shapes(one))


def partitioner(**options: Any) -> Any:
    """ExecuTorch's partitioner for XNNPACK, less the operations on tensors that it cannot have."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Fitting(XnnpackPartitioner):
        def get_matched_nodes_from_configs(self, ep: Any) -> list[list[Any]]:
            return [group for group in super().get_matched_nodes_from_configs(ep) if all(map(fits, group))]

    return Fitting(**options)


def permute(build: Any, node: Any) -> Any:
    """A permutation of more than six axes with those joined that stay neighbours, and without axes of size one."""
    source, order = node.args[0], [axis % len(node.args[1]) for axis in node.args[1]]
    shape = [int(size) for size in source.meta["val"].shape]
    if len(shape) <= MOST:
        return None
    sizes, places = _joined(shape, order)
    if len(sizes) > MOST:
        return None
    narrow = build.call(build.aten.reshape.default, _origin(source), sizes)
    turned = build.call(build.aten.permute.default, narrow, places)
    return build.call(build.aten.reshape.default, turned, [shape[axis] for axis in order])


def reshape(build: Any, node: Any) -> Any:
    """A reshape of a reshape to more than six axes, without that one."""
    source = _origin(node.args[0])
    if source is node.args[0]:
        return None
    return build.call(build.aten.reshape.default, source, [int(size) for size in node.meta["val"].shape])


def _origin(node: Any) -> Any:
    """What was reshaped to a tensor of more than six axes; the node itself where it is no such reshape."""
    while _executorch_names.operator(node) in RESHAPES and any(len(shape) > MOST for shape in shapes(node)):
        node = node.args[0]
    return node


def _joined(shape: list[int], order: list[int]) -> tuple[list[int], list[int]]:
    """(sizes, order) of the same permutation with as few axes as can be."""
    kept = [axis for axis in order if shape[axis] != 1]
    place = {axis: i for i, axis in enumerate(sorted(kept))}
    runs: list[list[int]] = []  # of axes that are neighbours before and after
    for axis in kept:
        if runs and place[axis] == place[runs[-1][-1]] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    first = sorted(runs)
    return [math.prod(shape[axis] for axis in run) for run in first], [first.index(run) for run in runs]


def shapes(node: Any) -> list[Any]:
    """Shapes of the tensors that a node makes."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [tensor.shape for tensor in values if hasattr(tensor, "shape")]
