"""Adaptive instance normalization (Huang and Belongie, 2017, arXiv:1703.06868) as one InstanceNormalization.

The scale and shift that the style gives become the inputs of the operation, which ONNX lets be computed; that needs
a batch of one, as they are vectors of channels. Exact up to rounding. An offer, after `fuse_instance_norm`: two passes
over the image less, where a runtime takes computed scales (ONNX Runtime and OpenVINO do).
"""

from __future__ import annotations

import numpy as np
import onnx

from edgegen.rewrites import _net

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()


def fuse_adain(model: onnx.ModelProto) -> dict[str, str]:
    """InstanceNormalization with constant scale and no shift, Mul and Add of (1, C, 1, 1) -> InstanceNormalization."""
    return _net.each(model, ("InstanceNormalization",), _fuse)


def _fuse(net: _net.Net, node: onnx.NodeProto) -> str:
    shape, scale, shift = net.shape(node.input[0]), net.constant(node.input[1]), net.constant(node.input[2])
    times = net.user(node.output[0], "Mul")
    plus = net.user(times.output[0], "Add") if times is not None else None
    if not shape or shape[0] != 1 or scale is None or shift is None or np.any(shift) or times is None or plus is None:
        return ""
    style = [_besides(times, node.output[0]), _besides(plus, times.output[0])]
    column = (1, shape[1], *[1] * (len(shape) - 2))
    if any(net.shape(name) != column or name in net.constants for name in style):
        return ""
    chain = _net.Chain(net, plus)
    flat = chain.const("flat", [-1])
    gain = chain.then("Reshape", style[0], flat)
    if np.any(scale != 1):
        gain = chain.then("Mul", gain, node.input[1])
    offset = chain.then("Reshape", style[1], flat)
    chain.name = node.name or chain.name
    epsilon = _net.attributes(node).get("epsilon", 1e-5)
    chain.then("InstanceNormalization", node.input[0], gain, offset, last=True, epsilon=epsilon)
    chain.done()
    return "scale and shift by a style -> inputs of InstanceNormalization"


def _besides(node: onnx.NodeProto, name: str) -> str:
    return node.input[1] if node.input[0] == name else node.input[0]
