"""Instance normalization (Ulyanov et al., 2016, arXiv:1607.08022) written out as means, a difference, a root.

Exact up to rounding. For runtimes that have no such operation, run it slowly (NVIDIA/TensorRT#3962) or change its
epsilon (#260). In FP16 the variance has to stay in FP32: see `fp16_lint`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _normal, _program

KIND = "cure"
REMOVES = ("InstanceNormalization", "instance_norm")
RUNTIMES: tuple[str, ...] = ()


def decompose_instance_norm(model: onnx.ModelProto) -> dict[str, str]:
    """InstanceNormalization -> ReduceMean, Sub, Mul, Add, Sqrt, Div, scale and shift."""
    return _net.each(model, ("InstanceNormalization",), _decompose)


def _decompose(net: _net.Net, node: onnx.NodeProto) -> str:
    rank = len(net.shape(node.input[0]))
    if rank < 3 or not net.is_float(node.input[0]):
        return ""
    chain = _net.Chain(net, node)
    done = _normal.write(chain, node.input[0], tuple(range(2, rank)), _net.attributes(node).get("epsilon", 1e-5))
    shape = chain.const("channels", [1, -1, *[1] * (rank - 2)])
    for kind, name, nothing in (("Mul", node.input[1], 1), ("Add", node.input[2], 0)):
        value = net.constant(name)
        if value is None or np.any(value != nothing):
            column = chain.then("Reshape", name, shape) if value is None else chain.const(
                kind.lower(), value.reshape(1, -1, *[1] * (rank - 2))
            )  # fmt: skip
            done = chain.then(kind, done, column)
    chain.finish()
    return "instance normalization -> means, difference, root"


def program_decompose_instance_norm(network: Any) -> dict[str, str]:
    """The same on a torch program, where statistics are those of the input."""
    return _program.swap(network, ("aten.instance_norm",), _written_out, _applies)


def _applies(node: Any) -> str:
    uses_input = bool(_program.argument(node, 5, "use_input_stats", True))
    return "instance normalization -> means, difference, root" if uses_input else ""


def _written_out(x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    out = centred / ((centred * centred).mean(axes, keepdim=True) + rest[2]).sqrt()
    shape = (1, -1, *[1] * len(axes))
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)
