"""What a saved Core ML package holds: operators, bytes by storage type, the precision of each layer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegen import errors
from edgegen.runtimes._coreml_layers import WEIGHTED, layer_of, operation
from edgegen.types import Inspection, PrecisionPlan

LAYERS = "edgegen.layers"  # key of the package's metadata: operation -> layer, as JSON
THRESHOLD = 512  # elements; below it a table or scales would outweigh what they save
_SIZES = {"fp32": 4, "fp16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Layer:
    """One weighted operation. kind: its type in the program; arithmetic: "fp16", "fp32" or "int8"; storage: of its
    weight, such as "palette4".
    """

    name: str
    arithmetic: str
    storage: str
    elements: int
    stored_bytes: int
    macs: int
    kind: str = "conv"

    @property
    def label(self) -> str:
        """What `Inspection.layers` tells."""
        plain_storage = self.storage in (self.arithmetic, "")
        return self.arithmetic if plain_storage else f"{self.arithmetic} (weights {self.storage})"


@dataclass(frozen=True)
class Contents:
    """What a saved package holds. operators: type -> count, constants left out. bytes: storage type -> byte."""

    specification: int
    operators: Mapping[str, int]
    bytes: Mapping[str, int]
    layers: tuple[Layer, ...]
    input_kind: str = "tensor"
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def inspection(self) -> Inspection:
        """The same in the words of every runtime."""
        weights = [layer for layer in self.layers if layer.elements]
        stored, macs = sum(w.stored_bytes for w in weights), sum(layer.macs for layer in self.layers)
        small = sum(w.stored_bytes for w in weights if w.storage == "int8")
        integer = sum(layer.macs for layer in self.layers if layer.arithmetic == "int8")
        return Inspection({x.name: x.label for x in self.layers}, small / max(1, stored), integer / max(1, macs))


# --------------------------------------------------------------------------------------------------------- reading


def spec_file(package: Path) -> Path:
    """The program's file inside a package."""
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def weights_folder(package: Path) -> Path:
    """The folder of a package's weights; one that has none lacks it."""
    return package / "Data" / "com.apple.CoreML" / "weights"


def read_spec(package: Path) -> Any:
    """The package's specification (protobuf)."""
    from coremltools import proto

    spec = proto.Model_pb2.Model()
    spec.ParseFromString(spec_file(package).read_bytes())
    return spec


def read_program(package: Path) -> tuple[Any, Any]:
    """(specification, PyMIL program) of a saved package.

    Raises:
        errors.RuntimeFailed: missing, damaged or cut short.
    """
    from coremltools.converters.mil.frontend.milproto.load import load
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        spec = read_spec(package)
        return spec, load(spec, spec.specificationVersion, str(weights_folder(package)))
    except (OSError, DecodeError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise errors.RuntimeFailed(f"{package.name}: not a readable Core ML package: {said}") from error


def contents(package: Path) -> Contents:
    """Read a saved package back: operators, bytes by storage type, what each weighted layer computes in.

    Raises:
        errors.RuntimeFailed: missing, damaged or cut short.
    """
    spec, program = read_program(package)
    names = json.loads(spec.description.metadata.userDefined.get(LAYERS, "{}"))
    operators, sizes, layers = Counter[str](), Counter[str](), []
    for op in program.functions["main"].operations:
        if op.op_type == "const" or op.op_type.startswith("constexpr_"):
            continue
        operators[op.op_type] += 1
        if op.op_type in WEIGHTED:
            layers.append(_layer(op, names))
        for var in _operands(op):
            kind, count = storage(var)
            sizes[kind] += count
    image = spec.description.input[0].type.WhichOneof("Type") == "imageType"
    kind = "image" if image else "tensor"
    return Contents(spec.specificationVersion, dict(operators), dict(sizes), tuple(layers), kind, names)


def _operands(op: Any) -> Iterator[Any]:
    """Constant tensors that an operation reads (numbers and flags are not tensors)."""
    for found in op.inputs.values():
        for var in found if isinstance(found, list | tuple) else (found,):
            if var is not None and var.op is not None and (var.val is not None or _compressed(var)) and var.shape:
                yield var


def _compressed(var: Any) -> bool:
    return var.op is not None and var.op.op_type.startswith("constexpr_")


def type_name(var: Any) -> str:
    """Element type of a variable, such as "fp16" or "uint4"."""
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(var.dtype))


def storage(var: Any) -> tuple[str, int]:
    """(storage type, byte) of a constant; tables and scales count."""
    elements = math.prod(int(d) for d in var.shape)
    if not _compressed(var):
        dtype = type_name(var)
        return dtype, elements * _SIZES.get(dtype, 4)
    parts = {name: v for name, v in var.op.inputs.items() if v is not None}
    table = parts.get("lut")
    if table is not None:
        size = int(table.shape[-2] if len(table.shape) > 1 else table.shape[0])
        bits = max(1, (size - 1).bit_length())
        lut = math.prod(int(d) for d in table.shape) * _SIZES.get(type_name(table), 2)
        return f"palette{bits}", -(-elements * bits // 8) + lut
    data = parts.get("data", parts.get("quantized_data"))
    kind = type_name(data) if data is not None else var.op.op_type.removeprefix("constexpr_")
    rest = [v for name, v in parts.items() if name in ("scale", "offset", "zero_point") and v is not None]
    extra = sum(math.prod(int(d) for d in v.shape) * _SIZES.get(type_name(v), 2) for v in rest)
    return kind, math.ceil(elements * (0.5 if kind.endswith("int4") else 1)) + extra


def _layer(op: Any, names: Mapping[str, str]) -> Layer:
    weight, data = weight_of(op), op.inputs["x"]
    kind, stored = storage(weight) if weight is not None else ("", 0)
    out = op.outputs[0]
    integer = kind == "int8" and data.op is not None and data.op.op_type == "dequantize"
    elements = math.prod(int(d) for d in weight.shape) if weight is not None else 0
    made = math.prod(int(d) for d in out.shape)
    if op.op_type == "conv":
        macs = made * elements // int(weight.shape[0])
    elif op.op_type == "conv_transpose":
        macs = math.prod(int(d) for d in data.shape) * elements // int(weight.shape[0])
    else:
        turned = op.inputs.get("transpose_x")
        macs = made * int(data.shape[-2 if turned is not None and turned.val else -1])
    name = layer_of(op, names)
    return Layer(name, "int8" if integer else type_name(out), kind, elements, stored, macs, op.op_type)


def weight_of(op: Any) -> Any:
    """The constant weight of a weighted operation, or None (a product of two computed tensors)."""
    for name in ("weight", "y", "x"):
        var = op.inputs.get(name)
        if var is not None and (var.val is not None or _compressed(var)):
            return var
    return None


def check(found: Contents, plan: PrecisionPlan, label: str) -> None:
    """Refuse a package whose weights or arithmetic are not what the plan promises.

    Raises:
        errors.RuntimeFailed: names the first layer that differs.
    """
    layers = [layer for layer in found.layers if not is_kept(layer.name, plan)]
    allowed = (plan.precision, plan.rest) if plan.precision == "int8" else (plan.precision,)
    for layer in layers:
        if layer.arithmetic not in allowed:
            said = f"{layer.name} computes in {layer.arithmetic}"
            raise errors.RuntimeFailed(f"{label}: promised {plan.precision}, {said}")
    large = [layer for layer in layers if layer.elements >= THRESHOLD]
    if plan.weights and not large:
        raise errors.RuntimeFailed(f"{label}: no weight has {THRESHOLD} values or more, so none is stored narrower")
    for layer in large:
        if plan.weights and layer.storage != plan.weights:
            said = f"the weight of {layer.name} is stored as {layer.storage}"
            raise errors.RuntimeFailed(f"{label}: promised {plan.weights} weights, {said}")


def is_kept(layer: str, plan: PrecisionPlan) -> bool:
    """Whether the plan keeps a layer in float."""
    return layer in plan.float_layers or operation(layer) in plan.float_types
