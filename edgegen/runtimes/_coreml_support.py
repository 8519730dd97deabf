"""What coremltools cannot convert of a torch program, with the layer and the nearest cure."""

from __future__ import annotations

import re
from typing import Any

from edgegen import errors
from edgegen.runtimes import _coreml_build, _coreml_convert, _coreml_layers, _coreml_ops, _coreml_weights
from edgegen.runtimes import _coreml_shapes as _coreml_shapes  # fills the table of _coreml_ops
from edgegen.types import Graph, Problem, Target

_CURES = {
    "grid_sampler": "replace the sampling grid by resize, roll or a fixed warp",
    "upsample_bicubic2d": "use bilinear, or write bicubic as a fixed convolution after nearest upsampling",
    "unfold": "write it as slices and a concatenation",
    "im2col": "write it as slices and a concatenation",
    "roll": "write it as two slices and a concatenation",
    "non_zero": "keep all tokens and weigh them by the mask: its output's shape depends on values",
    "fft": "write it as a matrix product with the Fourier matrix",
}
_TOO_MANY_AXES = re.compile(r"""rank <= 5\. Layer "([^"]+)", with type "([^"]+)", outputs a rank (\d+) tensor""")
_OTHERWISE = "rewrite it with convolutions, matrix products and elementwise operations"


def problems(graph: Graph, target: Target) -> list[Problem]:
    """Operations without a converter; where there are none, what the conversion itself stumbles over."""
    if graph.program is None:
        return [Problem("graph", "", "needs the torch program: give the model as a torch network, not as .onnx")]
    os = _coreml_convert.minimum_os(target)
    source = _coreml_convert.exported(graph)
    if found := _unknown(source):
        return found
    try:
        model = _coreml_build.float_model(graph, os)
    except errors.RuntimeFailed as error:
        return [_stumbled(source, str(error))]
    with _coreml_convert.quiet():
        names = _coreml_layers.layer_names(source)
        operations = list(_coreml_weights.loaded(model).functions["main"].operations)
    said = "its numbers cannot be checked"
    return [
        Problem(op.op_type, _coreml_layers.layer_of(op, names), f"{said}: {cure(op.op_type)}")
        for op in operations
        if not _coreml_ops.known(op.op_type) and not op.op_type.startswith("const")
    ]


def _stumbled(source: Any, said: str) -> Problem:
    """What a failed conversion was at, read from its message."""
    if many := _TOO_MANY_AXES.search(said):
        name, op, rank = many.groups()
        known = {node.name: node for node in source.graph.nodes}
        node = next((known[spelt] for spelt in _coreml_layers.spellings(name) if spelt in known), None)
        layer = _coreml_layers.module_path(node) if node is not None else ""
        return Problem(op, layer or name, f"split it: at most five axes, {name} has {rank}")
    at = re.search(r" at '(\w+)'", said)
    op = at.group(1) if at else "graph"
    return Problem(op, _layer(source, op), f"{cure(op)} ({said.rpartition(': ')[2]})")


def cure(op: str) -> str:
    """The nearest rewrite of a torch operation that Core ML does not have."""
    return next((text for name, text in _CURES.items() if name in op), _OTHERWISE)


def _unknown(source: Any) -> list[Problem]:
    with _coreml_convert.quiet():
        from coremltools.converters.mil.frontend.torch import torch_op_registry

        calls = [node for node in source.graph.nodes if node.op == "call_function"]
        bare = [node for node in calls if not torch_op_registry.is_torch_fx_node_supported(node)]
    found = {(_name(node), _coreml_layers.module_path(node)) for node in bare}
    return [Problem(op, layer, cure(op)) for op, layer in sorted(found)]


def _name(node: Any) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _layer(source: Any, op: str) -> str:
    """The first module that computes a torch operation."""
    calls = (node for node in source.graph.nodes if node.op == "call_function" and _name(node) == op)
    return next((_coreml_layers.module_path(node) for node in calls), "")
