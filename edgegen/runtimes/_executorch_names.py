"""Nodes of a torch program and the layers of its ONNX graph: the same layer has the same module path in both."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from edgegen import onnx_cost

_KINDS = {
    "conv1d": "Conv", "conv2d": "Conv", "conv3d": "Conv", "convolution": "Conv",
    "conv_transpose1d": "ConvTranspose", "conv_transpose2d": "ConvTranspose", "conv_transpose3d": "ConvTranspose",
    "linear": "MatMul", "addmm": "MatMul", "mm": "MatMul", "bmm": "MatMul", "matmul": "MatMul",
}  # fmt: skip


def operator(node: Any) -> str:
    """Short name of what a node calls, such as `convolution`; "" for a node that calls nothing."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten.").partition(".")[0]


def kind(node: Any) -> str:
    """Conv, ConvTranspose or MatMul; "" for an operation that carries no MACs."""
    found = _KINDS.get(operator(node), "")
    return "ConvTranspose" if operator(node) == "convolution" and node.args[6] else found


def path(node: Any) -> str:
    """Path of the module that a node belongs to; "" for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def layers(nodes: Iterable[Any], graph: Path) -> dict[Any, str]:
    """Node -> name of its ONNX layer, for nodes that carry MACs, given in program order.

    Within a module layers of one kind are paired in order; a node without a partner is `<path>/<operator>`.
    """
    waiting: dict[tuple[str, str], list[str]] = {}
    for layer in onnx_cost.cost(onnx.load(graph)).layers:
        shared = "MatMul" if layer.op == "Gemm" else layer.op
        waiting.setdefault((layer.name.rpartition("/")[0], shared), []).append(layer.name)
    named = {}
    for node in nodes:
        if kind(node):
            partners = waiting.get((path(node), kind(node)), [])
            named[node] = partners.pop(0) if partners else f"{path(node)}/{operator(node)}"
    return named
