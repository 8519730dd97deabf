"""Make the Q/DQ nodes that edgegen inserts the ones that TensorRT wants. Each change is exact or brings back float."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgegen import onnx_cost
from edgegen.types import PrecisionPlan


def kept(model: onnx.ModelProto, plan: PrecisionPlan) -> PrecisionPlan:
    """The plan with grouped transposed convolutions left in float: no axis of their weight is the output channels."""
    grouped = [node.name for node in model.graph.node if node.op_type == "ConvTranspose"
               and any(a.name == "group" and a.i > 1 for a in node.attribute)]  # fmt: skip
    return dataclasses.replace(plan, float_layers=tuple(dict.fromkeys((*plan.float_layers, *grouped))))


def settle(model: onnx.ModelProto) -> None:
    """Let only what runs in INT8 read quantized values; the rest reads the float tensor that was quantized.

    The quantizer puts every reader of a tensor behind its Q/DQ pair. That is right for INT8 layers and for the other
    input of a sum with an INT8 layer's result, which TensorRT fuses; anywhere else it costs accuracy and a conversion.
    """
    consts = onnx_cost.constants(model)
    producers = {name: node for node in model.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    def integer(node: onnx.NodeProto | None) -> bool:
        return node is not None and node.op_type in onnx_cost.WEIGHTED and all(map(dequantized, node.input[:2]))

    for node in model.graph.node:
        if integer(node) or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type == "Add" and all(dequantized(name) or integer(producers.get(name)) for name in node.input):
            continue
        for i, name in enumerate(node.input):
            quantize = producers.get(producers[name].input[0]) if dequantized(name) else None
            if quantize is not None and quantize.input[0] not in consts:
                node.input[i] = quantize.input[0]


def pair_weights(model: onnx.ModelProto) -> None:
    """Store quantized weights as floats behind Q and DQ, as the parser of TensorRT 8 wants them.

    Exact: a float weight that is an integer times its scale is rounded back to that integer.
    """
    consts = {t.name: t for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in consts:
            stored = consts[node.input[0]]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            integers = numpy_helper.to_array(stored).astype(np.float32)
            scale = numpy_helper.to_array(consts[node.input[1]]).astype(np.float32)
            shape = [-1 if i == axis % max(1, integers.ndim) else 1 for i in range(integers.ndim)]
            values = integers * (scale.reshape(shape) if scale.size > 1 else scale)
            stored.CopyFrom(numpy_helper.from_array(values.astype(np.float32), stored.name))
            inputs, output = [stored.name, *node.input[1:]], f"{stored.name}/Q"
            nodes.append(helper.make_node("QuantizeLinear", inputs, [output], f"{node.name}/Q", axis=axis))
            node.input[0] = output
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
