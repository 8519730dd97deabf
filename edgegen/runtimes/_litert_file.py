"""Read a .tflite file: operations, tensor types, MACs, transposes. Nothing here trusts what was asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLOAT = "~float"  # in a tensor's name: part of a normalisation or a fixed filter, never quantized
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL", "CONV_3D")
_WEIGHT = {"TRANSPOSE_CONV": 1, "BATCH_MATMUL": 1}
# Names that the quantizer gives to operations where they differ from the schema's.
_QUANTIZER = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}
# Computed or moved in INT8 between layers, so that a chain need not go back to float. Softmax, roots and divisions are
# absent: they lose too much in 8 bits.
_BETWEEN = frozenset(
    ("ADD", "SUB", "MUL", "CONCATENATION", "RESHAPE", "TRANSPOSE", "PAD", "PADV2", "MIRROR_PAD", "SLICE", "SPLIT",
     "STRIDED_SLICE", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "GATHER",
     "LOGISTIC", "TANH", "RELU", "HARD_SWISH", "MAXIMUM", "PACK", "UNPACK", "SPACE_TO_DEPTH", "GELU")
)  # fmt: skip
_NUMPY = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32}


@dataclass(frozen=True)
class Tensor:
    """One tensor; `data` is what the file holds of it, empty for a computed one."""

    index: int
    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def constant(self) -> bool:
        """Whether the file holds its values."""
        return self.data.size > 0


@dataclass(frozen=True)
class Op:
    """One operation; None stands for an input that is not given."""

    kind: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any


@functools.cache
def _names(kind: str) -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(getattr(schema, kind)).items() if not name.startswith("_")}


def read(content: bytes | Path) -> tuple[Op, ...]:
    """Operations of the file's (first) graph, in the order of execution."""
    from ai_edge_litert import schema_py_generated as schema

    raw = content.read_bytes() if isinstance(content, Path) else content
    model = schema.Model.GetRootAs(raw, 0)
    graph = model.Subgraphs(0)
    tensors = [_tensor(raw, model, graph, i) for i in range(graph.TensorsLength())]
    found = []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex())
        kind = _names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        inputs = tuple(tensors[j] if j >= 0 else None for j in op.InputsAsNumpy())
        outputs = tuple(tensors[j] for j in op.OutputsAsNumpy())
        found.append(Op(kind, code.Version(), inputs, outputs, op))
    return tuple(found)


def _tensor(raw: bytes, model: Any, graph: Any, index: int) -> Tensor:
    tensor = graph.Tensors(index)
    kind = _names("TensorType")[tensor.Type()]
    held = _bytes(raw, model.Buffers(tensor.Buffer()))
    data = held.view(_NUMPY[kind]) if held.size and kind in _NUMPY else held
    shape = tuple(int(d) for d in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
    return Tensor(index, tensor.Name().decode(), kind, shape, data)


def _bytes(content: bytes, buffer: Any) -> np.ndarray:
    """A buffer's values: inside the flatbuffer, or behind it, as the quantizer writes larger files."""
    if buffer is None:
        return np.zeros(0, np.uint8)
    if buffer.Offset() > 1:
        return np.frombuffer(content, np.uint8, buffer.Size(), buffer.Offset())
    return buffer.DataAsNumpy() if buffer.DataLength() else np.zeros(0, np.uint8)


def macs(op: Op) -> int:
    """Multiply-accumulates of one operation; 0 for what has none."""
    if op.kind not in WEIGHTED:
        return 0
    weight, out = op.inputs[1], math.prod(op.outputs[0].shape)
    if weight is None:
        return 0
    shape = weight.shape
    if op.kind == "TRANSPOSE_CONV":  # (out, h, w, in): each input value meets the whole kernel
        source = op.inputs[2]
        return math.prod(source.shape if source else ()) * math.prod(shape[:3])
    if op.kind == "CONV_3D":
        return out * math.prod(shape[:4])
    if op.kind == "BATCH_MATMUL":
        first = op.inputs[0]
        return out * (first.shape[-1] if first else 0)
    return out * (math.prod(shape[1:3]) if op.kind == "DEPTHWISE_CONV_2D" else math.prod(shape[1:]))


def transposes(ops: Iterable[Op]) -> int:
    """How many operations only move data to another layout."""
    return sum(op.kind == "TRANSPOSE" for op in ops)


def _bare(name: str) -> str:
    """A location without the converter's numbers: `body.0/Conv;2` is `body.0/Conv`."""
    return name.partition(";")[0]


def _given(op: Op) -> list[Tensor]:
    return [tensor for tensor in op.inputs if tensor is not None]


def layers(content: bytes, known: Iterable[str]) -> dict[str, str]:
    """Output tensor of each weighted operation -> the layer that it came from, as far as its tensors' names tell.

    A convolution that swallowed an activation bears the activation's name; its weights keep the layer's.
    """
    names, found = set(known), {}
    for op in read(content):
        if op.kind in WEIGHTED:
            candidates = [tensor.name for tensor in (*_given(op)[1:], *op.outputs)]
            parts = [part for name in candidates for part in name.split(";")]
            if layer := next((part for part in parts if part in names), ""):
                found[op.outputs[0].name] = layer
    return found


def weights(content: bytes) -> Iterator[Tensor]:
    """Constant weights of weighted operations."""
    for op in read(content):
        if op.kind in WEIGHTED and (weight := op.inputs[1]) is not None and weight.constant:
            yield weight


def activations(content: bytes) -> list[tuple[int, str]]:
    """Index and name of every computed float tensor, and of the inputs."""
    found = {
        (tensor.index, tensor.name): None
        for op in read(content)
        for tensor in (*_given(op), *op.outputs)
        if tensor.type == "FLOAT32" and not tensor.constant and 0 not in tensor.shape
    }
    return list(found)


def scopes(content: bytes) -> list[str]:
    """What the quantizer's patterns are matched with: the names of each operation's outputs."""
    return [";".join(tensor.name for tensor in op.outputs) for op in read(content)]


def quantizable(content: bytes, layer_of: Mapping[str, str], kept: set[str]) -> list[tuple[str, str]]:
    """(scope, quantizer's name of the operation) of what goes to INT8.

    Layers that are not kept in float, and what lies between them where every computed input comes from an INT8 one.
    """
    chosen: list[tuple[str, str]] = []
    carried: set[int] = set()
    for op in read(content):
        scope = ";".join(tensor.name for tensor in op.outputs)
        computed = [tensor for tensor in _given(op) if not tensor.constant and tensor.type == "FLOAT32"]
        weight = op.inputs[1] if len(op.inputs) > 1 else None
        if FLOAT in scope or layer_of.get(op.outputs[0].name) in kept or not computed:
            continue
        core = op.kind in WEIGHTED and op.kind != "CONV_3D"
        core = core and weight is not None and (weight.constant or op.kind == "BATCH_MATMUL")
        if core or (op.kind in _BETWEEN and all(tensor.index in carried for tensor in computed)):
            chosen.append((scope, _QUANTIZER.get(op.kind, op.kind)))
            carried.update(tensor.index for tensor in op.outputs)
    return chosen


@dataclass(frozen=True)
class Found:
    """What a file holds: precision of each operation with weights, and shares by bytes and by MACs."""

    precisions: Mapping[str, str]
    int8_weight_share: float
    int8_macs_share: float
    macs: Mapping[str, int]


def precisions(content: bytes | Path) -> Found:
    """Precision of each weighted operation, by the name of its output tensor, read from tensor types.

    INT8 needs INT8 data, INT8 weights and an INT8 result; weights that are widened before use are "int8 weights, fp32".
    """
    ops = read(content)
    made_by = {tensor.index: op for op in ops for tensor in op.outputs}
    got: dict[str, str] = {}
    cost: dict[str, int] = {}
    stored, small = 0, 0
    for op in ops:
        if op.kind not in WEIGHTED:
            continue
        source = op.inputs[2] if op.kind == "TRANSPOSE_CONV" else op.inputs[0]
        weight, name = op.inputs[1], op.outputs[0].name
        types = {tensor.type for tensor in (source, weight, op.outputs[0]) if tensor is not None}
        cost[name] = macs(op)
        got[name] = "int8" if types == {"INT8"} else "fp32"
        origin = made_by.get(weight.index) if weight is not None else None
        if origin is not None and origin.kind == "DEQUANTIZE" and (inner := origin.inputs[0]) and inner.constant:
            weight = inner
            got[name] = {"INT8": "int8 weights, fp32", "FLOAT16": "fp16 weights, fp32"}.get(inner.type, got[name])
        elif weight is not None and weight.type == "INT8" and types != {"INT8"}:
            got[name] = "int8 weights, fp32"
        if weight is not None and weight.constant:
            stored += weight.data.nbytes
            small += weight.data.nbytes if weight.type == "INT8" else 0
    total = sum(cost.values())
    integer = sum(cost[name] for name, precision in got.items() if precision == "int8")
    return Found(got, small / max(1, stored), integer / max(1, total), cost)
