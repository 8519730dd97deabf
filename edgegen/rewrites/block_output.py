"""A convolution to few channels computes b x b neighbouring pixels as channels, followed by DepthToSpace.

An RGB image fills 3 of a register's 16 lanes. The kernel is shifted once for each of the b x b pixels, at stride b:
more MACs, all lanes. Exact up to the order of sums. An offer for every runtime: it has to be timed. Names are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgegen.rewrites import _net

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()
_FEW = 4  # output channels


def block_output(model: onnx.ModelProto, *, block: int = 2) -> dict[str, str]:
    """Convolution to at most 4 channels -> the same at stride `block` to block^2 times as many, DepthToSpace. In place.

    Only where the output's height and width (static) divide by `block`.
    """
    return _net.each(model, ("Conv",), lambda net, conv: _block(net, conv, block))


def _block(net: _net.Net, conv: onnx.NodeProto, block: int) -> str:
    weight, found, shape = net.constant(conv.input[1]), _net.plain(conv), net.shape(conv.output[0])
    bias = net.constant(conv.input[2]) if len(conv.input) > 2 else None
    if weight is None or found is None or (len(conv.input) > 2 and bias is None):
        return ""
    outputs, inputs, height, width = weight.shape
    divides = len(shape) == 4 and all(size % block == 0 for size in shape[2:])
    if outputs > _FEW or height * width == 1 or not divides:
        return ""
    wide = np.zeros((block, block, outputs, inputs, height + block - 1, width + block - 1), weight.dtype)
    for dy in range(block):
        for dx in range(block):
            wide[dy, dx, :, :, dy : dy + height, dx : dx + width] = weight
    blocked = net.fresh(f"{conv.output[0]}.blocked")
    names = [conv.input[0], net.add(f"{conv.input[1]}.blocked", wide.reshape(-1, *wide.shape[3:]))]
    if bias is not None:
        names.append(net.add(f"{conv.input[2]}.blocked", np.tile(bias, block * block)))
    options: dict[str, Any] = {"kernel_shape": list(wide.shape[4:]), "strides": [block, block], "pads": found["pads"]}
    spread = helper.make_node(
        "DepthToSpace", [blocked], list(conv.output), f"{conv.name}/DepthToSpace", blocksize=block, mode="DCR"
    )
    net.swap(conv, [helper.make_node("Conv", names, [blocked], conv.name, **options), spread])
    return f"{outputs} channels -> {block}x{block} pixels at once as {outputs * block * block} channels"
