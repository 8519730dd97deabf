"""MACs and parameters of an ONNX file, layer by layer, from static shapes. 1 MAC = 1 multiply-accumulate = 2 FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operations that carry nearly all MACs of a vision network, and the ones that quantization is about."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of one node. `weight` names its constant second operand ("" when both operands are computed)."""

    name: str
    op: str
    macs: int
    params: int
    weight: str = ""
    output_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Cost of a graph. params: elements of all floating or integer weights, each shared tensor counted once."""

    macs: int
    params: int
    layers: tuple[LayerCost, ...]


def cost(source: Path | onnx.ModelProto) -> Cost:
    """MACs and parameters of an ONNX model with static shapes.

    Exact for Conv, ConvTranspose, Gemm and MatMul (bias additions are not counted); element-wise operations,
    normalisation and pooling count as zero MACs. Scales and zero points of Q/DQ nodes are no parameters.

    Raises:
        ValueError: a weighted layer has no static shape, or its input does not fit its weight.
    """
    model = onnx.load(source) if isinstance(source, Path) else source
    shapes, consts = static_shapes(model), constants(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    layers = tuple(_layer(node, shapes, consts, producers) for node in model.graph.node if node.op_type in WEIGHTED)
    params = sum(math.prod(consts[name].dims) for name in _weights(model) if consts[name].dims)
    return Cost(sum(layer.macs for layer in layers), params, layers)


def static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, for every tensor whose shape is known and free of symbols."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[info.name] = tuple(d.dim_value for d in dims)
    return shapes


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Tensor name -> constant, whether it is an initializer or the output of a Constant node."""
    found = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in (a for a in node.attribute if a.name == "value"):
                found[node.output[0]] = attribute.t
    return found


def weight_of(
    node: onnx.NodeProto, consts: Mapping[str, onnx.TensorProto], producers: Mapping[str, onnx.NodeProto]
) -> str:
    """Name of the constant that a weighted node multiplies with, looked up through DequantizeLinear; "" if none."""
    for name in (node.input[1], node.input[0]):
        source = name
        while source in producers and producers[source].op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
            source = producers[source].input[0]
        if source in consts:
            return source
    return ""


def _weights(model: onnx.ModelProto) -> set[str]:
    """Names of constants that hold learned numbers: floating, or integers behind a DequantizeLinear."""
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    quantizers = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    helpers = {name for node in quantizers for name in node.input[1:]}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}  # from INT4, as stored
    stored = {casts.get(node.input[0], node.input[0]) for node in quantizers}
    return {n for n, t in constants(model).items() if n not in helpers and (t.data_type in floating or n in stored)}


def _layer(
    node: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
    consts: Mapping[str, onnx.TensorProto],
    producers: Mapping[str, onnx.NodeProto],
) -> LayerCost:
    missing = [name for name in (*node.input[:2], node.output[0]) if name not in shapes]
    if missing:
        raise ValueError(
            f"{node.op_type} {node.name!r}: shape of {missing[0]!r} is not static; export with fixed shapes"
        )
    weight = weight_of(node, consts, producers)
    bias = math.prod(shapes.get(node.input[2], ())) if len(node.input) > 2 and node.input[2] else 0
    params = (math.prod(consts[weight].dims) if weight else 0) + bias
    out = shapes[node.output[0]]
    return LayerCost(node.name, node.op_type, _macs(node, shapes), params, weight, out)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first, second, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
    flags = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":  # weight (out, in / groups, k...): each output element sums in / groups * k products
        _fit(node, first[1], second[1] * flags.get("group", 1))
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight (in, out / groups, k...): each input element is spread over these
        _fit(node, first[1], second[0])
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        depth = first[0] if flags.get("transA") else first[1]
        _fit(node, depth, second[1] if flags.get("transB") else second[0])
        return math.prod(out) * depth
    _fit(node, first[-1], second[-2] if len(second) > 1 else second[0])
    return math.prod(out) * first[-1]


def _fit(node: onnx.NodeProto, got: int, wanted: int) -> None:
    """ONNX's shape inference does not compare channels."""
    if got != wanted:
        raise ValueError(f"{node.op_type} {node.name!r} takes {wanted} channels, its input has {got}")
