"""Exact rewrites of torch.fx nodes that the LiteRT converter gets wrong, refuses, or makes slow. One function each."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

aten = torch.ops.aten
PARTS = "edgegen_parts"
_FOLD_LIMIT = 2**22  # elements of a constant that is computed here instead of on the device
# Elementwise, the same function for every channel: channels may be permuted before instead of behind them.
_POINTWISE = (
    aten.relu, aten.relu_, aten.leaky_relu, aten.leaky_relu_, aten.clamp, aten.clamp_, aten.hardtanh, aten.hardtanh_,
    aten.sigmoid, aten.tanh, aten.gelu, aten.silu, aten.silu_, aten.elu, aten.hardswish,
)  # fmt: skip
_RANDOM = (torch.Tag.nondeterministic_seeded,)


def locate(node: Any, name: str) -> None:
    """Name the node: litert-torch writes the module stack as the location of what the node becomes."""
    node.meta["nn_module_stack"] = {"edgegen": ("", name)}


def _location(node: Any) -> str:
    stack = node.meta.get("nn_module_stack", {})
    return stack["edgegen"][1] if "edgegen" in stack else ""


@functools.cache
def block_operations() -> tuple[Any, Any]:
    """torch operations with the meaning of LiteRT's DEPTH_TO_SPACE and SPACE_TO_DEPTH, known to the converter."""
    from litert_converter.mlir import ir
    from litert_torch.backend.experimental.torch_tfl import _lowerings
    from litert_torch.backend.lowerings import registry, utils

    @torch.library.custom_op("edgegen::depth_to_space", mutates_args=())
    def depth_to_space(x: torch.Tensor, block: int) -> torch.Tensor:
        """(N, H, W, block * block * C) to (N, block * H, block * W, C); channel = (row * block + column) * C + c."""
        n, h, w, c = x.shape
        parts = x.reshape(n, h, w, block, block, c // block**2).permute(0, 1, 3, 2, 4, 5)
        return parts.reshape(n, h * block, w * block, c // block**2).clone()

    @torch.library.custom_op("edgegen::space_to_depth", mutates_args=())
    def space_to_depth(x: torch.Tensor, block: int) -> torch.Tensor:
        """The inverse."""
        n, h, w, c = x.shape
        parts = x.reshape(n, h // block, block, w // block, block, c).permute(0, 1, 3, 2, 4, 5)
        return parts.reshape(n, h // block, w // block, c * block**2).clone()

    depth_to_space.register_fake(
        lambda x, block: x.new_empty(x.shape[0], x.shape[1] * block, x.shape[2] * block, x.shape[3] // block**2)
    )
    space_to_depth.register_fake(
        lambda x, block: x.new_empty(x.shape[0], x.shape[1] // block, x.shape[2] // block, x.shape[3] * block**2)
    )

    def lower(name: str) -> Callable[..., Any]:
        def lowering(context: Any, x: Any, block: int) -> Any:
            size = {"block_size": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), block)}
            return _lowerings._ir_operation(name, utils.node_meta_to_ir_types(context.node), [x], size)

        return lowering

    found = torch.ops.edgegen.depth_to_space.default, torch.ops.edgegen.space_to_depth.default
    registry.lower(found[0])(lower("tfl.depth_to_space"))
    registry.lower(found[1])(lower("tfl.space_to_depth"))
    return found


class _Writer:
    """Puts nodes before `node`, with its location; `done` replaces it."""

    def __init__(self, module: Any, node: Any):
        self.module, self.node, self.fx = module, node, node.graph

    def __call__(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> Any:
        with self.fx.inserting_before(self.node):
            made = self.fx.call_function(target, args, kwargs)
        shapes = torch.fx.node.map_arg((args, kwargs), lambda n: torch.empty_like(n.meta["val"], device="meta"))
        made.meta["val"] = target(*shapes[0], **shapes[1])
        locate(made, name or _location(self.node))
        return made

    def constant(self, value: torch.Tensor) -> Any:
        name = f"edgegen_constant_{len(list(self.module.buffers()))}"
        self.module.register_buffer(name, value.detach().contiguous())
        with self.fx.inserting_before(self.node):
            made = self.fx.get_attr(name)
        made.meta["val"] = value
        return made

    def gather(self, source: Any, index: torch.Tensor, axis: int) -> Any:
        """Rows, columns or channels of (N, C, H, W) by their numbers, as a GATHER on channels-last data."""
        block_operations()
        last = self(aten.permute.default, source, [0, 2, 3, 1])
        found = self(torch.ops.tfl.gather.default, last, self.constant(index.to(torch.int32)), {1: 3, 2: 1, 3: 2}[axis])
        return self(aten.permute.default, found, [0, 3, 1, 2])

    def done(self, made: Any) -> None:
        self.node.replace_all_uses_with(made)
        self.fx.erase_node(self.node)


def _value(module: Any, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    found = operator.attrgetter(node.target)(module)
    return found if isinstance(found, torch.Tensor) else None


def _arguments(node: Any) -> dict[str, Any]:
    """A call's arguments by name, with the schema's defaults."""
    schema = node.target._schema.arguments
    given = {spec.name: value for spec, value in zip(schema, node.args)}
    return {spec.name: spec.default_value for spec in schema} | given | dict(node.kwargs)


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return (values[0], values[-1])


def fold_constants(module: Any) -> None:
    """Compute what depends on weights alone (weight norm, index grids): the converter leaves operations on constants
    in the file, some of which the interpreter does not know."""
    values: dict[Any, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = _value(module, node)
        if node.op != "call_function" or not all(values.get(n) is not None for n in node.all_input_nodes):
            continue
        if any(tag in getattr(node.target, "tags", ()) for tag in _RANDOM) or getattr(
            getattr(node.target, "_schema", None), "is_mutable", True
        ):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        with torch.no_grad():
            found = node.target(*args, **kwargs)
        if isinstance(found, torch.Tensor) and found.numel() <= _FOLD_LIMIT:
            values[node] = found.detach()
            constant = _Writer(module, node).constant(found)
            values[constant] = values[node]
            node.replace_all_uses_with(constant)


def fold_batch_norms(module: Any) -> None:
    """Into the weights of the convolution before, as the ONNX export does it."""
    axis = {aten.conv2d: 0, aten.conv1d: 0, aten.conv_transpose2d: 1, aten.conv_transpose1d: 1}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _packet(node) is not aten.batch_norm:
            continue
        given, conv = _arguments(node), node.args[0]
        if given["training"] or conv.op != "call_function" or _packet(conv) not in axis or len(conv.users) != 1:
            continue
        made = _arguments(conv)
        weight, bias = _value(module, made["weight"]), _value(module, made["bias"])
        mean, variance = _value(module, given["running_mean"]), _value(module, given["running_var"])
        if weight is None or mean is None or variance is None or (made["bias"] is not None and bias is None):
            continue
        gain, shift = _value(module, given["weight"]), _value(module, given["bias"])
        scale = torch.rsqrt(variance.double() + given["eps"]) * (1.0 if gain is None else gain.double())
        moved = (0.0 if bias is None else bias.double()) - mean.double()
        new_bias = moved * scale + (0.0 if shift is None else shift.double())
        groups = made["groups"] if axis[_packet(conv)] else 1
        # weights are (out, in / groups, ...) or, transposed, (groups * in / groups, out / groups, ...)
        sides = (groups, 1, -1) if axis[_packet(conv)] else (1, -1, 1)
        wide = weight.double().unflatten(0, (groups, -1)) * scale.reshape(*sides, *[1] * (weight.dim() - 2))
        write = _Writer(module, conv)
        changed = {"weight": write.constant(wide.flatten(0, 1).float()), "bias": write.constant(new_bias.float())}
        conv.args, conv.kwargs = tuple((made | changed).values()), {}
        node.replace_all_uses_with(conv)
        module.graph.erase_node(node)


# ------------------------------------------------------------------------------------------------- one a construct


def _pixel_shuffle(module: Any, node: Any) -> None:
    """DEPTH_TO_SPACE; its other order of channels goes into the weights of the convolution before it."""
    source, block = node.args
    shape = source.meta["val"].shape
    if len(shape) != 4:
        return
    write, c, width = _Writer(module, node), shape[1], shape[1] // block**2
    order = torch.arange(c).reshape(width, block, block).permute(1, 2, 0).reshape(-1)
    if width > 1 and not _reorder_before(module, source, order):
        source = write.gather(source, order, 1)
    last = write(aten.permute.default, source, [0, 2, 3, 1])
    wide = write(block_operations()[0], last, block)
    write.done(write(aten.permute.default, wide, [0, 3, 1, 2]))


def _pixel_unshuffle(module: Any, node: Any) -> None:
    """SPACE_TO_DEPTH, then its channels in torch's order."""
    source, block = node.args
    if len(source.meta["val"].shape) != 4:
        return
    write, c = _Writer(module, node), source.meta["val"].shape[1]
    last = write(block_operations()[1], write(aten.permute.default, source, [0, 2, 3, 1]), block)
    deep = write(aten.permute.default, last, [0, 3, 1, 2])
    order = torch.arange(c * block**2).reshape(block, block, c).permute(2, 0, 1).reshape(-1)
    write.done(deep if c == 1 else write.gather(deep, order, 1))


def _reorder_before(module: Any, source: Any, order: torch.Tensor) -> bool:
    """Permute the output channels of the convolution that makes `source`, through pointwise functions."""
    while source.op == "call_function" and len(source.users) == 1 and _packet(source) in _POINTWISE:
        source = source.args[0]
    if source.op != "call_function" or len(source.users) != 1 or _packet(source) is not aten.conv2d:
        return False
    given = _arguments(source)
    weight, bias = _value(module, given["weight"]), _value(module, given["bias"])
    if weight is None or given["groups"] != 1 or (given["bias"] is not None and bias is None):
        return False
    write = _Writer(module, source)
    source.update_arg(1, write.constant(weight[order]))
    if bias is not None:
        source.update_arg(2, write.constant(bias[order]))
    return True


def _packet(node: Any) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _conv_transpose2d(module: Any, node: Any) -> None:
    """Without padding, then cropped: TRANSPOSE_CONV pads evenly or not at all, torch as it is told.

    Dilation becomes zeros in the kernel.
    """
    given = _arguments(node)
    weight = _value(module, given["weight"])
    if weight is None:
        return
    if _from_one_pixel(module, node, given, weight):
        return
    keys = ("stride", "padding", "output_padding", "dilation")
    stride, padding, extra, dilation = (_pair(given[key]) for key in keys)
    kernel = tuple(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:]))
    plain = padding == extra == (0, 0) and dilation == (1, 1)
    same = extra == (0, 0) and dilation == (1, 1) and all(k - 2 * p == s for k, p, s in zip(kernel, padding, stride))
    if (stride == (1, 1) and extra == (0, 0)) or plain or same:
        return
    write = _Writer(module, node)
    if dilation != (1, 1):
        wide = weight.new_zeros(*weight.shape[:2], *kernel)
        wide[:, :, :: dilation[0], :: dilation[1]] = weight
        weight = wide
    bias = _value(module, given["bias"]) if given["bias"] is not None else None
    late = bias is not None and any(e > p for e, p in zip(extra, padding))  # what lies beyond the kernel is bias alone
    args = (given["input"], write.constant(weight), None if late else given["bias"], list(stride))
    made = write(node.target, *args, [0, 0], [0, 0], given["groups"], [1, 1])
    h, w = node.meta["val"].shape[2:]
    sizes = [(s - 1) * t + k for s, t, k in zip(given["input"].meta["val"].shape[2:], stride, kernel)]
    for axis, (start, size, length) in enumerate(zip(padding, sizes, (h, w))):
        if start or size != length:
            made = write(aten.slice.Tensor, made, axis + 2, start, min(size, start + length))
    beyond = [max(0, start + length - size) for start, size, length in zip(padding, sizes, (h, w))]
    if any(beyond):
        made = write(aten.constant_pad_nd.default, made, [0, beyond[1], 0, beyond[0]], 0.0)
    write.done(write(aten.add.Tensor, made, write.constant(bias.reshape(1, -1, 1, 1))) if late else made)


def _from_one_pixel(module: Any, node: Any, given: dict[str, Any], weight: torch.Tensor) -> bool:
    """The first layer of a GAN is a matrix product; the converter would pad its pixel with zeros and convolve those."""
    n, c, *size = given["input"].meta["val"].shape
    plain = all(not any(_pair(given[key])) for key in ("padding", "output_padding"))
    if size != [1, 1] or not plain or given["groups"] != 1 or _pair(given["dilation"]) != (1, 1):
        return False
    bias = _value(module, given["bias"])
    if given["bias"] is not None and bias is None:
        return False
    write, (_, out, height, width) = _Writer(module, node), weight.shape
    matrix = write.constant(weight.permute(2, 3, 1, 0).reshape(-1, c))
    late = None if bias is None else write.constant(bias.repeat(height * width))
    made = write(aten.linear.default, write(aten.reshape.default, given["input"], [n, c]), matrix, late)
    image = write(aten.reshape.default, made, [n, height, width, out])
    write.done(write(aten.permute.default, image, [0, 3, 1, 2]))
    return True


def _nearest(module: Any, node: Any) -> None:
    """By whole factors RESIZE_NEAREST_NEIGHBOR, else rows and columns by their numbers: the converter takes pixel
    centres where torch takes corners."""
    source, given = node.args[0], _arguments(node)
    shape, out = source.meta["val"].shape, node.meta["val"].shape
    if len(shape) != 4:
        return
    exact = "exact" in str(node.target)
    if all(o % i == 0 for i, o in zip(shape[2:], out[2:])) and _whole(given):
        if exact:
            node.target = aten.upsample_nearest2d.vec if "scale_factors" in given else aten.upsample_nearest2d.default
        return
    write, made = _Writer(module, node), source
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


def _resample(module: Any, node: Any) -> None:
    """Bicubic and antialiased resizing. Enlarging bicubically by a whole factor is a convolution with 5x5 taps on
    replicated edges and a pixel shuffle; the others are one matrix for rows and one for columns."""
    source, given = node.args[0], _arguments(node)
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
    write, made = _Writer(module, node), source
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
    write = _Writer(module, node)
    padded = write(aten.replication_pad2d.default, source, [2, 2, 2, 2])
    wide = write(aten.conv2d.default, padded, write.constant(weight), None, [1, 1], [0, 0], [1, 1], 1 if c <= 4 else c)
    shuffled = write(aten.pixel_shuffle.default, wide, factor)
    write.done(shuffled)
    _replication_pad(module, padded)
    _pixel_shuffle(module, shuffled)


def _replication_pad(module: Any, node: Any) -> None:
    """Copies of the first and last rows and columns."""
    source, sides = node.args
    shape = source.meta["val"].shape
    if len(shape) != 4 or min(sides) < 0:
        return
    write, made = _Writer(module, node), source
    for axis, (before, behind) in ((2, sides[2:]), (3, sides[:2])):
        if before or behind:
            first = write(aten.slice.Tensor, made, axis, 0, 1)
            last = write(aten.slice.Tensor, made, axis, shape[axis] - 1, shape[axis])
            made = write(aten.cat.default, [*[first] * before, made, *[last] * behind], axis)
    write.done(made)


def _expand(module: Any, node: Any) -> None:
    """Repetition: the converter moves a broadcast across a transposition and leaves shapes that do not fit."""
    source, out = node.args[0], node.meta["val"].shape
    shape = source.meta["val"].shape
    if len(shape) == len(out) == 4 and shape != out:
        write = _Writer(module, node)
        write.done(write(aten.repeat.default, source, [o // s for s, o in zip(shape, out)]))


def _adaptive_max(module: Any, node: Any) -> None:
    """To one pixel it is the largest value; by a whole factor it is an ordinary pooling."""
    if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
        return
    source, (height, width) = node.args[0], _pair(node.args[1])
    h, w = source.meta["val"].shape[-2:]
    if h % height or w % width:
        return
    step = [h // height, w // width]
    write = _Writer(module, node)
    made = write(aten.amax.default, source, [-2, -1], True) if (height, width) == (1, 1) else None
    made = made or write(aten.max_pool2d.default, source, step, step)
    for user in list(node.users):
        user.replace_all_uses_with(made)
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _instance_norm(module: Any, node: Any) -> None:
    """Means over rows and columns, which need no other layout of the image."""
    given = _arguments(node)
    if given["use_input_stats"] and len(node.meta["val"].shape) == 4:
        _normalise(module, node, given["input"].meta["val"].shape[1], given)


def _group_norm(module: Any, node: Any) -> None:
    """The mean of a group is the mean of its channels' means: a small matrix, and the image stays as it lies."""
    if len(node.meta["val"].shape) == 4:
        given = _arguments(node)
        _normalise(module, node, given["num_groups"], given)


def _normalise(module: Any, node: Any, groups: int, given: dict[str, Any]) -> None:
    source, write = given["input"], _Writer(module, node)
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
        write = _Writer(module, node)
        write.done(write(aten.mul.Tensor, node.args[0], node.args[0]))


def _attention(module: Any, node: Any) -> None:
    """Two matrix products with names, and one multiplication instead of two."""
    given = _arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if given["is_causal"] or given["dropout_p"] or given["enable_gqa"] or len(node.meta.get(PARTS, ())) != 2:
        return
    mask, names = given["attn_mask"], node.meta[PARTS]
    if mask is not None and not mask.meta["val"].is_floating_point():
        return
    write = _Writer(module, node)
    scale = given["scale"] if given["scale"] is not None else query.meta["val"].shape[-1] ** -0.5
    scaled = write(aten.mul.Tensor, query, scale)
    scores = write(aten.matmul.default, scaled, write(aten.transpose.int, key, -2, -1), name=names[0])
    if mask is not None:
        scores = write(aten.add.Tensor, scores, mask)
    write.done(write(aten.matmul.default, write(aten.softmax.int, scores, -1), value, name=names[1]))


CURES: dict[Any, Callable[[Any, Any], None]] = {
    aten.pixel_shuffle: _pixel_shuffle,
    aten.pixel_unshuffle: _pixel_unshuffle,
    aten.conv_transpose2d: _conv_transpose2d,
    aten.upsample_nearest2d: _nearest,
    aten._upsample_nearest_exact2d: _nearest,
    aten.upsample_bicubic2d: _resample,
    aten._upsample_bicubic2d_aa: _resample,
    aten._upsample_bilinear2d_aa: _resample,
    aten.replication_pad2d: _replication_pad,
    aten.adaptive_max_pool2d: _adaptive_max,
    aten.instance_norm: _instance_norm,
    aten.group_norm: _group_norm,
    aten.expand: _expand,
    aten.pow: _power,
    aten.scaled_dot_product_attention: _attention,
}
