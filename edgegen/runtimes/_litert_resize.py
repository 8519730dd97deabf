"""Exact rewrites of resizing, pixel shuffle and replicated edges for the LiteRT converter."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from edgegen.runtimes import _litert_fx as fx

aten = torch.ops.aten
# Elementwise, the same function for every channel: channels may be permuted before instead of behind them.
_POINTWISE = (
    aten.relu, aten.relu_, aten.leaky_relu, aten.leaky_relu_, aten.clamp, aten.clamp_, aten.hardtanh, aten.hardtanh_,
    aten.sigmoid, aten.tanh, aten.gelu, aten.silu, aten.silu_, aten.elu, aten.hardswish,
)  # fmt: skip


def pixel_shuffle(module: Any, node: Any) -> None:
    """DEPTH_TO_SPACE; its other order of channels goes into the weights of the convolution before it."""
    source, block = node.args
    shape = source.meta["val"].shape
    if len(shape) != 4:
        return
    write, c, width = fx.Writer(module, node), shape[1], shape[1] // block**2
    order = torch.arange(c).reshape(width, block, block).permute(1, 2, 0).reshape(-1)
    if width > 1 and not _reorder_before(module, source, order):
        source = write.gather(source, order, 1)
    last = write(aten.permute.default, source, [0, 2, 3, 1])
    wide = write(fx.block_operations()[0], last, block)
    write.done(write(aten.permute.default, wide, [0, 3, 1, 2]))


def pixel_unshuffle(module: Any, node: Any) -> None:
    """SPACE_TO_DEPTH, then its channels in torch's order."""
    source, block = node.args
    if len(source.meta["val"].shape) != 4:
        return
    write, c = fx.Writer(module, node), source.meta["val"].shape[1]
    last = write(fx.block_operations()[1], write(aten.permute.default, source, [0, 2, 3, 1]), block)
    deep = write(aten.permute.default, last, [0, 3, 1, 2])
    order = torch.arange(c * block**2).reshape(block, block, c).permute(2, 0, 1).reshape(-1)
    write.done(deep if c == 1 else write.gather(deep, order, 1))


def _reorder_before(module: Any, source: Any, order: torch.Tensor) -> bool:
    """Permute the output channels of the convolution that makes `source`, through pointwise functions."""
    while source.op == "call_function" and len(source.users) == 1 and fx.packet(source) in _POINTWISE:
        source = source.args[0]
    if source.op != "call_function" or len(source.users) != 1 or fx.packet(source) is not aten.conv2d:
        return False
    given = fx.arguments(source)
    weight, bias = fx.value(module, given["weight"]), fx.value(module, given["bias"])
    if weight is None or given["groups"] != 1 or (given["bias"] is not None and bias is None):
        return False
    write = fx.Writer(module, source)
    source.update_arg(1, write.constant(weight[order]))
    if bias is not None:
        source.update_arg(2, write.constant(bias[order]))
    return True


def nearest(module: Any, node: Any) -> None:
    """By whole factors RESIZE_NEAREST_NEIGHBOR, else rows and columns by their numbers: the converter takes pixel
    centres where torch takes corners."""
    source, given = node.args[0], fx.arguments(node)
    shape, out = source.meta["val"].shape, node.meta["val"].shape
    if len(shape) != 4:
        return
    exact = "exact" in str(node.target)
    if all(o % i == 0 for i, o in zip(shape[2:], out[2:])) and _whole(given):
        if exact:
            node.target = aten.upsample_nearest2d.vec if "scale_factors" in given else aten.upsample_nearest2d.default
        return
    write, made = fx.Writer(module, node), source
    for axis in (2, 3):
        ramp = torch.arange(shape[axis], dtype=torch.float32)
        grid = torch.zeros(1, 1, shape[2], shape[3]) + (ramp[:, None] if axis == 2 else ramp)
        numbers = node.target(grid, *node.args[1:], **node.kwargs)  # torch itself says which pixel goes where
        index = numbers[0, 0, :, 0] if axis == 2 else numbers[0, 0, 0]
        if not torch.equal(index, ramp):
            made = write.gather(made, index, axis)
    write.done(made)


def _whole(given: dict[str, Any]) -> bool:
    factors = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    return all(factor is None or float(factor).is_integer() for factor in factors)


def resample(module: Any, node: Any) -> None:
    """Bicubic and antialiased resizing. Enlarging bicubically by a whole factor is a convolution with 5x5 taps on
    replicated edges and a pixel shuffle; the others are one matrix for rows and one for columns."""
    source, given = node.args[0], fx.arguments(node)
    shape, out = source.meta["val"].shape, node.meta["val"].shape
    factors = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    if len(shape) != 4 or any(f is not None and i * f != o for f, i, o in zip(factors, shape[2:], out[2:])):
        return
    name, factor = str(node.target), out[2] // shape[2]
    mode, smooth = "bicubic" if "bicubic" in name else "bilinear", "_aa" in name
    enlarged = factor > 1 and tuple(out[2:]) == (shape[2] * factor, shape[3] * factor)
    if enlarged and mode == "bicubic" and not smooth and not given["align_corners"]:
        _bicubic(module, node, factor)
        return
    write, made = fx.Writer(module, node), source
    for axis in (3, 2):
        # four equal columns: with a single one torch 2.13 smooths wrongly
        probe = torch.eye(shape[axis], dtype=torch.float64)[None, :, :, None].repeat(1, 1, 1, 4)
        answer = functional.interpolate(
            probe, (out[axis], 4), mode=mode, align_corners=given["align_corners"], antialias=smooth
        )
        weight = write.constant(answer[0, :, :, 0].T.float())  # (out, in)
        turned = made if axis == 3 else write(aten.transpose.int, made, 2, 3)
        made = write(aten.linear.default, turned, weight)
    write.done(write(aten.transpose.int, made, 2, 3))


def _bicubic(module: Any, node: Any, factor: int) -> None:
    source, c = node.args[0], node.args[0].meta["val"].shape[1]
    taps = torch.zeros(25, 1, 11, 11, dtype=torch.float64)  # bright pixels far from the edges, around (5, 5)
    for i in range(25):
        taps[i, 0, 3 + i // 5, 3 + i % 5] = 1
    answers = functional.interpolate(taps, scale_factor=factor, mode="bicubic", align_corners=False)
    middle = answers[:, 0, 5 * factor : 6 * factor, 5 * factor : 6 * factor].float()  # (25, factor, factor)
    kernel = middle.permute(1, 2, 0).reshape(factor**2, 1, 5, 5)
    weight = kernel.repeat(c, 1, 1, 1)
    if c <= 4:  # a phone's GPU has no depthwise convolution that multiplies channels
        weight = torch.cat([functional.pad(kernel, (0, 0, 0, 0, i, c - 1 - i)) for i in range(c)])
    write = fx.Writer(module, node)
    padded = write(aten.replication_pad2d.default, source, [2, 2, 2, 2])
    wide = write(aten.conv2d.default, padded, write.constant(weight), None, [1, 1], [0, 0], [1, 1], 1 if c <= 4 else c)
    shuffled = write(aten.pixel_shuffle.default, wide, factor)
    write.done(shuffled)
    replication_pad(module, padded)
    pixel_shuffle(module, shuffled)


def replication_pad(module: Any, node: Any) -> None:
    """Copies of the first and last rows and columns, or those of the other side: a phone's GPU only mirrors."""
    source, sides = node.args[:2]
    shape, mode = source.meta["val"].shape, fx.arguments(node).get("mode", "replicate")  # aten.pad's is "constant"
    if mode not in ("replicate", "circular") or len(shape) != 4 or len(sides) != 4 or min(sides) < 0:
        return
    write, made = fx.Writer(module, node), source
    for axis, (before, behind) in ((2, sides[2:]), (3, sides[:2])):
        size, parts = shape[axis], [made]
        if mode == "circular":
            first = [write(aten.slice.Tensor, made, axis, size - before, size)] if before else []
            last = [write(aten.slice.Tensor, made, axis, 0, behind)] if behind else []
            parts = [*first, made, *last]
        elif before or behind:
            first, last = ([write(aten.slice.Tensor, made, axis, at, at + 1)] for at in (0, size - 1))
            parts = [*first * before, made, *last * behind]
        made = write(aten.cat.default, parts, axis) if len(parts) > 1 else made
    write.done(made)
