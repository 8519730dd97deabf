"""Bicubic resizing by whole factors as two fixed depthwise convolutions, and depth to space where it enlarges.

Keys, 1981, with a = -0.75, as torch and OpenCV have it. Enlarging by r has r sets of four weights an axis, so rows give
r channels and columns r each of those; reducing by r is a convolution of stride r. Edges are repeated. Exact up to the
order of sums, for half-pixel centres (align_corners=False), shapes that are known, whole factors (each axis its own).
Antialiased reduction is another filter and is left. For runtimes without cubic resizing: coremltools 9.0
refuses it (#2175).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("Resize", "upsample_bicubic2d")
RUNTIMES: tuple[str, ...] = ("coreml",)


@dataclass(frozen=True)
class _Axis:
    """Weights (phases, taps), stride and edge padding (before, after) of one axis."""

    weights: np.ndarray
    stride: int
    before: int
    after: int


def bicubic_to_convolutions(model: onnx.ModelProto) -> dict[str, str]:
    """Resize (cubic, half-pixel centres) by whole factors -> Pad, Conv, Conv [, DepthToSpace]."""
    return _net.each(model, ("Resize",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    shape, out, found = net.shape(node.input[0]), net.shape(node.output[0]), _net.attributes(node)
    mode = found.get("coordinate_transformation_mode", b"half_pixel")
    plain = found.get("mode", b"nearest") == b"cubic" and mode in (b"half_pixel", b"pytorch_half_pixel")
    other = found.get("antialias", 0) or found.get("exclude_outside", 0) or "axes" in found
    images = len(shape) == 4 == len(out) and shape[:2] == out[:2] and net.is_float(node.input[0])
    if not plain or other or not images:
        return ""
    scales = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scales is not None and not np.allclose(scales * shape, out, rtol=0, atol=1e-3):
        return ""
    axes = _axes(shape, out, found.get("cubic_coeff_a", -0.75))
    if not axes:
        return ""
    chain = _net.Chain(net, node)
    edge = [0, 0, axes[0].before, axes[1].before, 0, 0, axes[0].after, axes[1].after]
    done = chain.then("Pad", node.input[0], chain.const("edge", edge), mode="edge")
    phases = [len(a.weights) for a in axes]
    for place, kernel in enumerate(kernels(axes, shape[1])):
        strides = [axes[0].stride, 1] if place == 0 else [1, axes[1].stride]
        group = shape[1] * (phases[0] if place else 1)
        weight = chain.const("cubic", kernel)
        done = chain.then("Conv", done, weight, kernel_shape=kernel.shape[2:], strides=strides, group=group)
    if phases[0] == phases[1] and phases[0] > 1:
        chain.then("DepthToSpace", done, blocksize=phases[0], mode="CRD")
    elif max(phases) > 1:
        rows, columns = out[2] // phases[0], out[3] // phases[1]
        split = chain.then("Reshape", done, chain.const("split", [*shape[:2], *phases, rows, columns]))
        turned = chain.then("Transpose", split, perm=[0, 1, 4, 2, 5, 3])
        chain.then("Reshape", turned, chain.const("shape", list(out)))
    chain.finish()
    return f"bicubic {shape[2]}x{shape[3]} to {out[2]}x{out[3]} -> two depthwise convolutions"


def _axes(shape: tuple[int, ...], out: tuple[int, ...], a: float) -> list[_Axis]:
    """The filters of rows and columns; none where one of them is not possible."""
    found = [axis(size, wanted, a) for size, wanted in zip(shape[2:], out[2:])]
    known = [filter_ for filter_ in found if filter_ is not None]
    return known if len(known) == len(found) else []


def axis(size: int, wanted: int, a: float) -> _Axis | None:
    """The filter of one axis; None where the factor is no whole number, or one pixel is left (its centre differs)."""
    if wanted == size:
        return _Axis(np.ones((1, 1)), 1, 0, 0)
    if wanted > size and wanted % size == 0:
        factor = wanted // size
        weights = np.zeros((factor, 5))
        for phase in range(factor):
            place = (phase + 0.5) / factor - 0.5
            start = int(np.floor(place))  # -1 or 0: the four taps lie from -2 or -1 on
            weights[phase, start + 1 : start + 5] = cubic(place - start, a)
        return _Axis(weights, 1, 2, 2)
    if wanted > 1 and size % wanted == 0:
        factor = size // wanted
        start = (factor - 1) // 2 - 1
        weights = np.concatenate([np.zeros(max(0, start)), cubic(0.0 if factor % 2 else 0.5, a)])
        return _Axis(weights[None], factor, max(0, -start), max(0, start + 4 - factor))
    return None


def cubic(place: float, a: float) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1, 2 for a point at `place` (0..1)."""
    near = [abs(place), abs(1 - place)]
    far = [1 + place, 2 - place]
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in near]
    outer = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in far]
    return np.array([outer[0], inner[0], inner[1], outer[1]])


def kernels(axes: list[_Axis], channels: int) -> list[np.ndarray]:
    """Depthwise weights for rows, then for columns: (channels * phases, 1, taps, 1) and (..., 1, 1, taps)."""
    rows, columns = (a.weights.astype(np.float32) for a in axes)
    down = np.tile(rows[:, None, :, None], (channels, 1, 1, 1))
    return [down, np.tile(columns[:, None, None, :], (channels * len(rows), 1, 1, 1))]


def program_bicubic_to_convolutions(network: Any) -> dict[str, str]:
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
    exact = all(f is None or abs(f * n - m) < 1e-3 for f, n, m in zip(factors, shape[2:], out[2:]))
    if len(shape) != 4 or node.args[2] or not exact:
        return ""
    axes = _axes(shape, out, -0.75)
    if not axes:
        return ""
    weights = [_program.constant(network, node, torch.from_numpy(k)) for k in kernels(axes, shape[1])]
    edges = (axes[1].before, axes[1].after, axes[0].before, axes[0].after)
    steps = (axes[0].stride, axes[1].stride, len(axes[0].weights), len(axes[1].weights))
    node.target, node.args, node.kwargs = _filtered, (node.args[0], *weights, edges, steps), {}
    return f"bicubic {shape[2]}x{shape[3]} to {out[2]}x{out[3]} -> two depthwise convolutions"


def _filtered(x: Any, rows: Any, columns: Any, edges: Any, steps: Any) -> Any:
    import torch.nn.functional as functional

    n, c = x.shape[:2]
    down, across, tall, wide = steps
    x = functional.pad(x, edges, mode="replicate") if any(edges) else x
    x = functional.conv2d(x, rows, None, (down, 1), groups=c)
    x = functional.conv2d(x, columns, None, (1, across), groups=c * tall)
    if tall == wide:
        return functional.pixel_shuffle(x, tall) if tall > 1 else x
    h, w = x.shape[2:]
    return x.reshape(n, c, tall, wide, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h * tall, w * wide)
