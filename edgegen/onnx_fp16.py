"""FP16 weights and arithmetic baked into an ONNX file, with FP32 inputs and outputs.

TensorRT 11 is strongly typed only, so precision has to be in the file. Sums of squares overflow FP16 (the largest
value is 65,504), so normalisation, softmax and whatever looks like a variance stay in FP32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from edgegen import errors, onnx_files
from edgegen.types import Graph, PrecisionPlan

KEPT_FP32 = (
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "BatchNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
    "Exp",
    "Log",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
)
FP16_MAX = 65504.0
_FIRST_FP16_QDQ = 19  # before this opset QuantizeLinear takes float32 only


def to_fp16(graph: Graph, out: Path) -> Graph:
    """Write the graph with FP16 weights and arithmetic; inputs and outputs stay FP32 (casts at the border).

    `graph.plan.float_layers` and `float_types` are left in FP32 as well. A graph with Q/DQ nodes keeps them: scales
    become FP16 and the rest of the graph with them (the operator set is raised to 19, which allows it).

    Raises:
        errors.ModelError: a weight is too large for FP16; names it.
    """
    from onnxruntime.transformers import float16

    model = onnx.load(graph.onnx)
    _check_range(model, graph.stage)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized and _opset(model) < _FIRST_FP16_QDQ:
        model = onnx.version_converter.convert_version(model, _FIRST_FP16_QDQ)
    plan = graph.plan if not quantized else dataclasses.replace(graph.plan, float_layers=(), float_types=())
    blocked = {*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_FP32, *plan.float_types}
    half = float16.convert_float_to_float16(
        model, keep_io_types=True, op_block_list=sorted(blocked), node_block_list=list(plan.float_layers)
    )
    sha256 = onnx_files.write(onnx_files.tidy(half), out)
    plan = dataclasses.replace(graph.plan, rest="fp16") if quantized else PrecisionPlan("fp16")
    return dataclasses.replace(graph, onnx=out, plan=plan, sha256=sha256)


def _opset(model: onnx.ModelProto) -> int:
    return max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _check_range(model: onnx.ModelProto, stage: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        peak = float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0))
        if not peak <= FP16_MAX:
            raise errors.ModelError(
                f"{stage}: weight {tensor.name!r} reaches {peak:.3g}, FP16 ends at {FP16_MAX:g}; use bf16 or fp32"
            )
