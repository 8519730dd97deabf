"""A transposed convolution of stride s as a plain one to s x s times as many channels, and depth to space.

Output pixel s q + p sees the taps p, p + s, p + 2 s ... of the kernel (Shi et al., 2016, arXiv:1609.07009): each of the
s x s phases is a convolution of its own, with the same number of multiplications in all; what the padding cuts off is
sliced away behind. Exact up to the order of sums; kernels that do not divide by the stride are filled up with zeros.
For runtimes whose transposed convolution is slow, or wrong in INT8 (NVIDIA/TensorRT#1694), or absent in INT8 (ONNX
Runtime). Names are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "offer"
REMOVES = ("ConvTranspose", "conv_transpose2d")
RUNTIMES: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Axis:
    """One spatial axis: taps of a phase, padding (before, after), first output row, number of output rows."""

    taps: int
    before: int
    after: int
    first: int
    count: int
    stride: int


def subpixel_convolution(model: onnx.ModelProto) -> dict[str, str]:
    """2-d ConvTranspose with a constant weight -> Conv, DepthToSpace (Reshape for unequal strides), Slice."""
    return _net.each(model, ("ConvTranspose",), _rewrite)


def _rewrite(net: _net.Net, conv: onnx.NodeProto) -> str:
    found, weight, shape = _net.attributes(conv), net.constant(conv.input[1]), net.shape(conv.input[0])
    bias = net.constant(conv.input[2]) if len(conv.input) > 2 else None
    result, around = net.shape(conv.output[0]), _net.pads(conv)
    strides = list(found.get("strides", [1, 1]))
    if weight is None or around is None or not weight.ndim == len(shape) == len(result) == 4:
        return ""
    if (len(conv.input) > 2 and bias is None) or max(strides) == 1 or "output_shape" in found:
        return ""
    wide = dilated(weight, found.get("dilations", [1, 1]))
    axes = [axis(wide.shape[2 + i], strides[i], around[i], shape[2 + i], result[2 + i]) for i in (0, 1)]
    group = found.get("group", 1)
    chain = _net.Chain(net, conv)
    inputs = [conv.input[0], chain.const("weight", phases(wide, axes, group))]
    if bias is not None:
        inputs.append(chain.const("bias", np.repeat(bias, strides[0] * strides[1])))
    padding = [axes[0].before, axes[1].before, axes[0].after, axes[1].after]
    done = chain.then("Conv", *inputs, kernel_shape=[a.taps for a in axes], pads=padding, group=group)
    done = _spread(chain, done, [shape[0], result[1], *strides], [shape[2 + i] + _grown(axes[i]) for i in (0, 1)])
    if any(a.first or a.count != (shape[2 + i] + _grown(a)) * a.stride for i, a in enumerate(axes)):
        first, end = [a.first for a in axes], [a.first + a.count for a in axes]
        chain.then("Slice", done, chain.const("first", first), chain.const("end", end), chain.const("axes", [2, 3]))
    chain.finish(layer="Conv")
    return f"transposed convolution -> convolution to {strides[0]}x{strides[1]} phases, depth to space"


def _spread(chain: _net.Chain, name: str, sizes: list[int], places: list[int]) -> str:
    """(N, C s t, H, W) to (N, C, H s, W t)."""
    samples, channels, down, right = sizes
    if down == right:
        return chain.then("DepthToSpace", name, blocksize=down, mode="CRD")
    split = chain.then("Reshape", name, chain.const("split", [samples, channels, down, right, *places]))
    turned = chain.then("Transpose", split, perm=[0, 1, 4, 2, 5, 3])
    joined = [samples, channels, places[0] * down, places[1] * right]
    return chain.then("Reshape", turned, chain.const("joined", joined))


def axis(kernel: int, stride: int, pad: int, size: int, count: int) -> _Axis:
    """Where the phases of an axis start and end; `count` rows are wanted from row `pad` of the full result on."""
    taps = math.ceil(kernel / stride)
    skipped = min(pad // stride, taps - 1)  # whole rows of phases that the padding cuts off
    end = math.ceil((pad + count) / stride)
    return _Axis(taps, taps - 1 - skipped, max(0, end - size), pad - skipped * stride, count, stride)


def _grown(found: _Axis) -> int:
    """How many rows more than its input a phase's convolution yields."""
    return found.before + found.after - found.taps + 1


def dilated(weight: np.ndarray, dilations: list[int]) -> np.ndarray:
    """A kernel with the zeros between its taps written out."""
    height, width = ((size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations))
    wide = np.zeros((*weight.shape[:2], height, width), weight.dtype)
    wide[:, :, :: dilations[0], :: dilations[1]] = weight
    return wide


def phases(weight: np.ndarray, axes: list[_Axis], group: int) -> np.ndarray:
    """(in, out / groups, kH, kW) to (out * s * t, in / groups, taps, taps): the flipped taps of each phase."""
    down, right = axes
    full = np.zeros((*weight.shape[:2], down.taps * down.stride, right.taps * right.stride), weight.dtype)
    full[:, :, : weight.shape[2], : weight.shape[3]] = weight
    inputs, outputs = weight.shape[0] // group, weight.shape[1]
    split = full.reshape(group, inputs, outputs, down.taps, down.stride, right.taps, right.stride)
    split = split[:, :, :, ::-1, :, ::-1]
    return np.ascontiguousarray(split.transpose(0, 2, 4, 6, 1, 3, 5)).reshape(-1, inputs, down.taps, right.taps)


def program_subpixel_convolution(network: Any) -> dict[str, str]:
    """The same on a torch program."""
    changed = {}
    for node in list(network.graph.nodes):
        if _program.is_call(node, "aten.conv_transpose2d") and (text := _rewrite_node(network, node)):
            changed[str(node.name)] = text
    return _program.finish(network, changed)


def _rewrite_node(network: Any, node: Any) -> str:
    import torch

    weight = _program.tensor(network, node.args[1])
    options = ((3, "stride", 1), (4, "padding", 0), (6, "groups", 1), (7, "dilation", 1))
    stride, pad, group, dilation = (_program.argument(node, *option) for option in options)
    strides, around, steps = (_pair(value) for value in (stride, pad, dilation))
    shape, result = _program.shape(node.args[0]), _program.shape(node)
    if weight is None or len(shape) != 4 or len(result) != 4 or max(strides) == 1:
        return ""
    wide = dilated(weight.detach().cpu().numpy(), steps)
    axes = [axis(wide.shape[2 + i], strides[i], around[i], shape[2 + i], result[2 + i]) for i in (0, 1)]
    kernel = _program.constant(network, node, torch.from_numpy(phases(wide, axes, group)))
    bias = _program.argument(node, 2, "bias", None)
    settings = [(a.before, a.after, a.first, a.count, a.stride) for a in axes]
    node.target, node.args, node.kwargs = _in_phases, (node.args[0], kernel, bias, settings, group), {}
    return f"transposed convolution -> convolution to {strides[0]}x{strides[1]} phases"


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def _in_phases(x: Any, weight: Any, bias: Any, settings: Any, group: int) -> Any:
    import torch.nn.functional as functional

    (top, bottom, row, height, down), (left, right, column, width, across) = settings
    even = (top, left) == (bottom, right)
    x = x if even else functional.pad(x, (left, right, top, bottom))
    x = functional.conv2d(x, weight, None, padding=(top, left) if even else 0, groups=group)
    if down == across:
        x = functional.pixel_shuffle(x, down)
    else:
        n, c, h, w = x.shape
        x = x.reshape(n, c // (down * across), down, across, h, w).permute(0, 1, 4, 2, 5, 3)
        x = x.reshape(n, c // (down * across), h * down, w * across)
    x = x[:, :, row : row + height, column : column + width]
    return x if bias is None else x + bias.reshape(1, -1, 1, 1)
