"""Bicubic resizing by any factor as two products with constant matrices, one for rows and one for columns.

Keys, 1981, as in `bicubic_to_convolutions`, which is faster where factors are whole: this is for the others (CrossViT
takes 240 pixels to 224), with half-pixel centres or aligned corners. An output row is four rows; edges are repeated.
Exact up to the order of sums. Antialiased reduction is another filter and is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program
from edgegen.rewrites.bicubic_to_convolutions import cubic

KIND = "cure"
REMOVES = ("Resize", "upsample_bicubic2d")
RUNTIMES: tuple[str, ...] = ("coreml",)


def bicubic_to_products(model: onnx.ModelProto) -> dict[str, str]:
    """Resize (cubic) -> MatMul, MatMul."""
    return _net.each(model, ("Resize",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    shape, out, found = net.shape(node.input[0]), net.shape(node.output[0]), _net.attributes(node)
    mode = found.get("coordinate_transformation_mode", b"half_pixel")
    plain = found.get("mode", b"nearest") == b"cubic" and mode in (b"half_pixel", b"align_corners")
    other = found.get("antialias", 0) or found.get("exclude_outside", 0) or "axes" in found
    images = len(shape) == 4 == len(out) and shape[:2] == out[:2] and net.is_float(node.input[0])
    if not plain or other or not images:
        return ""
    scales = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scales is not None and mode == b"half_pixel" and not np.allclose(scales * shape, out, rtol=0, atol=1e-3):
        return ""
    rows, columns = matrices(shape, out, mode == b"align_corners", found.get("cubic_coeff_a", -0.75))
    chain = _net.Chain(net, node)
    tall = chain.then("MatMul", chain.const("rows", rows), node.input[0])
    chain.then("MatMul", tall, chain.const("columns", columns))
    chain.finish()
    return f"bicubic {shape[2]}x{shape[3]} to {out[2]}x{out[3]} -> two matrix products"


def matrices(
    shape: tuple[int, ...], out: tuple[int, ...], corners: bool, a: float = -0.75
) -> tuple[np.ndarray, np.ndarray]:
    """(height out, height in) and (width in, width out), float32: rows @ image @ columns is the resized image."""
    rows, columns = (weights(size, wanted, corners, a) for size, wanted in zip(shape[2:], out[2:]))
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
        for tap, weight in zip(range(start - 1, start + 3), cubic(place - start, a)):
            found[row, min(max(tap, 0), size - 1)] += weight
    return found.astype(np.float32)


def program_bicubic_to_products(network: Any) -> dict[str, str]:
    """aten.upsample_bicubic2d of a torch program -> the same."""
    changed = {}
    for node in list(network.graph.nodes):
        if _program.is_call(node, "aten.upsample_bicubic2d") and (text := _rewrite_node(network, node)):
            changed[str(node.name)] = text
    return _program.finish(network, changed)


def _rewrite_node(network: Any, node: Any) -> str:
    import torch

    shape, out = _program.shape(node.args[0]), _program.shape(node)
    factors = _program.argument(node, 3, "scale_factors", None)
    factors = list(factors) if isinstance(factors, (list, tuple)) else [*node.args[3:5]]
    corners = bool(node.args[2])
    exact = corners or all(f is None or abs(f * n - m) < 1e-3 for f, n, m in zip(factors, shape[2:], out[2:]))
    if len(shape) != 4 or not exact:
        return ""
    known = [_program.constant(network, node, torch.from_numpy(m)) for m in matrices(shape, out, corners)]
    node.target, node.args, node.kwargs = _resized, (node.args[0], *known), {}
    return f"bicubic {shape[2]}x{shape[3]} to {out[2]}x{out[3]} -> two matrix products"


def _resized(x: Any, rows: Any, columns: Any) -> Any:
    return rows @ x @ columns
