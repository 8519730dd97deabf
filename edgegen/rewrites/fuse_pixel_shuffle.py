"""Reshape, transpose, reshape that shuffle pixels (Shi et al., 2016, arXiv:1609.05158) as DepthToSpace or SpaceToDepth.

What is meant is seen by moving the numbers 0, 1, 2 ... through the three operations, so any way to write it is found.
torch's unshuffle orders channels otherwise than SpaceToDepth: the order goes into the weights of the convolution behind
it, or a Gather. Exact: elements are moved. An offer: one kernel instead of a transpose of six axes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from edgegen.rewrites import _net

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()


def fuse_pixel_shuffle(model: onnx.ModelProto) -> dict[str, str]:
    """Reshape, Transpose, Reshape -> DepthToSpace, SpaceToDepth, or SpaceToDepth with its channels in torch's order."""
    return _net.each(model, ("Reshape",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    turn = net.maker(node.input[0], "Transpose")
    split = net.maker(turn.input[0], "Reshape") if turn is not None else None
    if turn is None or split is None or split.input[0] in net.constants:
        return ""
    shape, parts, out = net.shape(split.input[0]), net.shape(split.output[0]), net.shape(node.output[0])
    if len(shape) != 4 or len(out) != 4 or not parts or shape[0] != out[0]:
        return ""
    perm = _net.attributes(turn).get("perm", list(range(len(parts)))[::-1])
    block = max(out[2] // max(1, shape[2]), shape[2] // max(1, out[2]))
    if block < 2 or shape[1] * shape[2] * shape[3] == 0:
        return ""
    numbers = np.arange(np.prod(shape)).reshape(shape)
    moved = numbers.reshape(parts).transpose(perm).reshape(out)
    if out[2] > shape[2]:
        return _enlarge(net, node, split, block, numbers, moved)
    return _reduce(net, node, split, block, numbers, moved)


def _enlarge(
    net: _net.Net, node: onnx.NodeProto, split: onnx.NodeProto, block: int, numbers: np.ndarray, moved: np.ndarray
) -> str:
    n, c, h, w = numbers.shape
    if moved.shape != (n, c // block**2, h * block, w * block) or c % block**2:
        return ""
    small = c // block**2
    forms = {
        "CRD": numbers.reshape(n, small, block, block, h, w).transpose(0, 1, 4, 2, 5, 3),
        "DCR": numbers.reshape(n, block, block, small, h, w).transpose(0, 3, 4, 1, 5, 2),
    }
    for mode, form in forms.items():
        if np.array_equal(form.reshape(moved.shape), moved):
            chain = _net.Chain(net, node)
            chain.then("DepthToSpace", split.input[0], blocksize=block, mode=mode)
            chain.finish()
            return f"reshape, transpose, reshape -> DepthToSpace by {block} ({mode})"
    return ""


def _reduce(
    net: _net.Net, node: onnx.NodeProto, split: onnx.NodeProto, block: int, numbers: np.ndarray, moved: np.ndarray
) -> str:
    n, c, h, w = numbers.shape
    if moved.shape != (n, c * block**2, h // block, w // block) or h % block or w % block:
        return ""
    form = numbers.reshape(n, c, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4).reshape(moved.shape)
    first = {int(value): i for i, value in enumerate(form[0, :, 0, 0])}  # a channel is known by its first pixel
    order = np.array([first.get(int(value), -1) for value in moved[0, :, 0, 0]])
    if order.min() < 0 or not np.array_equal(form[:, order], moved):
        return ""
    chain = _net.Chain(net, node)
    done = chain.then("SpaceToDepth", split.input[0], blocksize=block)
    if not np.array_equal(order, np.arange(len(order))) and not _into_weights(net, node, order):
        chain.then("Gather", done, chain.const("order", order.tolist()), axis=1)
    chain.finish()
    return f"reshape, transpose, reshape -> SpaceToDepth by {block}"


def _into_weights(net: _net.Net, node: onnx.NodeProto, order: np.ndarray) -> bool:
    """Let the only user, a convolution, take the channels in SpaceToDepth's order."""
    conv = net.user(node.output[0], "Conv")
    weight = net.constant(conv.input[1]) if conv is not None else None
    if conv is None or weight is None or weight.shape[1] != len(order):
        return False
    ordered = net.add(f"{conv.input[1]}.ordered", weight[:, np.argsort(order)])
    names = [conv.input[0], ordered, *conv.input[2:]]
    net.swap(conv, [helper.make_node("Conv", names, list(conv.output), conv.name, **_net.attributes(conv))])
    return True
