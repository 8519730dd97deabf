"""Weights alone in 8 or 4 bits, arithmetic in float: smaller files, and less to read where weights are what is read.

A matrix product with a constant becomes ONNX Runtime's MatMulNBits: each row is cut into blocks of 32 weights with a
symmetric scale of their own (Dettmers et al., 2022, arXiv:2110.02861, block-wise quantization; the scale of a 4-bit
block is its largest magnitude / 8). Convolutions have no such kernel and stay as they are.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgegen import errors, onnx_cost
from edgegen.types import Inspection, PrecisionPlan

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
_OPERATION = "MatMulNBits"


def compress(model: onnx.ModelProto, plan: PrecisionPlan) -> onnx.ModelProto:
    """The model with every matrix product by a constant, at least a block deep, stored as `plan.weights` says.

    Raises:
        errors.RuntimeFailed: there is no such product; only convolutions, for instance.
    """
    quantization = _quantization()
    bits = BITS[plan.weights]
    shapes = onnx_cost.static_shapes(model)
    _gemm_to_matmul(model, shapes)
    consts = onnx_cost.constants(model)
    chosen = [
        node.name for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in consts and len(consts[node.input[1]].dims) == 2
        and consts[node.input[1]].dims[0] >= BLOCK and not _kept(node, plan)
    ]  # fmt: skip
    if not chosen:
        raise errors.RuntimeFailed(
            f"cannot build {plan.label}: no matrix product with a constant of {BLOCK} or more rows; ONNX Runtime has"
            " narrow weights for these alone: use int8 for convolutions"
        )
    config = quantization.DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, accuracy_level=1, bits=bits)
    quantizer = quantization.MatMulNBitsQuantizer(
        model, algo_config=config, nodes_to_include=chosen, bits=bits, block_size=BLOCK
    )
    quantizer.process()
    made = quantizer.model.model
    for node in made.graph.node:  # the quantizer says in the name what it did; plans and reports use the layer's
        if node.op_type == _OPERATION:
            node.name = max((name for name in chosen if node.name.startswith(name)), key=len)
            chosen.remove(node.name)
    used = {name for node in made.graph.node for name in node.input}
    for tensor in [t for t in made.graph.initializer if t.name not in used]:
        made.graph.initializer.remove(tensor)
    return made


def _quantization() -> Any:
    """ONNX Runtime's module for this; on its import it would set up the root logger, unless that has a handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        root.removeHandler(handler)


def inspect(model: onnx.ModelProto) -> Inspection:
    """Storage of each weighted layer: "fp32 (weights int4)" or "fp32". Nothing is computed in INT8."""
    layers, narrow, wide = {}, 0, 0
    consts = onnx_cost.constants(model)
    for node in model.graph.node:
        if node.op_type == _OPERATION:
            bits = next(a.i for a in node.attribute if a.name == "bits")
            layers[node.name] = f"fp32 (weights int{bits})"
            narrow += _size(consts[node.input[1]])
        elif node.op_type in onnx_cost.WEIGHTED:
            layers[node.name] = "fp32"
            wide += sum(_size(consts[name]) for name in node.input[:2] if name in consts)
    return Inspection(layers, narrow / max(1, narrow + wide), 0.0)


def _size(tensor: onnx.TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)


def _kept(node: onnx.NodeProto, plan: PrecisionPlan) -> bool:
    name = node.name
    return name in plan.float_layers or node.op_type in plan.float_types


def _gemm_to_matmul(model: onnx.ModelProto, shapes: dict[str, Any]) -> None:
    """x W + b as MatMul and Add, where nothing is scaled and x is not transposed; MatMulNBits replaces MatMul only."""
    consts, done = onnx_cost.constants(model), []
    for node in model.graph.node:
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = flags.get("alpha", 1.0) == 1.0 and flags.get("beta", 1.0) == 1.0 and not flags.get("transA")
        if node.op_type != "Gemm" or node.input[1] not in consts or not plain:
            done.append(node)
            continue
        weight = numpy_helper.to_array(consts[node.input[1]])
        weight = np.ascontiguousarray(weight.T) if flags.get("transB") else weight
        name = f"{node.name}/weight"
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
        biased = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}/product" if biased else node.output[0]
        done.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        if biased:
            done.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}/bias"))
            shape = shapes[node.output[0]]
            model.graph.value_info.append(helper.make_tensor_value_info(product, onnx.TensorProto.FLOAT, shape))
    del model.graph.node[:]
    model.graph.node.extend(done)
