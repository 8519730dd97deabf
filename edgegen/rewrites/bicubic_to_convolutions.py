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

from edgegen.rewrites import _bicubic, _net, _program

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
    resize = _bicubic.of_node(net, node, (b"half_pixel", b"pytorch_half_pixel"))
    axes = _axes(resize.shape, resize.out, resize.a) if resize is not None else []
    if resize is None or not axes:
        return ""
    shape, out = resize.shape, resize.out
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
    return f"{resize.words} -> two depthwise convolutions"


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
            weights[phase, start + 1 : start + 5] = _bicubic.cubic(place - start, a)
        return _Axis(weights, 1, 2, 2)
    if wanted > 1 and size % wanted == 0:
        factor = size // wanted
        start = (factor - 1) // 2 - 1
        weights = np.concatenate([np.zeros(max(0, start)), _bicubic.cubic(0.0 if factor % 2 else 0.5, a)])
        return _Axis(weights[None], factor, max(0, -start), max(0, start + 4 - factor))
    return None


def kernels(axes: list[_Axis], channels: int) -> list[np.ndarray]:
    """Depthwise weights for rows, then for columns: (channels * phases, 1, taps, 1) and (..., 1, 1, taps)."""
    rows, columns = (a.weights.astype(np.float32) for a in axes)
    down = np.tile(rows[:, None, :, None], (channels, 1, 1, 1))
    return [down, np.tile(columns[:, None, None, :], (channels * len(rows), 1, 1, 1))]


def program_bicubic_to_convolutions(network: Any) -> dict[str, str]:
    """aten.upsample_bicubic2d of a torch program -> the same."""
    import torch

    def rewrite(node: Any, resize: _bicubic.Resize) -> str:
        axes = [] if resize.corners else _axes(resize.shape, resize.out, resize.a)
        if not axes:
            return ""
        weights = [_program.constant(network, node, torch.from_numpy(k)) for k in kernels(axes, resize.shape[1])]
        edges = (axes[1].before, axes[1].after, axes[0].before, axes[0].after)
        steps = (axes[0].stride, axes[1].stride, len(axes[0].weights), len(axes[1].weights))
        node.target, node.args, node.kwargs = _filtered, (node.args[0], *weights, edges, steps), {}
        return f"{resize.words} -> two depthwise convolutions"

    return _bicubic.in_program(network, rewrite)


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
