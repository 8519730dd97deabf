"""Weights that are stored more than once are stored once.

Exact: the same bytes. For every runtime: a tied embedding or a shared kernel is a part of the file's size twice, and a
part of the peak memory of the build.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()


def merge_duplicates(model: onnx.ModelProto) -> dict[str, str]:
    """Initializers of the same type, shape and bytes become one; dropped name -> which one stands for it."""
    graph = model.graph
    fixed = {info.name for info in (*graph.input, *graph.output)}
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        if tensor.name not in fixed and kept.setdefault(key, tensor.name) != tensor.name:
            same[tensor.name] = kept[key]
    if not same:
        return {}
    _rename(graph, same)
    left = [tensor for tensor in graph.initializer if tensor.name not in same]
    del graph.initializer[:]
    graph.initializer.extend(left)
    return {name: f"the same as {other!r}" for name, other in same.items()}


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Branches and loop bodies see the outer names too, unless they have such a name of their own."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                own = {t.name for t in inner.initializer} | {i.name for i in inner.input}
                own |= {name for other in inner.node for name in other.output}
                _rename(inner, {name: other for name, other in names.items() if name not in own})
