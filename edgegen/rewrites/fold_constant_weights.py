"""Weights that a graph computes from constants become plain constants.

What exporters leave of weight norm, spectral norm, weight standardisation or equalised learning rates, when nothing
folded it before. Exact: the values are those that the graph would compute. For every runtime: layers whose weight is
computed are not quantized, and refused by some: coremltools 9.0 has no vdot, which spectral norm needs.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("_weight_norm", "_weight_norm_interface", "mv", "vdot")
RUNTIMES: tuple[str, ...] = ("coreml",)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOST = 2**26  # elements; a larger constant would be larger than the graph that makes it
_RANDOM = frozenset(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Dropout"))


def fold_constant_weights(model: onnx.ModelProto) -> dict[str, str]:
    """Compute the weights and biases of weighted layers that depend on constants alone."""
    return _net.each(model, _WEIGHTED, _fold)


def _fold(net: _net.Net, node: onnx.NodeProto) -> str:
    inputs, folded = list(node.input), []
    for place, name in enumerate(node.input):
        needed = _ancestors(net, name)
        if needed:
            graph = helper.make_graph(needed, "w", [], [helper.make_empty_tensor_value_info(name)])
            used = {i for n in needed for i in n.input}
            graph.initializer.extend(t for t in net.model.graph.initializer if t.name in used)
            part = helper.make_model(graph, opset_imports=net.model.opset_import, ir_version=net.model.ir_version)
            value = ReferenceEvaluator(part).run(None, {})[0]  # type: ignore[index]
            if value.size <= _MOST:
                inputs[place] = net.add(f"{name}.folded", value)
                folded.append(name)
    if not folded:
        return ""
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.input[:] = inputs
    net.swap(node, [new])
    return f"{', '.join(folded)} computed once"


def _ancestors(net: _net.Net, name: str) -> list[onnx.NodeProto]:
    """Nodes that compute a tensor from constants alone, in order; none for a constant, or what depends on an input."""
    found: dict[int, onnx.NodeProto] = {}

    def visit(tensor: str) -> bool:
        if not tensor or (tensor in net.constants and tensor not in net.makers):
            return True
        node = net.makers.get(tensor)
        if node is None or node.op_type in _RANDOM or node.domain not in ("", "ai.onnx"):
            return False
        if any(attribute.HasField("g") for attribute in node.attribute):  # branches and loops see more than inputs
            return False
        if id(node) not in found:
            if not all(visit(source) for source in node.input):
                return False
            found[id(node)] = node
        return True

    if not visit(name):
        return []
    nodes = list(found.values())
    return nodes if any(node.op_type != "Constant" for node in nodes) else []


def program_fold_constant_weights(network: Any) -> dict[str, str]:
    """Compute every node of a torch program that depends on weights and buffers alone."""
    import torch

    values: dict[Any, Any] = {}
    changed = {}
    for node in list(network.graph.nodes):
        found = _program.tensor(network, node)
        if found is not None:
            values[node] = found
        elif _is_pure(node) and all(source in values for source in node.all_input_nodes):
            with torch.no_grad():
                values[node] = node.target(*_filled(node.args, values), **_filled(node.kwargs, values))
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if node.op != "get_attr" and outside and isinstance(value, torch.Tensor) and value.numel() <= _MOST:
            node.replace_all_uses_with(_program.constant(network, node, value))
            changed[str(node.name)] = "computed once"
    return _program.finish(network, changed)


def _is_pure(node: Any) -> bool:
    """Whether a node gives the same whenever it is called with the same constants, of which it needs at least one."""
    import torch

    tags = getattr(node.target, "tags", ())
    return (
        node.op == "call_function"
        and bool(node.all_input_nodes)
        and (not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable)
        and torch.Tag.nondeterministic_seeded not in tags
    )


def _filled(arguments: Any, values: dict[Any, Any]) -> Any:
    import torch

    return torch.fx.node.map_arg(arguments, lambda node: values[node])
