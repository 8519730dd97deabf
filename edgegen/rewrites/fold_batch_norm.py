"""A batch norm becomes part of the convolution or linear layer before it, or else one scale and shift.

y = (Wx + b - m) / sqrt(v + eps) * g + h: W' = W g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + h. Exact up to
rounding: statistics are folded in float64. Most runtimes do it themselves; a quantizer that looks for plain layers, and
a runtime without batch norm, need it done before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("BatchNormalization", "batch_norm", "_native_batch_norm_legit_no_training")
RUNTIMES: tuple[str, ...] = ()
# aten operation -> (place of the groups, whether it is transposed); convolution itself says so in its arguments
_LAYERS = {"aten.conv1d": (6, False), "aten.conv2d": (6, False), "aten.conv3d": (6, False), "aten.linear": (9, False),
           "aten.conv_transpose1d": (6, True), "aten.conv_transpose2d": (6, True), "aten.conv_transpose3d": (6, True),
           "aten.convolution": (8, False)}  # fmt: skip


def fold_batch_norm(model: onnx.ModelProto) -> dict[str, str]:
    """BatchNormalization with constant statistics -> the Conv, ConvTranspose or Gemm before it, else Mul and Add."""
    return _net.each(model, ("BatchNormalization",), _fold)


def _fold(net: _net.Net, norm: onnx.NodeProto) -> str:
    values = [net.constant(name) for name in norm.input[1:5]]
    found = _net.attributes(norm)
    rank = len(net.shape(norm.input[0]))
    if any(v is None for v in values) or found.get("training_mode", 0) or len([o for o in norm.output if o]) > 1:
        return ""
    scale, shift = affine(*values, found.get("epsilon", 1e-5))
    layer = net.sole(norm.input[0], "Conv", "ConvTranspose", "Gemm")
    weight = net.constant(layer.input[1]) if layer is not None else None
    given = len(layer.input) > 2 and layer.input[2] if layer is not None else ""
    bias = net.constant(given) if given else np.zeros(1)
    chain = _net.Chain(net, norm)
    if layer is None or weight is None or bias is None:
        if not rank:
            return ""
        shape = (-1, *[1] * (rank - 2))
        scaled = chain.then("Mul", norm.input[0], chain.const("scale", _like(values[0], scale.reshape(shape))))
        chain.then("Add", scaled, chain.const("shift", _like(values[0], shift.reshape(shape))), last=True)
        chain.done()
        return "batch norm -> scale and shift"
    options = _net.attributes(layer)
    if layer.op_type == "Gemm":
        if options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
            return ""
        folded = weight * (scale[:, None] if options.get("transB", 0) else scale)
    else:
        folded = scaled_weight(weight, scale, options.get("group", 1), layer.op_type == "ConvTranspose")
    new = np.broadcast_to(bias.reshape(-1) * scale + shift, scale.shape)
    names = [layer.input[0], chain.const("weight", _like(weight, folded)), chain.const("bias", _like(weight, new))]
    chain.name = layer.name or chain.name
    chain.then(layer.op_type, *names, last=True, **options)
    chain.done()
    return f"batch norm folded into {layer.op_type} {layer.name!r}"


def program_fold_batch_norm(network: Any) -> dict[str, str]:
    """The same on a torch program."""
    changed = {}
    for node in list(network.graph.nodes):
        if not _program.is_call(node, "aten.batch_norm", "aten._native_batch_norm_legit_no_training"):
            continue
        plain = _program.is_call(node, "aten.batch_norm")
        if (plain and node.args[5]) or not (plain or all(_is_first(user) for user in node.users)):
            continue
        if text := _fold_node(network, node, float(node.args[7 if plain else 6]), plain):
            changed[str(node.name)] = text
    return _program.finish(network, changed)


def _fold_node(network: Any, node: Any, epsilon: float, plain: bool) -> str:
    import torch

    values = _statistics(network, node)
    if values is None:
        return ""
    scale, shift = affine(*values, epsilon)
    like = _program.tensor(network, node.args[3])

    def constant(value: np.ndarray) -> Any:
        return _program.constant(network, node, torch.from_numpy(np.ascontiguousarray(value)).to(like))

    outputs = [node] if plain else list(node.users)
    layer = node.args[0]
    found = _layer(network, layer)
    if found is None:
        rank = len(_program.shape(layer))
        if not rank:
            return ""
        shape = (-1, *[1] * (rank - 2))
        with network.graph.inserting_before(node):
            scaled = network.graph.call_function(
                torch.ops.aten.mul.Tensor, (layer, constant(scale.reshape(shape)))
            )
            result = network.graph.call_function(torch.ops.aten.add.Tensor, (scaled, constant(shift.reshape(shape))))
        text = "batch norm -> scale and shift"
    else:
        weight, bias, groups, transposed = found
        folded = scaled_weight(weight, scale, groups, transposed)
        arguments = [*layer.args[:2], None, *layer.args[3:]]
        with network.graph.inserting_before(node):
            arguments[1:3] = constant(folded), constant(bias * scale + shift)
            kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
            result = network.graph.call_function(layer.target, tuple(arguments), kwargs)
        text = f"batch norm folded into {layer.name}"
    for output in outputs:
        result.meta = dict(output.meta)
        output.replace_all_uses_with(result)
    return text


def _statistics(network: Any, node: Any) -> list[np.ndarray] | None:
    """(gain, offset, mean, variance) of a batch norm, where they are constants, else None."""
    given = [_program.tensor(network, argument) for argument in node.args[1:5]]
    if any(g is None and a is not None for g, a in zip(given, node.args[1:5])) or given[2] is None or given[3] is None:
        return None
    gain = 0 * given[2] + 1 if given[0] is None else given[0]
    offset = 0 * given[2] if given[1] is None else given[1]
    return [value.detach().double().cpu().numpy() for value in (gain, offset, *given[2:])]


def _layer(network: Any, layer: Any) -> tuple[np.ndarray, np.ndarray, int, bool] | None:
    """(weight, bias, groups, transposed) of a layer with constant weights whose only user is the batch norm."""
    name = next((name for name in _LAYERS if _program.is_call(layer, name)), "")
    if not name or len(layer.users) != 1:
        return None
    place, transposed = _LAYERS[name]
    weight = _program.tensor(network, _program.argument(layer, 1, "weight", None))
    given = _program.argument(layer, 2, "bias", None)
    bias = _program.tensor(network, given)
    if weight is None or (given is not None and bias is None) or "weight" in layer.kwargs:
        return None
    transposed = transposed or (name == "aten.convolution" and bool(layer.args[6]))
    groups = 1 if name == "aten.linear" else int(_program.argument(layer, place, "groups", 1))
    values = weight.detach().double().cpu().numpy()
    zeros = np.zeros(values.shape[1] * groups if transposed else len(values))
    return values, zeros if bias is None else bias.detach().double().cpu().numpy(), groups, transposed


def affine(*values: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) in float64 of (gain, offset, mean, variance, epsilon)."""
    gain, offset, mean, variance, epsilon = (np.asarray(value, np.float64) for value in values)
    scale = gain / np.sqrt(variance + epsilon)
    return scale, offset - mean * scale


def scaled_weight(weight: np.ndarray, scale: np.ndarray, groups: int, transposed: bool) -> np.ndarray:
    """Weights whose outputs are `scale` times as large; transposed ones are (in, out / groups, k...)."""
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    split = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return split.reshape(weight.shape)


def _is_first(node: Any) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0


def _like(model: np.ndarray | None, value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32 if model is None else model.dtype)
