"""Fold (col2im) as a transposed convolution with one-hot kernels: each tap adds its values to the pixels it lies on.

The (N, C * kH * kW, L) columns are N * C images of kH * kW channels, and channel (i, j) is written to row i and column
j of each window. Exact up to the order of sums: products with 1 and 0. For runtimes without col2im, which others write
as additions at indices (slow, and ExecuTorch's fail when they run).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program, unfold_to_convolution

KIND = "cure"
REMOVES = ("Col2Im", "col2im")
RUNTIMES: tuple[str, ...] = ()


def fold_to_convolution(model: onnx.ModelProto) -> dict[str, str]:
    """2-d Col2Im of fixed sizes -> Reshape, ConvTranspose, Reshape."""
    return _net.each(model, ("Col2Im",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    found, shape = _net.attributes(node), net.shape(node.input[0])
    sizes, kernel = (net.constant(name) for name in node.input[1:3])
    if sizes is None or kernel is None or len(kernel) != 2 or len(shape) != 3 or not net.is_float(node.input[0]):
        return ""
    image, (height, width) = [int(size) for size in sizes], (int(taps) for taps in kernel)
    dilations, strides = found.get("dilations", [1, 1]), found.get("strides", [1, 1])
    around = list(found.get("pads", [0, 0, 0, 0]))
    borders = [around[i] + around[2 + i] for i in (0, 1)]
    count, left = windows(image, (height, width), dilations, borders, strides)
    # what no window reaches behind the last one: cut off less there, as far as anything is cut off
    less = [min(around[2 + i], left[i]) for i in (0, 1)]
    beyond = [rest - taken for rest, taken in zip(left, less)]
    ends = [around[2 + i] - less[i] for i in (0, 1)]
    images, taps = shape[0] * (shape[1] // (height * width)), height * width
    options: dict[str, Any] = {"output_padding": beyond} if any(beyond) else {}
    chain = _net.Chain(net, node)
    columns = chain.then("Reshape", node.input[0], chain.const("columns", [images, taps, *count]))
    weight = chain.const("taps", one_hot(height, width))
    pads = [*around[:2], *ends]
    options |= {"kernel_shape": [height, width], "strides": strides, "dilations": dilations, "pads": pads}
    folded = chain.then("ConvTranspose", columns, weight, **options)
    chain.then("Reshape", folded, chain.const("shape", [shape[0], images // shape[0], *image]))
    chain.finish("ConvTranspose")
    return f"sum of {height}x{width} windows -> transposed convolution with one-hot kernels"


def windows(
    image: list[int], kernel: Sequence[int], dilation: list[int], borders: list[int], stride: list[int]
) -> tuple[list[int], list[int]]:
    """(windows, pixels behind the last window) of each axis. borders: padding of both sides together."""
    free = [image[i] + borders[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    return [free[i] // stride[i] + 1 for i in (0, 1)], [free[i] % stride[i] for i in (0, 1)]


def one_hot(height: int, width: int) -> np.ndarray:
    """(kH * kW, 1, kH, kW): channel by channel the kernel that writes one tap."""
    return unfold_to_convolution.identity(1, height, width)


def program_fold_to_convolution(network: Any) -> dict[str, str]:
    """aten.col2im of a torch program -> the same."""
    import torch

    changed = {}
    for node in list(network.graph.nodes):
        shape = _program.shape(node.args[0]) if _program.is_call(node, "aten.col2im") else ()
        if not shape or not all(isinstance(size, int) for size in node.args[1]):
            continue
        image, kernel, dilation, padding, stride = (list(given) for given in node.args[1:6])
        count, left = windows(image, kernel, dilation, [2 * border for border in padding], stride)
        taps = _program.constant(network, node, torch.from_numpy(one_hot(*kernel)))
        sizes = [-1, kernel[0] * kernel[1], *count]
        out = [*shape[:-2], shape[-2] // sizes[1], *image]
        node.target, node.args = _folded, (node.args[0], taps, sizes, out, (stride, padding, left, 1, dilation))
        changed[str(node.name)] = f"sum of {kernel[0]}x{kernel[1]} windows -> transposed convolution, one-hot kernels"
    return _program.finish(network, changed)


def _folded(columns: Any, taps: Any, sizes: list[int], out: list[int], options: tuple[Any, ...]) -> Any:
    import torch.nn.functional as functional

    return functional.conv_transpose2d(columns.reshape(sizes), taps, None, *options).reshape(out)
