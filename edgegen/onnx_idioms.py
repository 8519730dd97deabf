"""What torch's exporter writes in a roundabout way, as the runtimes know it. Exact: no value changes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from edgegen import onnx_files
from edgegen.onnx_cost import constants, static_shapes


def straighten(model: onnx.ModelProto) -> None:
    """Every idiom of this file, in place."""
    _order_gelu(model)
    _reshape_for_gather(model)


def _order_gelu(model: onnx.ModelProto) -> None:
    """x * (0.5 * (1 + erf)), as torch writes GELU, becomes (x * (1 + erf)) * 0.5, which ONNX Runtime knows to fuse."""
    makers = {name: node for node in model.graph.node for name in node.output}
    scalars = {t.name for t in model.graph.initializer if not t.dims}
    uses = [name for node in model.graph.node for name in node.input]
    for outer in (node for node in model.graph.node if node.op_type == "Mul"):
        for inner in (makers[name] for name in outer.input if name in makers):
            half = [name for name in inner.input if name in scalars]
            if inner.op_type != "Mul" or len(half) != 1 or uses.count(inner.output[0]) != 1:
                continue
            rest = next(name for name in inner.input if name != half[0])
            sums = makers[rest] if rest in makers and makers[rest].op_type == "Add" else None
            if sums is not None and any(name in makers and makers[name].op_type == "Erf" for name in sums.input):
                value = next(name for name in outer.input if name != inner.output[0])
                inner.input[:], outer.input[:] = [value, rest], [inner.output[0], half[0]]


def _reshape_for_gather(model: onnx.ModelProto) -> None:
    """A gather of all elements in their order is a reshape: so `as_strided` is exported where memory is contiguous."""
    found = [node for node in model.graph.node if node.op_type == "Gather" and not _attribute(node, "axis")]
    if not found:
        return
    shapes, known = static_shapes(model), constants(model)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)} | set(known)
    for node in found:
        data, indices = shapes.get(node.input[0], ()), known.get(node.input[1])
        if len(data) != 1 or indices is None or not indices.dims or np.prod(indices.dims) != data[0]:
            continue
        if np.array_equal(numpy_helper.to_array(indices).ravel(), np.arange(data[0])):
            shape = onnx_files.unique(f"{node.output[0]}_shape", taken)
            model.graph.initializer.append(numpy_helper.from_array(np.array(indices.dims, np.int64), shape))
            node.op_type, node.input[1] = "Reshape", shape
            del node.attribute[:]


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
