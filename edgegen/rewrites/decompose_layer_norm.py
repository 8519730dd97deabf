"""Layer normalization (Ba et al., 2016, arXiv:1607.06450) written out as means, a difference, a root.

Exact up to rounding. For runtimes whose operator set ends before LayerNormalization (ONNX opset 17), and for those
that run it in FP16, where a variance of large activations is infinite (NVIDIA/TensorRT#1787): see `fp16_lint`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _normal, _program

KIND = "cure"
REMOVES = ("LayerNormalization", "layer_norm")
RUNTIMES: tuple[str, ...] = ()


def decompose_layer_norm(model: onnx.ModelProto) -> dict[str, str]:
    """LayerNormalization with one output -> ReduceMean, Sub, Mul, Add, Sqrt, Div, scale, shift."""
    return _net.each(model, ("LayerNormalization",), _decompose)


def _decompose(net: _net.Net, node: onnx.NodeProto) -> str:
    rank, found = len(net.shape(node.input[0])), _net.attributes(node)
    if not rank or len([name for name in node.output if name]) > 1 or not net.is_float(node.input[0]):
        return ""
    chain = _net.Chain(net, node)
    axes = tuple(range(found.get("axis", -1) % rank, rank))
    done = _normal.write(chain, node.input[0], axes, found.get("epsilon", 1e-5))
    for kind, name, nothing in zip(("Mul", "Add"), node.input[1:], (1, 0)):
        value = net.constant(name)
        if name and (value is None or np.any(value != nothing)):
            done = chain.then(kind, done, name)
    chain.finish()
    return "layer normalization -> means, difference, root"


def program_decompose_layer_norm(network: Any) -> dict[str, str]:
    """The same on a torch program."""
    text = "layer normalization -> means, difference, root"
    return _program.swap(network, ("aten.layer_norm",), _written_out, lambda node: text)


def _written_out(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Any:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred / ((centred * centred).mean(axes, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
