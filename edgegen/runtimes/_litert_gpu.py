"""Which operations of a .tflite file LiteRT's GPU delegate takes: a prediction from the file, no measurement.

The rules are those of the delegate's own offline check, tensorflow/lite/tools/versioning/gpu_compatibility.cc
(TensorFlow 03a5e4e, `CheckGpuDelegateCompatibility`), and its limit of four dimensions. What a phone's driver does is
seen on the phone only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgegen.runtimes._litert_file import Op

SOURCE = "tensorflow/lite/tools/versioning/gpu_compatibility.cc (03a5e4e): a prediction, not a run on a GPU"
_TAKEN = frozenset(
    ("ADD", "ADD_N", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CAST", "CONCATENATION", "CONV_2D", "CUMSUM", "DENSIFY",
     "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE", "EMBEDDING_LOOKUP", "DYNAMIC_UPDATE_SLICE", "FULLY_CONNECTED",
     "GATHER", "HARD_SWISH", "LSTM", "MAX_POOL_2D", "MEAN", "MUL", "PACK", "ONE_HOT", "QUANTIZE", "RELU_N1_TO_1",
     "PRELU", "RESHAPE", "SELECT", "SELECT_V2", "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V",
     "STRIDED_SLICE", "TILE", "TRANSPOSE", "TRANSPOSE_CONV", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RELU",
     "RELU6", "LEAKY_RELU", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "SUM", "PAD", "PADV2", "MIRROR_PAD", "ABS",
     "CEIL", "COS", "ELU", "EXP", "FLOOR", "GELU", "LOG", "LOGISTIC", "NEG", "RSQRT", "SIGN", "SIN", "SQRT", "SQUARE",
     "TANH", "ATAN2", "DIV", "EQUAL", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL", "LOGICAL_AND", "LESS",
     "LESS_EQUAL", "MAXIMUM", "MINIMUM", "NOT_EQUAL", "POW", "SQUARED_DIFFERENCE", "SUB", "STABLEHLO_CLAMP")
)  # fmt: skip
_WHOLE = frozenset(("FLOAT32", "FLOAT16", "BOOL", "INT32"))  # kinds that CAST converts between
_RANK = 4


def eligibility(ops: Iterable[Op]) -> dict[str, Any]:
    """{"eligible", "refused": ["OP: why", ...], "status": "predicted", "source"}; eligible: no operation is refused."""
    refused = sorted({f"{op.kind}: {why}" for op in ops if (why := _why_not(op))})
    return {"eligible": not refused, "refused": refused, "status": "predicted", "source": SOURCE}


def _why_not(op: Op) -> str:
    """Why the delegate leaves an operation to the CPU; empty: it takes it."""
    if op.kind not in _TAKEN:
        return "no such operation on the GPU"
    tensors = [tensor for tensor in (*op.inputs, *op.outputs) if tensor is not None]
    if any(len(tensor.shape) > _RANK for tensor in tensors):
        return "more than four dimensions"
    if any(tensor.type == "INT64" for tensor in tensors):
        return "64-bit integers"
    return _RULES.get(op.kind, lambda op: "")(op)


def _depthwise(op: Op) -> str:
    source, out = op.inputs[0], op.outputs[0]
    multiplied = source is not None and source.shape[-1] not in (1, out.shape[-1])
    return "several results a channel" if multiplied else ""


def _cast(op: Op) -> str:
    kinds = {tensor.type for tensor in (*op.inputs, *op.outputs) if tensor is not None}
    fits = kinds <= _WHOLE and kinds not in ({"BOOL", "INT32"}, {"FLOAT16", "INT32"}, {"FLOAT16", "FLOAT32"})
    return "" if fits else f"from {op.inputs[0].type if op.inputs[0] else ''} to {op.outputs[0].type}"


def _mirror(op: Op) -> str:
    from ai_edge_litert import schema_py_generated as schema

    options = schema.MirrorPadOptions()
    table = op.options.BuiltinOptions()
    options.Init(table.Bytes, table.Pos)
    return "" if options.Mode() == schema.MirrorPadMode.REFLECT else "only reflection"


def _mul(op: Op) -> str:
    a, b = (tensor.shape if tensor else () for tensor in op.inputs[:2])
    mixed = len(a) == len(b) and any(x < y for x, y in zip(a, b)) and any(x > y for x, y in zip(a, b))
    return "neither factor has the result's shape" if mixed else ""


def _gather(op: Op) -> str:
    source, index = op.inputs[0], op.inputs[1]
    fits = source is not None and index is not None and source.type != "INT32" and len(index.shape) == 1
    return "" if fits else "only one list of indices, and no integers"


def _slice(op: Op) -> str:
    return "" if op.inputs[0] is not None and len(op.inputs[0].shape) in (3, 4) else "only three or four dimensions"


def _mean(op: Op) -> str:
    return "" if op.inputs[1] is not None and op.inputs[1].constant else "axes must be constant"


def _softmax(op: Op) -> str:
    from ai_edge_litert import schema_py_generated as schema

    options = schema.SoftmaxOptions()
    table = op.options.BuiltinOptions()
    options.Init(table.Bytes, table.Pos)
    return "" if options.Beta() == 1 else "beta other than 1"


_RULES = {
    "DEPTHWISE_CONV_2D": _depthwise, "CAST": _cast, "MIRROR_PAD": _mirror, "MUL": _mul, "GATHER": _gather,
    "SLICE": _slice, "STRIDED_SLICE": _slice, "MEAN": _mean, "SUM": _mean, "REDUCE_MAX": _mean, "REDUCE_MIN": _mean,
    "SOFTMAX": _softmax,
}  # fmt: skip
