"""Exact rewrites of torch.fx nodes that the LiteRT converter gets wrong, refuses, or makes slow. One function each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from edgegen.runtimes import _litert_fx as fx
from edgegen.runtimes import _litert_resize as resize

aten = torch.ops.aten
PARTS = "edgegen_parts"


def _conv_transpose2d(module: Any, node: Any) -> None:
    """Without padding, then cropped: TRANSPOSE_CONV pads evenly or not at all, torch as it is told.

    Dilation becomes zeros in the kernel.
    """
    given = fx.arguments(node)
    weight = fx.value(module, given["weight"])
    if weight is None:
        return
    if _from_one_pixel(module, node, given, weight):
        return
    keys = ("stride", "padding", "output_padding", "dilation")
    stride, padding, extra, dilation = (fx.pair(given[key]) for key in keys)
    kernel = tuple(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:]))
    plain = padding == extra == (0, 0) and dilation == (1, 1)
    same = extra == (0, 0) and dilation == (1, 1) and all(k - 2 * p == s for k, p, s in zip(kernel, padding, stride))
    if (stride == (1, 1) and extra == (0, 0)) or plain or same:
        return
    write = fx.Writer(module, node)
    if dilation != (1, 1):
        wide = weight.new_zeros(*weight.shape[:2], *kernel)
        wide[:, :, :: dilation[0], :: dilation[1]] = weight
        weight = wide
    bias = fx.value(module, given["bias"]) if given["bias"] is not None else None
    # What lies beyond the kernel is bias alone.
    late = bias if bias is not None and any(e > p for e, p in zip(extra, padding)) else None
    args = (given["input"], write.constant(weight), None if late is not None else given["bias"], list(stride))
    made = write(node.target, *args, [0, 0], [0, 0], given["groups"], [1, 1])
    h, w = node.meta["val"].shape[2:]
    sizes = [(s - 1) * t + k for s, t, k in zip(given["input"].meta["val"].shape[2:], stride, kernel)]
    for axis, (start, size, length) in enumerate(zip(padding, sizes, (h, w))):
        if start or size != length:
            made = write(aten.slice.Tensor, made, axis + 2, start, min(size, start + length))
    beyond = [max(0, start + length - size) for start, size, length in zip(padding, sizes, (h, w))]
    if any(beyond):
        made = write(aten.constant_pad_nd.default, made, [0, beyond[1], 0, beyond[0]], 0.0)
    if late is not None:
        made = write(aten.add.Tensor, made, write.constant(late.reshape(1, -1, 1, 1)))
    write.done(made)


def _from_one_pixel(module: Any, node: Any, given: dict[str, Any], weight: torch.Tensor) -> bool:
    """The first layer of a GAN is a matrix product; the converter would pad its pixel with zeros and convolve those."""
    n, c, *size = given["input"].meta["val"].shape
    plain = all(not any(fx.pair(given[key])) for key in ("padding", "output_padding"))
    if size != [1, 1] or not plain or given["groups"] != 1 or fx.pair(given["dilation"]) != (1, 1):
        return False
    bias = fx.value(module, given["bias"])
    if given["bias"] is not None and bias is None:
        return False
    write, (_, out, height, width) = fx.Writer(module, node), weight.shape
    matrix = write.constant(weight.permute(2, 3, 1, 0).reshape(-1, c))
    late = None if bias is None else write.constant(bias.repeat(height * width))
    made = write(aten.linear.default, write(aten.reshape.default, given["input"], [n, c]), matrix, late)
    image = write(aten.reshape.default, made, [n, height, width, out])
    write.done(write(aten.permute.default, image, [0, 3, 1, 2]))
    return True


def _expand(module: Any, node: Any) -> None:
    """Repetition: the converter moves a broadcast across a transposition, and leaves shapes that do not fit or, with
    more than four axes, wrong values; there a repetition is a broadcast again, and copies side by side are not."""
    source, out = node.args[0], node.meta["val"].shape
    shape = source.meta["val"].shape
    if len(shape) != len(out) or len(shape) < 4 or shape == out:
        return
    write = fx.Writer(module, node)
    factors = [o // s for s, o in zip(shape, out)]
    if len(shape) == 4:
        write.done(write(aten.repeat.default, source, factors))
        return
    for axis, factor in enumerate(factors):
        source = write(aten.cat.default, [source] * factor, axis) if factor > 1 else source
    write.done(source)


def _adaptive_max(module: Any, node: Any) -> None:
    """To one pixel it is the largest value; by a whole factor it is an ordinary pooling."""
    if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
        return
    source, (height, width) = node.args[0], fx.pair(node.args[1])
    h, w = source.meta["val"].shape[-2:]
    if h % height or w % width:
        return
    step = [h // height, w // width]
    write = fx.Writer(module, node)
    made = write(aten.amax.default, source, [-2, -1], True) if (height, width) == (1, 1) else None
    made = made or write(aten.max_pool2d.default, source, step, step)
    for user in list(node.users):
        user.replace_all_uses_with(made)
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _instance_norm(module: Any, node: Any) -> None:
    """Means over rows and columns, which need no other layout of the image."""
    given = fx.arguments(node)
    if given["use_input_stats"] and len(node.meta["val"].shape) == 4:
        _normalise(module, node, given["input"].meta["val"].shape[1], given)


def _group_norm(module: Any, node: Any) -> None:
    """The mean of a group is the mean of its channels' means: a small matrix, and the image stays as it lies."""
    if len(node.meta["val"].shape) == 4:
        given = fx.arguments(node)
        _normalise(module, node, given["num_groups"], given)


def _normalise(module: Any, node: Any, groups: int, given: dict[str, Any]) -> None:
    source, write = given["input"], fx.Writer(module, node)
    c = source.meta["val"].shape[1]
    same = torch.block_diag(*[torch.full((c // groups, c // groups), groups / c)] * groups)

    def mean(x: Any) -> Any:
        if groups == 1:
            return write(aten.mean.dim, x, [1, 2, 3], True)
        means = write(aten.mean.dim, x, [1, 2], True)
        if groups == c:
            return means
        first = write(aten.permute.default, means, [0, 3, 1, 2])
        mixed = write(aten.conv2d.default, first, write.constant(same[:, :, None, None]))
        return write(aten.permute.default, mixed, [0, 2, 3, 1])

    last = write(aten.permute.default, source, [0, 2, 3, 1])
    centred = write(aten.sub.Tensor, last, mean(last))
    spread = write(aten.add.Tensor, mean(write(aten.mul.Tensor, centred, centred)), given["eps"])
    made = write(aten.mul.Tensor, centred, write(aten.rsqrt.default, spread))
    if given["weight"] is not None:
        made = write(aten.mul.Tensor, made, given["weight"])
    if given["bias"] is not None:
        made = write(aten.add.Tensor, made, given["bias"])
    write.done(write(aten.permute.default, made, [0, 3, 1, 2]))


def _power(module: Any, node: Any) -> None:
    """A square is a product: POW takes at most four dimensions."""
    if node.args[1] in (2, 2.0):
        write = fx.Writer(module, node)
        write.done(write(aten.mul.Tensor, node.args[0], node.args[0]))


def _attention(module: Any, node: Any) -> None:
    """Two matrix products with names, and one multiplication instead of two."""
    given = fx.arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if given["is_causal"] or given["dropout_p"] or given["enable_gqa"] or len(node.meta.get(PARTS, ())) != 2:
        return
    mask, names = given["attn_mask"], node.meta[PARTS]
    if mask is not None and not mask.meta["val"].is_floating_point():
        return
    write = fx.Writer(module, node)
    scale = given["scale"] if given["scale"] is not None else query.meta["val"].shape[-1] ** -0.5
    scaled = write(aten.mul.Tensor, query, scale)
    scores = write(aten.matmul.default, scaled, write(aten.transpose.int, key, -2, -1), name=names[0])
    if mask is not None:
        scores = write(aten.add.Tensor, scores, mask)
    write.done(write(aten.matmul.default, write(aten.softmax.int, scores, -1), value, name=names[1]))


CURES: dict[Any, Callable[[Any, Any], None]] = {
    aten.pixel_shuffle: resize.pixel_shuffle,
    aten.pixel_unshuffle: resize.pixel_unshuffle,
    aten.conv_transpose2d: _conv_transpose2d,
    aten.upsample_nearest2d: resize.nearest,
    aten._upsample_nearest_exact2d: resize.nearest,
    aten.upsample_bicubic2d: resize.resample,
    aten._upsample_bicubic2d_aa: resize.resample,
    aten._upsample_bilinear2d_aa: resize.resample,
    aten.pad: resize.replication_pad,
    aten.replication_pad2d: resize.replication_pad,
    aten.adaptive_max_pool2d: _adaptive_max,
    aten.instance_norm: _instance_norm,
    aten.group_norm: _group_norm,
    aten.expand: _expand,
    aten.pow: _power,
    aten.scaled_dot_product_attention: _attention,
}
