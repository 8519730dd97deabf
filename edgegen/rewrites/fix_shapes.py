"""Dynamic shapes become the shapes that are asked for, one model for each set of them.

Every runtime of this project wants static shapes; a network for several resolutions is several files. Exact: shapes
that the graph computes are folded to numbers. `at_shapes` makes a model for each of several sets, non-square ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx

from edgegen import errors, onnx_cost, onnx_graph

KIND = "cure"
RUNTIMES: tuple[str, ...] = ()


def fix_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """Set the shapes of inputs in place, and fold what follows from them; input -> its shapes before and now.

    Args:
        shapes: input name -> shape, for the inputs to fix; None or the shapes it has already: nothing is changed.
    Raises:
        errors.ModelError: no such input, a shape that the model cannot have, or a tensor whose size still is open.
    """
    changed = {}
    inputs = {info.name: info for info in onnx_inputs(model)}
    for name, shape in (shapes or {}).items():
        if name not in inputs:
            raise errors.ModelError(f"no input {name!r}; there are: {', '.join(inputs)}")
        dims = inputs[name].type.tensor_type.shape.dim
        before = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]
        fits = len(shape) == len(before) and all(isinstance(old, str) or old == new for old, new in zip(before, shape))
        if not fits or math.prod(shape) <= 0:
            raise errors.ModelError(f"input {name!r} is {before}; it cannot be {list(shape)}")
        if before != list(shape):
            changed[name] = f"{before} -> {list(shape)}"
            for dim, size in zip(dims, shape):
                dim.dim_value = size
    if changed:
        _fold(model)
    return changed


def at_shapes(model: onnx.ModelProto, sets: Sequence[Mapping[str, Sequence[int]]]) -> list[onnx.ModelProto]:
    """One model for each set of input shapes; the given one is not changed.

    Raises:
        errors.ModelError: see `fix_shapes`.
    """
    made = []
    for shapes in sets:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        fix_shapes(copy, shapes)
        made.append(copy)
    return made


def onnx_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are no weights (before IR version 4 weights were inputs too)."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in weights]


def _fold(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        folded = onnx_graph.simplify(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise errors.ModelError(f"the model does not work at these shapes ({first})") from error
    known = onnx_cost.static_shapes(folded)
    open_ = next((node for node in folded.graph.node for name in node.output if name and name not in known), None)
    if open_ is not None and all(info.name in known for info in onnx_inputs(folded)):
        raise errors.ModelError(f"{open_.op_type} {open_.name!r}: its size still depends on the data; make it static")
    model.CopyFrom(folded)
