"""Exact rewrites of a torch program into what the XNNPACK delegate takes; the rest runs many times slower.

Reflected and repeated borders become slices and a concatenation, instance and group norms become means and products,
nearest upsampling by whole factors becomes concatenations, attention becomes its products and softmax.
"""

from __future__ import annotations

import itertools
from typing import Any

from edgegen.runtimes import _executorch_axes, _executorch_names

_LARGE = 2**16  # values; means of more are taken in two steps
_WIDEST = 32  # slices of a border; wider ones are left as they are


def rewrite(module: Any) -> bool:
    """Rewrite a `GraphModule` of aten operations in place; whether anything changed. Shapes come from its metadata."""
    changed = False
    for node in list(module.graph.nodes):
        rule = _RULES.get(_executorch_names.operator(node))
        if rule is None or "val" not in node.args[0].meta:
            continue
        with module.graph.inserting_before(node):
            result = rule(_Builder(module, node), node)
        if result is not None:
            _replace(module, node, result)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _replace(module: Any, node: Any, result: Any) -> None:
    """Put a result in a node's place, or a list of results in the place of what is taken from it by index."""
    if isinstance(result, list):
        for user in list(node.users):
            if user.users:
                user.replace_all_uses_with(result[user.args[1]])
                result[user.args[1]].meta.setdefault("val", user.meta["val"])
            module.graph.erase_node(user)
    else:
        result.meta.setdefault("val", node.meta["val"])
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)


class _Builder:
    """Writes calls before a node, which they take the module path of."""

    def __init__(self, module: Any, node: Any):
        import torch

        self.module, self.node, self.aten, self.torch = module, node, torch.ops.aten, torch

    def call(self, target: Any, *arguments: Any) -> Any:
        """A call; made constants of its scalars where XNNPACK wants tensors."""
        made = self.module.graph.call_function(target, arguments)
        made.meta["nn_module_stack"] = self.node.meta.get("nn_module_stack", {})
        return made

    def constant(self, value: Any) -> Any:
        """A tensor as a buffer of the module."""
        taken = dict(self.module.named_buffers())
        name = next(f"_edgegen_{i}" for i in itertools.count() if f"_edgegen_{i}" not in taken)
        self.module.register_buffer(name, value)
        return self.module.graph.get_attr(name)

    def value(self, node: Any) -> Any:
        """The tensor behind a parameter or buffer node; None when it is computed."""
        if node is None or node.op != "get_attr":
            return None
        owner, _, name = node.target.rpartition(".")
        return getattr(self.module.get_submodule(owner), name).detach()

    def slices(self, source: Any, axis: int, picks: list[tuple[int, int]]) -> Any:
        """Pieces [start, stop) of an axis, one after another; None stands for the whole."""
        aten = self.aten
        parts = [source if stop < 0 else self.call(aten.slice.Tensor, source, axis, a, stop) for a, stop in picks]
        return self.call(aten.cat.default, parts, axis)


def _pad(build: _Builder, node: Any) -> Any:
    """Border by reflection, repetition or wrapping; constant borders are XNNPACK's own."""
    source, amounts = node.args[0], list(node.args[1])
    mode = node.args[2] if len(node.args) > 2 else "constant"
    shape = source.meta["val"].shape
    if mode == "constant" and min(amounts) < 0:
        return _cropped(build, source, amounts, node.args[3] if len(node.args) > 3 else None)
    if mode not in ("reflect", "replicate", "circular") or any(not 0 <= a <= _WIDEST for a in amounts):
        return None
    value = source
    for step in range(len(amounts) // 2):
        axis, (before, after) = len(shape) - 1 - step, amounts[2 * step : 2 * step + 2]
        if before or after:
            value = build.slices(value, axis, _border(mode, int(shape[axis]), before, after))
    return value


def _cropped(build: _Builder, source: Any, amounts: list[int], fill: Any) -> Any:
    """A border of less than nothing is a slice; ExecuTorch builds it as padding, which fails when it runs."""
    shape, value = source.meta["val"].shape, source
    for step in range(len(amounts) // 2):
        axis, (before, after) = len(shape) - 1 - step, amounts[2 * step : 2 * step + 2]
        if min(before, after) < 0:
            end = int(shape[axis]) + min(after, 0)
            value = build.call(build.aten.slice.Tensor, value, axis, max(0, -before), end)
    rest = [max(0, amount) for amount in amounts]
    return build.call(build.aten.pad.default, value, rest, "constant", fill) if any(rest) else value


def _border(mode: str, size: int, before: int, after: int) -> list[tuple[int, int]]:
    whole = [(0, -1)]
    if mode == "circular":
        return [*([(size - before, size)] if before else []), *whole, *([(0, after)] if after else [])]
    if mode == "replicate":
        return [(0, 1)] * before + whole + [(size - 1, size)] * after
    front = [(i, i + 1) for i in range(before, 0, -1)]
    return front + whole + [(size - 2 - i, size - 1 - i) for i in range(after)]


def _batch_norm(build: _Builder, node: Any) -> Any:
    """Without scale and shift of its own as a product and a sum: such a one fails in the delegate's own pass."""
    source, weight, bias, mean, variance, training, _, eps = node.args[:8]
    known = build.value(mean), build.value(variance)
    if weight is not None or bias is not None or training or known[0] is None or known[1] is None:
        return None
    shape = (1, -1, *(1 for _ in source.meta["val"].shape[2:]))
    scale = (known[1].double() + eps).rsqrt()
    shift = (-known[0].double() * scale).float().reshape(shape)
    scaled = build.call(build.aten.mul.Tensor, source, build.constant(scale.float().reshape(shape)))
    return build.call(build.aten.add.Tensor, scaled, build.constant(shift))


def _instance_norm(build: _Builder, node: Any) -> Any:
    """(x - mean) / sqrt(variance + eps) * weight + bias over height and width."""
    source, weight, bias, _, _, own_statistics, _, eps = node.args[:8]
    shape = source.meta["val"].shape
    if len(shape) != 4 or not own_statistics:
        return None
    return _affine(build, _normalised(build, source, [int(size) for size in shape], eps), weight, bias, int(shape[1]))


def _group_norm(build: _Builder, node: Any) -> Any:
    """The same over groups of channels, which a reshape puts into rows."""
    source, groups = node.args[:2]
    given = tuple(node.args[2:5])
    weight, bias, eps = given + (None, None, 1e-5)[len(given) :]
    shape = [int(size) for size in source.meta["val"].shape]
    if len(shape) != 4:
        return None
    flat = [shape[0], groups, shape[1] // groups * shape[2], shape[3]]
    rows = build.call(build.aten.reshape.default, source, flat)
    back = build.call(build.aten.reshape.default, _normalised(build, rows, flat, eps), shape)
    return _affine(build, back, weight, bias, shape[1])


def _normalised(build: _Builder, source: Any, shape: list[int], eps: float) -> Any:
    aten = build.aten
    centred = build.call(aten.sub.Tensor, source, _mean(build, source, shape))
    variance = _mean(build, build.call(aten.mul.Tensor, centred, centred), shape)
    safe = build.call(aten.add.Tensor, variance, build.constant(build.torch.full((1, 1, 1, 1), eps)))
    return build.call(aten.mul.Tensor, centred, build.call(aten.rsqrt.default, safe))


def _mean(build: _Builder, source: Any, shape: list[int]) -> Any:
    """Mean over height and width; of millions of values the mean of the means of parts of equal size.

    XNNPACK adds values one after another in float32: of 8 million squares that loses a percent.
    """
    batch, channels, height, width = shape
    parts = max((p for p in range(1, height + 1) if not height % p and p * p <= height * width), default=1)
    if height * width <= _LARGE or parts == 1:
        return build.call(build.aten.mean.dim, source, [-1, -2], True)
    cut = build.call(build.aten.reshape.default, source, [batch * channels * parts, 1, height // parts, width])
    means = build.call(build.aten.mean.dim, cut, [-1, -2], True)
    rows = build.call(build.aten.reshape.default, means, [batch, channels, parts, 1])
    return build.call(build.aten.mean.dim, rows, [-1, -2], True)


def _affine(build: _Builder, value: Any, weight: Any, bias: Any, channels: int) -> Any:
    for operand, target in ((weight, build.aten.mul.Tensor), (bias, build.aten.add.Tensor)):
        if operand is not None:
            known = build.value(operand)
            shape = (1, channels, 1, 1)
            flat = build.call(build.aten.reshape.default, operand, list(shape)) if known is None else None
            value = build.call(target, value, build.constant(known.reshape(shape)) if flat is None else flat)
    return value


def _upsample(build: _Builder, node: Any) -> Any:
    """Nearest upsampling by whole factors: each pixel beside its copies, then each row."""
    source, shape = node.args[0], [int(size) for size in node.args[0].meta["val"].shape]
    out = [int(size) for size in node.meta["val"].shape]
    factors = [big // small for big, small in zip(out[2:], shape[2:])]
    if [f * s for f, s in zip(factors, shape[2:])] != out[2:] or max(factors) > 4:
        return None
    view, cat, rows = build.aten.reshape.default, build.aten.cat.default, shape[0] * shape[1]
    value = source
    for axis, apart in ((3, [rows, shape[2], shape[3], 1]), (2, [rows, shape[2], 1, out[3]])):
        if factors[axis - 2] > 1:  # XNNPACK takes no tensor twice: each copy is a reshape of its own
            copies = [build.call(view, value, apart) for _ in range(factors[axis - 2])]
            value = build.call(cat, copies, axis)
    return build.call(view, value, out)


def _attention(build: _Builder, node: Any) -> Any:
    """softmax(q k' / sqrt(d)) v without the checks for rows that a mask empties; there is no mask."""
    query, key, value = node.args[:3]
    shapes = [[int(size) for size in part.meta["val"].shape] for part in (query, key, value)]
    if len(node.args) > 3 or set(node.kwargs) - {"scale"} or shapes[0][:2] != shapes[1][:2] or len(shapes[0]) != 4:
        return None
    aten, heads = build.aten, shapes[0][0] * shapes[0][1]
    scale = node.kwargs.get("scale") or shapes[0][-1] ** -0.5
    factor = build.constant(build.torch.full((1, 1, 1), scale))
    flat = [build.call(aten.reshape.default, p, [heads, *s[2:]]) for p, s in zip((query, key, value), shapes)]
    scaled = build.call(aten.mul.Tensor, flat[0], factor)
    scores = build.call(aten.bmm.default, scaled, build.call(aten.permute.default, flat[1], [0, 2, 1]))
    mixed = build.call(aten.bmm.default, build.call(aten.softmax.int, scores, -1), flat[2])
    return build.call(aten.reshape.default, mixed, [*shapes[0][:3], shapes[2][3]])


def _matmul(build: _Builder, node: Any) -> Any:
    """A product of stacks of matrices without the expansions that torch puts around it."""
    shapes = [[int(size) for size in part.meta["val"].shape] for part in node.args[:2]]
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:2] != shapes[1][:2]:
        return None
    rows = shapes[0][0] * shapes[0][1]
    flat = [build.call(build.aten.reshape.default, p, [rows, *s[2:]]) for p, s in zip(node.args, shapes)]
    product = build.call(build.aten.bmm.default, *flat)
    return build.call(build.aten.reshape.default, product, [*shapes[0][:3], shapes[1][3]])


def _select(build: _Builder, node: Any) -> Any:
    """x[i] of an axis as a slice and a reshape."""
    source, axis, index = node.args
    shape = [int(size) for size in source.meta["val"].shape]
    start = index % shape[axis % len(shape)]
    cut = build.call(build.aten.slice.Tensor, source, axis, start, start + 1)
    return build.call(build.aten.reshape.default, cut, [int(size) for size in node.meta["val"].shape])


def _softmax(build: _Builder, node: Any) -> Any:
    """Over the width of images: XNNPACK's delegate takes the channels instead. Over the width of rows it is right."""
    source, axis = node.args[:2]
    shape = [int(size) for size in source.meta["val"].shape]
    if len(shape) != 4 or axis % 4 != 3:
        return None
    rows = build.call(build.aten.reshape.default, source, [shape[0] * shape[1], *shape[2:]])
    return build.call(build.aten.reshape.default, build.call(build.aten.softmax.int, rows, -1), shape)


def _global_max(build: _Builder, node: Any) -> Any:
    """The largest value of each channel, which has no core operation, as max pooling over everything."""
    source, size = node.args[:2]
    if list(size) != [1, 1] or any(user.args[1] != 0 and user.users for user in node.users):
        return None
    shape = [int(length) for length in source.meta["val"].shape]
    return [build.call(build.aten.max_pool2d.default, source, shape[-2:])]


def _unbind(build: _Builder, node: Any) -> Any:
    """All x[i] of an axis, each as a slice and a reshape."""
    source, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    outs = [[int(size) for size in value.shape] for value in node.meta["val"]]
    cuts = [build.call(build.aten.slice.Tensor, source, axis, i, i + 1) for i in range(len(outs))]
    return [build.call(build.aten.reshape.default, cut, shape) for cut, shape in zip(cuts, outs)]


def _expand(build: _Builder, node: Any) -> Any:
    """An expansion to the shape that is there already."""
    return node.args[0] if node.args[0].meta["val"].shape == node.meta["val"].shape else None


_RULES = {
    "pad": _pad,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "upsample_nearest2d": _upsample,
    "scaled_dot_product_attention": _attention,
    "matmul": _matmul,
    "select": _select,
    "softmax": _softmax,
    "adaptive_max_pool2d": _global_max,
    "unbind": _unbind,
    "expand": _expand,
    "permute": _executorch_axes.permute,
    **dict.fromkeys(_executorch_axes.RESHAPES, _executorch_axes.reshape),
}
