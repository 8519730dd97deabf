"""Means, a difference and a root over the last axis become one LayerNormalization (Ba et al., 2016, arXiv:1607.06450).

What older exporters write (ONNX had no such operation before opset 17), and hand-written norms. Exact up to rounding.
An offer: one kernel instead of seven passes; older operator sets are left.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from edgegen.rewrites import _net, _normal

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()
_FIRST_OPSET = 17


def fuse_layer_norm(model: onnx.ModelProto) -> dict[str, str]:
    """Primitives over the last axis [, constant scale and shift] -> LayerNormalization."""
    return _net.each(model, ("Div", "Mul"), _fuse)


def _fuse(net: _net.Net, node: onnx.NodeProto) -> str:
    found = _normal.find(net, node)
    shape = net.shape(found.source) if found is not None else ()
    if found is None or net.opset < _FIRST_OPSET or found.axes != (len(shape) - 1,) or not net.is_float(found.source):
        return ""
    tail = _normal.affine(net, node, (shape[-1],), 0)
    chain = _net.Chain(net, tail.node)
    chain.name = node.name or chain.name
    scale = chain.const("scale", (tail.scale / math.sqrt(found.factor)).astype(np.float32))
    inputs = [found.source, scale]
    if np.any(tail.shift != 0):
        inputs.append(chain.const("shift", tail.shift))
    chain.then("LayerNormalization", *inputs, last=True, axis=-1, epsilon=found.epsilon / found.factor)
    chain.done()
    return "means, difference, root -> LayerNormalization"
