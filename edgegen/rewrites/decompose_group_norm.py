"""Group normalization (Wu and He, 2018, arXiv:1803.08494) as an instance normalization of the groups, scale and shift.

(N, C, H, W) is read as (N, groups, C / groups * H * W); every group is then one instance. Exact up to rounding. For
runtimes without GroupNormalization (ONNX opset 18): all have InstanceNormalization, or its primitives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("GroupNormalization", "group_norm")
RUNTIMES: tuple[str, ...] = ()
_PER_CHANNEL = 21  # before this opset scale and bias were those of the groups; ONNX has withdrawn that form


def decompose_group_norm(model: onnx.ModelProto) -> dict[str, str]:
    """GroupNormalization -> Reshape, InstanceNormalization, Reshape, Mul, Add."""
    return _net.each(model, ("GroupNormalization",), _decompose)


def _decompose(net: _net.Net, node: onnx.NodeProto) -> str:
    shape, found = net.shape(node.input[0]), _net.attributes(node)
    values = [value for value in map(net.constant, node.input[1:3]) if value is not None]
    known = len(shape) >= 3 and net.opset >= _PER_CHANNEL and net.is_float(node.input[0])
    if not known or len(values) != 2:
        return ""
    groups = found["num_groups"]
    chain = _net.Chain(net, node)
    grouped = chain.then("Reshape", node.input[0], chain.const("groups", [shape[0], groups, -1]))
    ones = chain.const("ones", np.ones(groups, np.float32))
    zeros = chain.const("zeros", np.zeros(groups, np.float32))
    epsilon = found.get("epsilon", 1e-5)
    normal = chain.then("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    done = chain.then("Reshape", normal, chain.const("shape", list(shape)))
    for kind, value in zip(("Mul", "Add"), values):
        done = chain.then(kind, done, chain.const(kind.lower(), value.reshape(-1, *[1] * (len(shape) - 2))))
    chain.finish()
    return f"group normalization -> instance normalization of {groups} groups"


def program_decompose_group_norm(network: Any) -> dict[str, str]:
    """Group normalization of a torch program -> means over reshaped groups, scale, shift."""
    text = "group normalization -> means of reshaped groups"
    return _program.swap(network, ("aten.group_norm",), _written_out, lambda node: text)


def _written_out(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Any:
    parts = x.reshape(x.shape[0], groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    out = centred / ((centred * centred).mean(2, keepdim=True) + eps).sqrt()
    shape = (1, -1, *[1] * (x.dim() - 2))
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)
