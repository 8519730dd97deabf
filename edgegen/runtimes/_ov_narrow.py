"""INT8 weights of an OpenVINO model on a grid of our own, with 15 levels (stored in 4 bits) or with 7 bits.

OpenVINO's integer kernels take INT8: an INT4 constant converted straight to float would run in float (2026.4.1), so a
Convert to INT8, which is folded when the model is compiled, comes behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    able = onnx_qdq.quantized_nodes(source, plan, placement="openvino")
    nodes = [name for name in able if name not in plan.eight_bits]
    return _integers(source, nodes, onnx_narrow.snap(source, nodes), onnx_narrow.LEVELS)


def seven_bits(source: onnx.ModelProto, plan: PrecisionPlan) -> Levels:
    """Integers of 7 bits for the weights of what the plan makes INT8; the step is the largest of a channel / 64.

    NNCF's half range puts the largest at 63.5 steps: weights that a pass put on the grid would leave it.
    """
    nodes, consts = onnx_qdq.quantized_nodes(source, plan, placement="openvino"), constants(source)
    found = {}
    for name, axis in onnx_narrow.axes(source, nodes, share=0.0).items():
        rows = np.moveaxis(numpy_helper.to_array(consts[name]), axis, 0)
        peak = np.abs(rows).reshape(len(rows), -1).max(axis=1)
        found[name] = (axis, np.where(peak > 0, peak, 1.0) / onnx_narrow.SEVEN_BITS)
    return _integers(source, nodes, found, onnx_narrow.SEVEN_BITS)


def _integers(
    source: onnx.ModelProto, nodes: Collection[str], found: Mapping[str, tuple[int, np.ndarray]], most: int
) -> Levels:
    """Node -> its weight's integers, at most `most`, and steps; found: weight -> (axis, step of each channel)."""
    consts, told = constants(source), {}
    for node in source.graph.node:
        if node.name in nodes and len(node.input) > 1 and node.input[1] in found:
            axis, step = found[node.input[1]]
            weight = numpy_helper.to_array(consts[node.input[1]])
            wide = onnx_narrow.shaped(step, axis, weight.ndim)
            told[node.name] = (np.clip(np.rint(weight / wide), -most, most).astype(np.int8), wide)
    return told


def store(model: Any, told: Levels, kind: str = "i4") -> None:
    """Replace the INT8 constants of the named operations by ones with these integers and steps, in place.

    kind: what the file stores: i4, or i8.

    Raises:
        errors.Unsupported: i4, and none of them has an INT8 constant in the expected form.
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
        stored = ops.convert(ops.constant(levels, dtype=ov.Type.i4), "i8") if kind == "i4" else ops.constant(levels)
        value = ops.multiply(ops.convert(stored, "f32"), ops.constant(steps))
        value.set_friendly_name(scaled.get_friendly_name())
        scaled.output(0).replace(value.output(0))
        done += 1
    if not done and kind == "i4":
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
