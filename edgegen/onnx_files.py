"""ONNX files with the same bytes for the same graph: sorted, without marks of tools, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from edgegen import files

INLINE_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; a little room for the graph itself

IR_VERSION = 10  # newer ones add nothing that a float network needs, and runtimes of a year ago refuse them


def unique(base: str, taken: set[str]) -> str:
    """`base`, or `base_1`, `base_2` ...: the first that is not taken; it is then."""
    name = next(n for n in (base, *(f"{base}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
    taken.add(name)
    return name


def strip(model: onnx.ModelProto) -> None:
    """Remove what differs from run to run or tells about the machine: doc strings, metadata, versions of tools."""
    graph = model.graph
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "edgegen", ""
    graph.name, model.doc_string, graph.doc_string = "edgegen", "", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        if part.metadata_props:
            del part.metadata_props[:]


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Sort nodes after their inputs, drop what nothing uses, name nameless nodes, strip, infer shapes again."""
    import onnx_ir
    from onnx_ir.passes import common

    held = onnx_ir.from_proto(model)
    for step in (common.TopologicalSortPass(), common.RemoveUnusedNodesPass()):
        step(held)
    model = onnx_ir.to_proto(held)
    taken: set[str] = set()
    for node in model.graph.node:
        node.name = unique(node.name or f"{node.input[0] if node.input else ''}/{node.op_type}", taken)
    strip(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def write(model: onnx.ModelProto, out: Path) -> str:
    """Write the model, weights inline below 2 GiB, else in `<out>.data` beside it; returns the file's SHA-256.

    Raises:
        onnx.checker.ValidationError: the model is not valid ONNX (nothing is written).
    """
    with files.whole(out) as temporary:
        if model.ByteSize() < INLINE_LIMIT:
            onnx.checker.check_model(model)
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        else:
            data = f"{out.name}.data"
            onnx.save(model, temporary, save_as_external_data=True, location=data)
            onnx.checker.check_model(temporary)
            os.replace(temporary.with_name(data), out.with_name(data))
    return files.sha256(out)


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
