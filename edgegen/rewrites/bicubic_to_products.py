"""Bicubic resizing by any factor as two products with constant matrices, one for rows and one for columns.

Keys, 1981, as in `bicubic_to_convolutions`, which is faster where factors are whole: this is for the others (CrossViT
takes 240 pixels to 224), with half-pixel centres or aligned corners. A row is made of four rows; edges are repeated.
Exact up to the order of sums. Antialiased reduction is another filter and is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _bicubic, _net, _program

KIND = "cure"
REMOVES = ("Resize", "upsample_bicubic2d")
RUNTIMES: tuple[str, ...] = ("coreml",)


def bicubic_to_products(model: onnx.ModelProto) -> dict[str, str]:
    """Resize (cubic) -> MatMul, MatMul."""
    return _net.each(model, ("Resize",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    resize = _bicubic.of_node(net, node, (b"half_pixel", _bicubic.CORNERS))
    if resize is None:
        return ""
    rows, columns = matrices(resize)
    chain = _net.Chain(net, node)
    tall = chain.then("MatMul", chain.const("rows", rows), node.input[0])
    chain.then("MatMul", tall, chain.const("columns", columns))
    chain.finish()
    return f"{resize.words} -> two matrix products"


def matrices(resize: _bicubic.Resize) -> tuple[np.ndarray, np.ndarray]:
    """(height out, height in) and (width in, width out), float32: rows @ image @ columns is the resized image."""
    rows, columns = (
        weights(size, wanted, resize.corners, resize.a) for size, wanted in zip(resize.shape[2:], resize.out[2:])
    )
    return rows, np.ascontiguousarray(columns.T)


def weights(size: int, wanted: int, corners: bool, a: float) -> np.ndarray:
    """What each of `wanted` pixels takes of each of `size`: (wanted, size) float32."""
    if corners:
        places = np.arange(wanted) * ((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    else:
        places = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    found = np.zeros((wanted, size))
    for row, place in enumerate(places):
        start = int(np.floor(place))
        for tap, weight in zip(range(start - 1, start + 3), _bicubic.cubic(place - start, a)):
            found[row, min(max(tap, 0), size - 1)] += weight
    return found.astype(np.float32)


def program_bicubic_to_products(network: Any) -> dict[str, str]:
    """aten.upsample_bicubic2d of a torch program -> the same."""
    import torch

    def rewrite(node: Any, resize: _bicubic.Resize) -> str:
        known = [_program.constant(network, node, torch.from_numpy(m)) for m in matrices(resize)]
        node.target, node.args, node.kwargs = _resized, (node.args[0], *known), {}
        return f"{resize.words} -> two matrix products"

    return _bicubic.in_program(network, rewrite)


def _resized(x: Any, rows: Any, columns: Any) -> Any:
    return rows @ x @ columns
