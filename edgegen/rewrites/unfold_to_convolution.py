"""Unfold (im2col) as a convolution with identity kernels: each output channel picks one tap of one input channel.

A depthwise convolution with kH * kW one-hot kernels for each channel gives the taps as channels, in the order that
unfold has. Exact: products with 1 and 0. For runtimes without im2col, which exporters write as gathers over index
tables (slow, and refused by delegates).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("im2col",)
RUNTIMES: tuple[str, ...] = ()


def unfold_to_convolution(model: onnx.ModelProto) -> dict[str, str]:
    """[Pad], Gather of rows, Gather of columns, Transpose, Reshape, as torch exports unfold -> Conv, Reshape."""
    return _net.each(model, ("Reshape",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    turn = net.maker(node.input[0], "Transpose")
    columns = net.maker(turn.input[0], "Gather") if turn is not None else None
    rows = net.maker(columns.input[0], "Gather") if columns is not None else None
    if turn is None or columns is None or rows is None:
        return ""
    places = [_steps(net.constant(gather.input[1])) for gather in (rows, columns)]
    order = (_net.attributes(turn).get("perm"), *(_net.attributes(n).get("axis", 0) for n in (rows, columns)))
    shape, out = net.shape(rows.input[0]), net.shape(node.output[0])
    if order != ([0, 1, 2, 4, 3, 5], 2, 4) or places[0] is None or places[1] is None or not net.is_float(rows.input[0]):
        return ""
    (height, down, tall), (width, right, wide) = places[0][:3], places[1][:3]
    steps = [places[0][3], places[1][3]]
    if len(shape) != 4 or out != (shape[0], shape[1] * height * width, tall * wide):
        return ""
    source, around = rows.input[0], [0, 0]
    pad = net.maker(source, "Pad")
    amounts = _zero_border(net, pad) if pad is not None else None
    if pad is not None and amounts is not None:
        source, around = pad.input[0], amounts
    # what the last window leaves over is cut off by padding less (or not at all): as many windows fit as were gathered
    sizes = [shape[2 + i] - 2 * around[i] for i in (0, 1)]
    ends = [_end(*item) for item in zip(sizes, around, (height, width), (down, right), steps, (tall, wide))]
    if min(ends) < 0:
        return ""
    chain = _net.Chain(net, node)
    options: dict[str, Any] = {"kernel_shape": [height, width], "strides": steps, "dilations": [down, right]}
    kernel = chain.const("taps", identity(shape[1], height, width))
    taps = chain.then("Conv", source, kernel, pads=[*around, *ends], group=shape[1], **options)
    chain.then("Reshape", taps, chain.const("shape", list(out)))
    chain.finish()
    return f"gathered {height}x{width} windows -> depthwise convolution with identity kernels"


def _end(size: int, before: int, kernel: int, step: int, stride: int, count: int) -> int:
    """Padding behind, with which exactly `count` windows fit; -1 when there is none."""
    least = (count - 1) * stride + (kernel - 1) * step + 1 - size - before
    return max(0, least) if max(0, least) < least + stride else -1


def _steps(index: np.ndarray | None) -> tuple[int, int, int, int] | None:
    """(taps, dilation, windows, stride) of a table of (taps, windows) indices from 0, or None."""
    if index is None or index.ndim != 2 or 0 in index.shape:
        return None
    down = int(index[1, 0]) if len(index) > 1 else 1
    stride = int(index[0, 1]) if index.shape[1] > 1 else 1
    plain = np.arange(len(index))[:, None] * down + np.arange(index.shape[1]) * stride
    fits = np.array_equal(index, plain) and min(down, stride) > 0
    return (len(index), down, index.shape[1], stride) if fits else None


def _zero_border(net: _net.Net, pad: onnx.NodeProto) -> list[int] | None:
    amounts = net.constant(pad.input[1]) if len(pad.input) > 1 else None
    zero = len(pad.input) < 3 or not pad.input[2] or net.scalar(pad.input[2]) == 0
    if amounts is None or not zero or _net.attributes(pad).get("mode", b"constant") != b"constant":
        return None
    values = amounts.tolist()
    even = len(values) == 8 and values[:4] == values[4:] and values[:2] == [0, 0] and min(values) >= 0
    return values[2:4] if even else None


def identity(channels: int, height: int, width: int) -> np.ndarray:
    """(channels * kH * kW, 1, kH, kW): one-hot kernels, the taps of a channel one after the other."""
    taps = np.eye(height * width, dtype=np.float32).reshape(-1, 1, height, width)
    return np.tile(taps, (channels, 1, 1, 1))


def program_unfold_to_convolution(network: Any) -> dict[str, str]:
    """aten.im2col of a torch program -> the same."""
    import torch

    changed = {}
    for node in list(network.graph.nodes):
        shape = _program.shape(node.args[0]) if _program.is_call(node, "aten.im2col") else ()
        if len(shape) == 4:
            kernel, dilation, padding, stride = node.args[1:5]
            taps = _program.constant(network, node, torch.from_numpy(identity(shape[1], *kernel)))
            node.target, node.args = _windows, (node.args[0], taps, stride, padding, dilation)
            changed[str(node.name)] = f"{kernel[0]}x{kernel[1]} windows -> depthwise convolution with identity kernels"
    return _program.finish(network, changed)


def _windows(x: Any, taps: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    import torch.nn.functional as functional

    return functional.conv2d(x, taps, None, stride, padding, dilation, groups=x.shape[1]).flatten(2)
