"""INT8 weights of an OpenVINO model stored in 4 bits, with a Convert to INT8 that is folded when the model is compiled.

OpenVINO's integer kernels take INT8: an INT4 constant converted straight to float would run in float (2026.4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgegen import errors, onnx_narrow, onnx_qdq
from edgegen.onnx_cost import constants
from edgegen.runtimes import _ir
from edgegen.types import PrecisionPlan

Levels = Mapping[str, tuple[np.ndarray, np.ndarray]]  # node -> (its weight's integers, steps that broadcast with them)


def snap(source: onnx.ModelProto, plan: PrecisionPlan) -> Levels:
    """Put the weights of what the plan makes INT8 on their 15 levels, in place.

    Raises:
        errors.Unsupported: no weight can be stored so.
    """
    nodes = onnx_qdq.quantized_nodes(source, plan, placement="openvino")
    found = onnx_narrow.snap(source, nodes)
    consts, told = constants(source), {}
    for node in source.graph.node:
        if node.name in nodes and len(node.input) > 1 and node.input[1] in found:
            axis, step = found[node.input[1]]
            weight = numpy_helper.to_array(consts[node.input[1]])
            wide = onnx_narrow.shaped(step, axis, weight.ndim)
            told[node.name] = (onnx_narrow.levels(weight, wide), wide)
    return told


def store(model: Any, told: Levels) -> None:
    """Replace the INT8 constants of the named operations by INT4 ones that mean the same, in place.

    Raises:
        errors.Unsupported: none of them has an INT8 constant in the expected form.
    """
    ov = _ir.openvino()
    ops, done = ov.opset13, 0
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        found = _dequantized(operation) if name in told else None
        if found is None:
            continue
        scaled, constant, scale = found
        levels, steps = told[name]
        if constant.size != levels.size or scale.size != steps.size:
            continue
        levels, steps = levels.reshape(constant.shape), steps.reshape(scale.shape).astype(np.float32)
        if np.abs(levels * steps - constant * scale).max() > np.abs(scale).max():
            continue  # another order of the weights than ONNX's: they stay as they are, and are read back so
        wide = ops.convert(ops.convert(ops.constant(levels, dtype=ov.Type.i4), "i8"), "f32")
        value = ops.multiply(wide, ops.constant(steps))
        value.set_friendly_name(scaled.get_friendly_name())
        scaled.output(0).replace(value.output(0))
        done += 1
    if not done:
        raise errors.Unsupported("OpenVINO's INT8 weights are not where 4 bits could take their place; store them in 8")


def _dequantized(operation: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """(The product of constant and scale, the INT8 constant, the scale) behind an operation's weight."""
    node = operation.input_value(1).get_node()
    while node.get_type_name() in ("Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Multiply":
        return None
    convert, scale = (node.input_value(i).get_node() for i in (0, 1))
    if convert.get_type_name() != "Convert" or scale.get_type_name() != "Constant":
        return None
    constant = convert.input_value(0).get_node()
    if constant.get_type_name() != "Constant" or constant.get_element_type().get_type_name() != "i8":
        return None
    return node, constant.data.copy(), scale.data.copy()
