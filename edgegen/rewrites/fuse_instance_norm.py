"""Means, a difference and a root over the image become one InstanceNormalization (Ulyanov et al., arXiv:1607.08022).

Networks that write AdaIN by hand divide by torch's own deviation, whose variance has n - 1 below: with f = n / (n - 1),
(x - m) / sqrt(f v + e) = (x - m) / sqrt(v + e / f) / sqrt(f), which is an instance normalization as well. Exact up to
rounding. An offer: most runtimes have a kernel for it that reads the image twice instead of five times.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from edgegen.rewrites import _net, _normal

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()


def fuse_instance_norm(model: onnx.ModelProto) -> dict[str, str]:
    """Primitives over all spatial axes [, constant scale and shift] -> InstanceNormalization."""
    return _net.each(model, ("Div", "Mul"), _fuse)


def _fuse(net: _net.Net, node: onnx.NodeProto) -> str:
    found = _normal.find(net, node)
    shape = net.shape(found.source) if found is not None else ()
    if found is None or len(shape) < 3 or found.axes != tuple(range(2, len(shape))) or not net.is_float(found.source):
        return ""
    tail = _normal.affine(net, node, (shape[1],), len(shape) - 2)
    chain = _net.Chain(net, tail.node)
    chain.name = node.name or chain.name
    scale = chain.const("scale", (tail.scale / math.sqrt(found.factor)).astype(np.float32))
    shift = chain.const("shift", tail.shift)
    chain.then(
        "InstanceNormalization", found.source, scale, shift, last=True, epsilon=found.epsilon / found.factor
    )
    chain.done()
    return "means, difference, root -> InstanceNormalization"
