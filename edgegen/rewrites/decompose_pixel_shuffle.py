"""Pixel shuffle and unshuffle (Shi et al., 2016, arXiv:1609.05158) as reshape, transpose, reshape.

With batch and channels as one axis five are enough, which is what Core ML and GPU delegates take at most. Exact:
elements are moved. For runtimes without DepthToSpace, SpaceToDepth or their torch forms.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("DepthToSpace", "SpaceToDepth", "pixel_shuffle", "pixel_unshuffle")
RUNTIMES: tuple[str, ...] = ()


def decompose_pixel_shuffle(model: onnx.ModelProto) -> dict[str, str]:
    """DepthToSpace (both modes) and SpaceToDepth -> Reshape, Transpose, Reshape."""
    return _net.each(model, ("DepthToSpace", "SpaceToDepth"), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    shape, out, found = net.shape(node.input[0]), net.shape(node.output[0]), _net.attributes(node)
    if len(shape) != 4 or len(out) != 4:
        return ""
    block = found["blocksize"]
    samples, channels = shape[0], min(shape[1], out[1])
    if node.op_type == "DepthToSpace" and found.get("mode", b"DCR") == b"CRD":
        split, perm = [samples * channels, block, block, *shape[2:]], [0, 3, 1, 4, 2]
    elif node.op_type == "DepthToSpace":
        split, perm = [samples, block, block, channels, *shape[2:]], [0, 3, 4, 1, 5, 2]
    else:
        split, perm = [samples, channels, out[2], block, out[3], block], [0, 3, 5, 1, 2, 4]
    if samples == 1 and len(split) == 6:
        split, perm = split[1:], [axis - 1 for axis in perm[1:]]
    chain = _net.Chain(net, node)
    parts = chain.then("Reshape", node.input[0], chain.const("split", split))
    moved = chain.then("Transpose", parts, perm=perm)
    chain.then("Reshape", moved, chain.const("shape", list(out)))
    chain.finish()
    return f"{node.op_type} by {block} -> reshape, transpose, reshape"


def program_decompose_pixel_shuffle(network: Any) -> dict[str, str]:
    """aten.pixel_shuffle and aten.pixel_unshuffle of a torch program -> the same, on five axes."""

    def applies(node: Any) -> str:
        return f"{node.target} by {node.args[1]} -> reshape, permute, reshape" if len(_program.shape(node)) == 4 else ""

    return {
        **_program.swap(network, ("aten.pixel_shuffle",), _shuffled, applies),
        **_program.swap(network, ("aten.pixel_unshuffle",), _unshuffled, applies),
    }


def _shuffled(x: Any, block: int) -> Any:
    n, c, h, w = x.shape
    parts = x.reshape(n * c // block**2, block, block, h, w).permute(0, 3, 1, 4, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


def _unshuffled(x: Any, block: int) -> Any:
    n, c, h, w = x.shape
    parts = x.reshape(n * c, h // block, block, w // block, block).permute(0, 2, 4, 1, 3)
    return parts.reshape(n, c * block**2, h // block, w // block)
