"""A Core ML program, read back from its file, as an ONNX model: same operations, weights as stored, FP32 arithmetic.

Core ML runs on Apple's systems only. What the file says is checked here by translating it, operation by operation, and
running that in ONNX Runtime: a converter that writes a wrong padding shows, as does a weight that lost its precision.
What does not show is FP16 arithmetic and the rounding of an image input to 8 bits; both belong to the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgegen import errors, onnx_files
from edgegen.runtimes import _coreml_ops
from edgegen.runtimes import _coreml_shapes as _coreml_shapes  # fills the table of _coreml_ops
from edgegen.runtimes._coreml_files import DIGEST
from edgegen.types import TensorSpec

OPSET = 18


class Writer:
    """Collects ONNX nodes and constants while a program is walked; a MIL variable is an ONNX tensor of its name."""

    def __init__(self, program: Any):
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.taken: set[str] = set()

    def fresh(self, base: str) -> str:
        """A tensor name that no variable of the program has."""
        return onnx_files.unique(f"{base}__twin", self.taken)

    def constant(self, value: Any, name: str | None = None) -> str:
        """Name of a constant: floats become float32, integers int64, 8-bit integers and booleans stay."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        elif array.dtype.kind in "iu" and array.dtype not in (np.int8, np.uint8):
            array = array.astype(np.int64)
        name = name or self.fresh("const")
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append one node with one output; the name of that."""
        output = output or self.fresh(kind)
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}/{kind}", **attributes))
        return output

    def add_many(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Append one node with several outputs."""
        name = f"{outputs[0]}/{kind}"
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, **attributes))

    def ref(self, var: Any) -> str:
        """Name of a variable; one with a known value becomes a constant."""
        value = constant_value(var)
        return var.name if value is None else self.constant(value, var.name)


def constant_value(var: Any) -> np.ndarray | None:
    """The value of a constant or of a compressed constant, decompressed; None for what is computed."""
    if var.val is not None:
        return np.asarray(var.val)
    if var.op is not None and var.op.op_type.startswith("constexpr_"):
        value = var.op.materialized_val_inference()
        return np.asarray(value[var.op.outputs.index(var)] if isinstance(value, tuple | list) else value)
    return None


def translate(
    program: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], pixels: Mapping[str, Any] | None
) -> onnx.ModelProto:
    """A PyMIL program as ONNX.

    Args:
        inputs, outputs: of the network; their names are those of the package.
        pixels: {"scale": (C,), "bias": (C,)} where the package takes an image: pixel = scale * network input + bias,
            which the twin does before the program, so that its feeds are network inputs; else None.
    Raises:
        errors.RuntimeFailed: the program has an operation that is not translated here.
    """
    function = program.functions["main"]
    writer = Writer(program)
    feeds = [s.name for s in inputs]
    given = list(function.inputs)
    if given != feeds:
        raise errors.RuntimeFailed(f"coreml: the package's inputs are {given}, the network's {feeds}")
    writer.taken |= {var.name for op in function.operations for var in op.outputs} | set(given)
    rename = _pixels(writer, inputs[0], pixels) if pixels else {}
    for op in function.operations:
        if op.op_type == "const" or op.op_type.startswith("constexpr_"):
            continue
        _coreml_ops.emit(writer, op)
    for node in writer.nodes[2 if pixels else 0 :]:
        node.input[:] = [rename.get(name, name) for name in node.input]
    made = [writer.ref(var) for var in function.outputs]
    if made != [spec.name for spec in outputs]:
        raise errors.RuntimeFailed(f"coreml: the package's outputs are {made}, expected {[s.name for s in outputs]}")
    given_values, made_values = (
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, [int(d) for d in s.shape]) for s in side]
        for side in (inputs, outputs)
    )
    constants = list(writer.initializers.values())
    graph = helper.make_graph(writer.nodes, "edgegen", given_values, made_values, initializer=constants)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=onnx_files.IR_VERSION, producer_name="edgegen")


def _pixels(writer: Writer, spec: TensorSpec, pixels: Mapping[str, Any]) -> dict[str, str]:
    """Two nodes that make the pixels, unrounded, of a network input; what the program reads instead of the input."""
    shape = (1, -1, 1, 1)
    scaled = writer.add("Mul", [spec.name, writer.constant(np.reshape(np.float32(pixels["scale"]), shape))])
    made = writer.add("Add", [scaled, writer.constant(np.reshape(np.float32(pixels["bias"]), shape))])
    return {spec.name: made}


def write(model: onnx.ModelProto, out: Path, digest: str) -> None:
    """Write the twin with the hash of its package in it."""
    entry = model.metadata_props.add()
    entry.key, entry.value = DIGEST, digest
    onnx_files.write(model, out)
