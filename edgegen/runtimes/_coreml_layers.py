"""Names: an operation of a torch program, which coremltools keeps, and its layer in the ONNX graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgegen import errors, onnx_files, registry
from edgegen.types import Graph

WEIGHTED = ("conv", "conv_transpose", "linear", "matmul")
_FOLDED = r"batch_norm|^aten\.(add|sub|mul|div|clone)\b|getitem"
_SUFFIX = re.compile(r"_cast_fp(16|32)$")


def layer_names(source: Any) -> dict[str, str]:
    """Name of each weighted operation of a program, which coremltools keeps, to its layer's name in the ONNX graph.

    A batch norm, a bias or a scale that coremltools folds into the operation before it gives that its own name.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for node in source.graph.nodes:
        if node.op != "call_function":
            continue
        before = [arg.name for arg in node.all_input_nodes if arg.name in found and len(arg.users) == 1]
        if made := _onnx_kind(node):
            found[node.name] = onnx_files.unique(f"{module_path(node)}/{made}", taken)
        elif len(before) == 1 and re.search(_FOLDED, str(node.target)):
            found[node.name] = found[before[0]]
    return found


def _onnx_kind(node: Any) -> str:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if name.startswith("conv_transpose") or (name == "convolution" and bool(node.args[6])):
        return "ConvTranspose"
    if re.fullmatch(r"conv[123]d|convolution", name):
        return "Conv"
    if name in ("linear", "addmm"):
        return "Gemm" if len(node.args[0].meta["val"].shape) <= 2 else "MatMul"
    return "MatMul" if name in ("matmul", "mm", "bmm", "baddbmm") else ""


def module_path(node: Any) -> str:
    """Path of the module that a node of a torch program comes from; empty for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self']").strip(".")


def kept_operations(graph: Graph, source: Any) -> frozenset[str]:
    """Operations of the program that the plan's `float_layers` and `float_types` name.

    A name of the ONNX graph that is no weighted layer stands for everything that its module computes.

    Raises:
        errors.UsageError: a name that neither the program nor the ONNX graph has.
    """
    import onnx

    layers, plan = layer_names(source), graph.plan
    weighted = set(layers.values())
    known = set(weighted)
    if plan.float_layers:
        known |= {node.name for node in onnx.load(graph.onnx, load_external_data=False).graph.node}
    for name in plan.float_layers:
        if name not in known:
            there = sorted(known)
            near = registry.near(name, there)
            raise errors.UsageError(f"unknown layer {name!r}{near}; there are: {', '.join(there)}")
    modules = {name.rpartition("/")[0] for name in plan.float_layers if name not in weighted}
    kept = {name for name, layer in layers.items() if layer in plan.float_layers}
    kept |= {name for name, layer in layers.items() if operation(layer) in plan.float_types}
    calls = [node for node in source.graph.nodes if node.op == "call_function"]
    return frozenset(kept | {node.name for node in calls if module_path(node) in modules})


def operation(layer: str) -> str:
    """ONNX operation of a layer's name: "Conv" of "head/Conv_1"."""
    return re.sub(r"_\d+$", "", layer.rpartition("/")[2])


def spellings(name: str) -> tuple[str, str]:
    """What an operation of a Core ML program can be called in the torch program: coremltools appends to names."""
    plain = _SUFFIX.sub("", name)
    return plain, re.sub(r"_0$", "", plain)


def layer_of(op: Any, layers: Mapping[str, str]) -> str:
    """The layer of an operation of a Core ML program; the operation's own name where it is none of the network's.

    coremltools names some operations anew and gives the name to what crops or scales their result.
    """
    after = [child for var in op.outputs for child in var.child_ops] if op.op_type in WEIGHTED else []
    alone = len(after) == 1 and after[0].op_type not in WEIGHTED
    for name in (op.name, *(child.name for child in after if alone)):
        for known in spellings(name):
            if known in layers:
                return layers[known]
    return str(op.name)
