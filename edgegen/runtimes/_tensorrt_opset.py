"""Write an ONNX graph in an older operator set, for parsers that take no newer one (TensorRT 8.2: 13, 8.5: 17).

torch's exporter starts at 18, and ONNX's own converter gives up on many graphs. Here operators that changed are
replaced by equal ones; whatever is left must fit its older definition, attribute by attribute and type by type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgegen import onnx_cost
from edgegen.types import Problem

_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
               "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
_NEWEST = 25  # of this module's knowledge; attributes are compared with what they mean there


def current(model: onnx.ModelProto) -> int:
    """The model's operator set of the standard domain."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def lower(model: onnx.ModelProto, opset: int, refused: Collection[str] = ()) -> tuple[onnx.ModelProto, list[Problem]]:
    """The same graph in `opset`, without the operators in `refused` as far as there is a replacement.

    Returns the new model, and what stands in the way: then the model is of no use.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    rewriting = _Lowering(lowered, min(opset, current(model)), frozenset(refused))
    return lowered, rewriting.run()


class _Lowering:
    """One pass over the nodes of a model, which is changed in place."""

    def __init__(self, model: onnx.ModelProto, opset: int, refused: frozenset[str]):
        self.model, self.opset, self.refused = model, opset, refused
        self.consts, self.shapes = onnx_cost.constants(model), onnx_cost.static_shapes(model)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.types = {t.name: t.data_type for t in inferred.initializer}
        for info in (*inferred.input, *inferred.output, *inferred.value_info):
            self.types[info.name] = info.type.tensor_type.elem_type
        self.made: list[onnx.NodeProto] = []

    def run(self) -> list[Problem]:
        problems = []
        for node in self.model.graph.node:
            start = len(self.made)
            adapter = _ADAPTERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if adapter is None or not adapter(self, node):
                self.made.append(node)
            for made in self.made[start:]:
                if wrong := self.misfit(made):
                    problems.append(Problem(node.op_type, node.name, wrong))
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.made]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        for entry in self.model.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = self.opset
        self.model.ir_version = min(self.model.ir_version, helper.find_min_ir_version_for(self.model.opset_import))
        return problems

    def misfit(self, node: onnx.NodeProto) -> str:
        """Why a node does not fit its definition in the operator set; empty when it does."""
        if node.domain not in ("", "ai.onnx"):
            return ""
        where = f"opset {self.opset}"
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        except onnx.defs.SchemaError:
            return f"rewrite it with operations of {where}, which has no {node.op_type}"
        for attribute in list(node.attribute):
            if attribute.name not in schema.attributes:
                if not _is_default(node.op_type, attribute):
                    return f"do without {attribute.name}, which {where} does not have"
                node.attribute.remove(attribute)
        if len(node.input) > schema.max_input:
            return f"do without its input {node.input[schema.max_input]!r}, which {where} does not have"
        for i, name in enumerate(node.input):
            formal = schema.inputs[min(i, len(schema.inputs) - 1)]
            kind = onnx.TensorProto.DataType.Name(self.types.get(name, 0)).lower()
            if name and kind != "undefined" and f"tensor({_ONNX_NAMES.get(kind, kind)})" not in formal.types:
                return f"give it no {kind}, which {node.op_type} of {where} does not take"
        return ""

    def constant(self, base: str, value: np.ndarray) -> str:
        name = f"{base}_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        self.types[name] = self.model.graph.initializer[-1].data_type
        return name

    def like(self, tensor: str, base: str, value: float) -> str:
        """A scalar of the tensor's type."""
        kind = helper.tensor_dtype_to_np_dtype(self.types.get(tensor, onnx.TensorProto.FLOAT))
        return self.constant(base, np.array(value, kind))

    def add(self, op: str, inputs: list[str], node: onnx.NodeProto, tail: str, **attributes: Any) -> str:
        """Append a node that stands for a part of `node`; tail "": it makes the node's own output."""
        output = f"{node.output[0]}/{tail}" if tail else node.output[0]
        name = f"{node.name}/{tail}" if tail else node.name
        self.made.append(helper.make_node(op, inputs, [output], name, **attributes))
        self.types[output] = self.types.get(node.output[0], self.types.get(inputs[0], 0))
        return output

    def unknown(self, op: str) -> bool:
        """Whether the parser or the operator set lacks an operator."""
        return op in self.refused or not onnx.defs.has(op, self.opset, "")


_ONNX_NAMES = {"float": "float", "float16": "float16", "bfloat16": "bfloat16", "bool": "bool"}


def _is_default(op: str, attribute: onnx.AttributeProto) -> bool:
    """Whether an attribute says what its absence means too."""
    value = helper.get_attribute_value(attribute)
    if attribute.name == "dilations":
        return all(d == 1 for d in value)
    known = onnx.defs.get_schema(op, _NEWEST, "").attributes
    default = known[attribute.name].default_value if attribute.name in known else None
    if default is None or default.type == onnx.AttributeProto.UNDEFINED:
        return False
    return bool(value == helper.get_attribute_value(default))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _reduction(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """Axes are an input from 18 on, and were an attribute before."""
    if graph.opset >= 18 or len(node.input) < 2:
        return False
    given = _attributes(node)
    axes = numpy_helper.to_array(graph.consts[node.input[1]]).tolist() if node.input[1] in graph.consts else None
    if axes is None or (not axes and given.get("noop_with_empty_axes")):
        return False  # stays as it is, and is told as a misfit
    some = {"axes": axes} if axes else {}
    graph.add(node.op_type, [node.input[0]], node, "", keepdims=given.get("keepdims", 1), **some)
    return True


def _reshape(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """`allowzero` is new in 14, and says nothing where the shape holds no zero."""
    if graph.opset >= 14 or node.input[1] not in graph.consts:
        return False
    if not numpy_helper.to_array(graph.consts[node.input[1]]).all():
        return False
    graph.made.append(helper.make_node("Reshape", list(node.input), list(node.output), node.name))
    return True


def _split(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """`num_outputs` is new in 18: say the sizes instead."""
    given = _attributes(node)
    if graph.opset >= 18 or "num_outputs" not in given:
        return False
    axis = int(given.get("axis", 0))
    if any(output not in graph.shapes for output in node.output):
        return False
    sizes = graph.constant(f"{node.name}/split", np.array([graph.shapes[o][axis] for o in node.output], np.int64))
    graph.made.append(helper.make_node("Split", [node.input[0], sizes], list(node.output), node.name, axis=axis))
    return True


def _pad(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """The axes to pad are an input from 18 on: say zero for the other axes instead."""
    if graph.opset >= 18 or len(node.input) < 4 or not node.input[3]:
        return False
    names = (node.input[1], node.input[3])
    if node.input[0] not in graph.shapes or any(name not in graph.consts for name in names):
        return False
    pads, axes = (numpy_helper.to_array(graph.consts[name]) for name in names)
    rank = len(graph.shapes[node.input[0]])
    whole = np.zeros((2, rank), np.int64)
    whole[:, [int(axis) % rank for axis in axes]] = pads.reshape(2, -1)
    inputs = [node.input[0], graph.constant(f"{node.name}/pads", whole.ravel())]
    inputs += [node.input[2]] if node.input[2] else []
    graph.made.append(helper.make_node("Pad", inputs, list(node.output), node.name, **_attributes(node)))
    return True


def _layer_norm(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """(x - mean) / sqrt(mean of squares + epsilon) * scale + bias, over the last axes."""
    if not graph.unknown("LayerNormalization") or len([name for name in node.output if name]) > 1:
        return False
    if node.input[0] not in graph.shapes:
        return False
    given, x, rank = _attributes(node), node.input[0], len(graph.shapes[node.input[0]])
    axes = list(range(int(given.get("axis", -1)) % rank, rank))

    def mean(tensor: str, tail: str) -> str:
        if graph.opset < 18:
            return graph.add("ReduceMean", [tensor], node, tail, axes=axes, keepdims=1)
        return graph.add("ReduceMean", [tensor, graph.constant(f"{node.name}/axes", np.array(axes))], node, tail)

    centred = graph.add("Sub", [x, mean(x, "mean")], node, "centred")
    variance = mean(graph.add("Mul", [centred, centred], node, "squared"), "variance")
    epsilon = graph.like(x, f"{node.name}/epsilon", float(given.get("epsilon", 1e-5)))
    root = graph.add("Sqrt", [graph.add("Add", [variance, epsilon], node, "sum")], node, "root")
    normal = graph.add("Div", [centred, root], node, "normal")
    bias = node.input[2] if len(node.input) > 2 else ""
    scaled = graph.add("Mul", [normal, node.input[1]], node, "scaled" if bias else "")
    if bias:
        graph.add("Add", [scaled, bias], node, "")
    return True


def _hard_swish(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """x * clip(x / 6 + 1/2, 0, 1)."""
    if not graph.unknown("HardSwish"):
        return False
    gate = graph.add("HardSigmoid", [node.input[0]], node, "gate", alpha=1 / 6, beta=0.5)
    graph.add("Mul", [node.input[0], gate], node, "")
    return True


def _reciprocal(graph: _Lowering, node: onnx.NodeProto) -> bool:
    if not graph.unknown("Reciprocal"):
        return False
    graph.add("Div", [graph.like(node.input[0], f"{node.name}/one", 1.0), node.input[0]], node, "")
    return True


def _mish(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """x * tanh(softplus(x))."""
    if not graph.unknown("Mish"):
        return False
    gate = graph.add("Tanh", [graph.add("Softplus", [node.input[0]], node, "softplus")], node, "gate")
    graph.add("Mul", [node.input[0], gate], node, "")
    return True


def _gelu(graph: _Lowering, node: onnx.NodeProto) -> bool:
    """x / 2 * (1 + erf(x / sqrt 2)), or with tanh(sqrt(2 / pi) (x + 0.044715 x^3)) instead of erf."""
    if not graph.unknown("Gelu"):
        return False
    x, name = node.input[0], node.name
    if _attributes(node).get("approximate", b"none") == b"tanh":
        cube = graph.add("Mul", [graph.add("Mul", [x, x], node, "square"), x], node, "cube")
        small = graph.add("Mul", [cube, graph.like(x, f"{name}/small", 0.044715)], node, "small")
        inner = graph.add("Add", [x, small], node, "inner")
        inner = graph.add("Mul", [inner, graph.like(x, f"{name}/root", math.sqrt(2 / math.pi))], node, "scaled")
        gate = graph.add("Tanh", [inner], node, "gate")
    else:
        gate = graph.add("Erf", [graph.add("Div", [x, graph.like(x, f"{name}/root", math.sqrt(2))], node, "inner")],
                         node, "gate")
    gate = graph.add("Add", [gate, graph.like(x, f"{name}/one", 1.0)], node, "raised")
    half = graph.add("Mul", [x, graph.like(x, f"{name}/half", 0.5)], node, "half")
    graph.add("Mul", [half, gate], node, "")
    return True


_ADAPTERS: dict[str, Callable[[_Lowering, onnx.NodeProto], bool]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Reshape": _reshape, "Split": _split, "Pad": _pad, "LayerNormalization": _layer_norm, "HardSwish": _hard_swish,
    "Reciprocal": _reciprocal, "Mish": _mish, "Gelu": _gelu,
}  # fmt: skip
