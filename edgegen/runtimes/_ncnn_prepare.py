"""ONNX as pnnx converts it rightly: exact rewrites, in a copy, of what it would lose, refuse or get wrong.

Each rule names what pnnx or ncnn (20261020) does without it. ncnn's tensors have no batch axis and at most four
others, so all shapes written here begin with 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from edgegen import onnx_files
from edgegen.runtimes import _ncnn_axes
from edgegen.runtimes._ncnn_draft import LARGEST, Draft, Made, attribute

_LARGEST_POWER = 8
_MOST_PIECES = 64
Rule = Callable[[onnx.NodeProto, Draft], Made]
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_BATCHED = frozenset(("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Gemm"))


def prepare(model: onnx.ModelProto, most: int = 4) -> onnx.ModelProto:
    """A copy with every rule applied, tidied; no new tensor has more than `most` axes behind its first, which is 1.

    Where pnnx does not see that the first axis is a batch it counts it, and three others are all that is left.
    """
    made = outline(model, most)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if _heavy(tensor)}
    for tensor in made.graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights[tensor.name].raw_data
    return made


def outline(model: onnx.ModelProto, most: int = 4) -> onnx.ModelProto:
    """What `prepare` makes, its weights without content: no rule looks at that, and every step would copy it."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if _heavy(tensor):
            tensor.ClearField("raw_data")
    return onnx.ModelProto.FromString(_prepared(bare.SerializeToString(deterministic=True), most))


def _heavy(tensor: onnx.TensorProto) -> bool:
    """Whether it is a weight whose content neither a rule nor shape inference reads."""
    return tensor.data_type in _FLOATS and tensor.HasField("raw_data") and math.prod(tensor.dims) > LARGEST


@functools.lru_cache(maxsize=4)  # `supports` and each plan's `build` ask for the same one, with one `most` or both
def _prepared(outlined: bytes, most: int) -> bytes:
    model = onnx.ModelProto.FromString(outlined)
    draft: Draft | None = None
    for rule in _RULES:
        draft = draft or Draft.of(model, most)
        if nodes := _applied(rule, draft):
            kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del model.graph.node[:]
            model.graph.node.extend(kept)
            model, draft = onnx_files.tidy(model), None
    if all(node.op_type not in _BATCHED for node in model.graph.node):
        model = _anchored(model)
    return bytes(model.SerializeToString(deterministic=True))


def _applied(rule: Rule, draft: Draft) -> list[onnx.NodeProto]:
    """The draft's nodes with those rewritten that a rule knows; none when it knows none."""
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in draft.model.graph.node:
        known = all(name in draft.shapes for name in (*node.input, *node.output) if name)
        made = rule(node, draft) if known and node.domain in ("", "ai.onnx") else None
        if made is not None:
            made[-1].name = node.name
            changed = True
        nodes.extend([node] if made is None else made)
    return nodes if changed else []


def _anchored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Pool inputs by one pixel, which changes nothing: pnnx learns which axis is the batch from such layers alone."""
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for value in model.graph.input:
        rank = len(value.type.tensor_type.shape.dim)
        if rank not in (3, 4):
            continue
        name = onnx_files.unique(f"{value.name}_edgegen", taken)
        for node in model.graph.node:
            node.input[:] = [name if used == value.name else used for used in node.input]
        pool = onnx.helper.make_node("MaxPool", [value.name], [name], name=name, kernel_shape=[1] * (rank - 2))
        model.graph.node.insert(0, pool)
    return onnx_files.tidy(model)


def _reduce(node: onnx.NodeProto, draft: Draft) -> Made:
    """Reductions over one axis: pnnx loses the axis and reduces over nothing. It does not know ReduceMax at all.

    The tensor becomes (1, before, reduced, after), with a second axis of 1 to reduce; maxima become max pooling.
    """
    if not node.op_type.startswith("Reduce"):
        return None
    shape, out = draft.shapes[node.input[0]], draft.shapes[node.output[0]]
    axes = _axes(node, draft, len(shape))
    if axes is None or (axes == [2, 3] and len(shape) == 4 and node.op_type not in ("ReduceMax", "ReduceMin")):
        return None
    real = [axis for axis in axes if shape[axis] > 1]
    if not real:
        return [draft.reshape(node.input[0], out, node.output[0])] if _keeps(node.op_type) else None
    if real != list(range(real[0], real[-1] + 1)):
        return None
    before, after = math.prod(shape[: real[0]]), math.prod(shape[real[-1] + 1 :])
    depth = math.prod(shape[axis] for axis in real)
    if node.op_type in ("ReduceMax", "ReduceMin"):
        return _extreme(node, draft, (before, depth, after), out)
    folded, at = {
        before == 1: ((1, 1, depth, after), [1, 2]),
        after == 1: ((1, before, depth, 1), [2, 3]),
    }.get(True, ((1, before, 1, depth, after), [2, 3]))
    given = draft.reshape(node.input[0], folded)
    version = next(o.version for o in draft.model.opset_import if o.domain in ("", "ai.onnx"))
    as_input = version >= 18 or node.op_type == "ReduceSum"
    inputs = [given.output[0], *([draft.constant("axes", np.array(at, np.int64))] if as_input else [])]
    reduced = draft.node(node.op_type, inputs, keepdims=1)
    if not as_input:
        reduced.attribute.append(onnx.helper.make_attribute("axes", at))
    return [given, reduced, draft.reshape(reduced.output[0], out, node.output[0])]


def _extreme(node: onnx.NodeProto, draft: Draft, folded: tuple[int, int, int], out: Sequence[int]) -> Made:
    """Maximum over the middle of (before, depth, after) by max pooling; a minimum is the negative of one."""
    before, depth, after = folded
    first = draft.reshape(node.input[0], (1, before, depth, after))
    turned = [draft.node("Neg", [first.output[0]])] if node.op_type == "ReduceMin" else []
    source = (turned or [first])[0].output[0]
    pooled = draft.node("MaxPool", [source], kernel_shape=[depth, 1], strides=[depth, 1])
    back = [draft.node("Neg", [pooled.output[0]])] if turned else []
    return [first, *turned, pooled, *back, draft.reshape((back or [pooled])[0].output[0], out, node.output[0])]


def _instances(node: onnx.NodeProto, draft: Draft) -> Made:
    """Instance norm of rows, as torch writes a group norm: pnnx leaves `nn.InstanceNorm1d`. As that of images."""
    if node.op_type != "InstanceNormalization" or len(draft.shapes[node.input[0]]) == 4:
        return None
    shape = draft.shapes[node.input[0]]
    image = draft.reshape(node.input[0], (*shape[:2], 1, math.prod(shape[2:])))
    eps = attribute(node, "epsilon", 1e-5)
    normal = draft.node("InstanceNormalization", [image.output[0], *node.input[1:]], epsilon=eps)
    return [image, normal, draft.reshape(normal.output[0], shape, node.output[0])]


def _keeps(op: str) -> bool:
    """Whether reducing an axis of length 1 changes no value."""
    return op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")


def _axes(node: onnx.NodeProto, draft: Draft, rank: int) -> list[int] | None:
    """Axes of a reduction, sorted and not negative; None when they are computed."""
    found = attribute(node, "axes")
    if found is None and len(node.input) > 1 and node.input[1]:
        if node.input[1] not in draft.consts:
            return None
        found = draft.consts[node.input[1]].ravel().tolist()
    if found is None:
        found = [] if attribute(node, "noop_with_empty_axes", 0) else range(rank)
    return sorted(int(axis) % rank for axis in found)


def _power(node: onnx.NodeProto, draft: Draft) -> Made:
    """x ** 3 and the like: ncnn computes exp(3 log x), which is wrong below zero (GELU in its tanh form has it)."""
    if node.op_type != "Pow" or draft.consts.get(node.input[1], np.zeros(2)).size != 1:
        return None
    exponent = float(draft.consts[node.input[1]].reshape(()))
    if exponent != int(exponent) or not 3 <= exponent <= _LARGEST_POWER:
        return None
    made, value = [], node.input[0]
    for _ in range(int(exponent) - 1):
        made.append(draft.node("Mul", [value, node.input[0]]))
        value = made[-1].output[0]
    made[-1].output[0] = node.output[0]
    return made


def _steps(node: onnx.NodeProto, draft: Draft) -> Made:
    """x[..., a:b:s]: pnnx leaves `Tensor.slice`, which ncnn does not have. As a slice of rows of s, the last filled."""
    if node.op_type != "Slice" or len(node.input) < 5:
        return None
    shape = draft.shapes[node.input[0]]
    wanted = [draft.consts.get(name) for name in node.input[1:5]]
    if any(value is None for value in wanted):
        return None
    made, value = [], node.input[0]
    for start, stop, axis, step in zip(*(item.ravel().tolist() for item in wanted if item is not None)):
        axis, size = axis % len(shape), shape[axis % len(shape)]
        stop = min(stop, size)
        if step < 2 or not 0 <= start < stop:
            return None
        count = -(-(stop - start) // step)
        if size % step or start >= step or count * step != size:
            end = min(size, start + count * step)
            missing = start + count * step - end
            if missing > end - start:
                return None
            if (start, end) != (0, size):
                made.append(draft.slice(value, axis, start, end))
                value = made[-1].output[0]
            if missing:
                made.append(draft.slice(value, axis, 0, missing))
                made.append(draft.node("Concat", [value, made[-1].output[0]], axis=axis))
                value = made[-1].output[0]
            start = 0
        inner = math.prod(shape[axis + 1 :])
        rows = draft.reshape(value, (1, math.prod(shape[:axis]), count, step * inner))
        cut = draft.slice(rows.output[0], 3, start * inner, (start + 1) * inner)
        shape = (*shape[:axis], count, *shape[axis + 1 :])
        made += [rows, cut, draft.reshape(cut.output[0], shape)]
        value = made[-1].output[0]
    made[-1].output[0] = node.output[0]
    return made


def _tile(node: onnx.NodeProto, draft: Draft) -> Made:
    """Tile: pnnx leaves `torch.tile`, which ncnn does not have. As concatenations."""
    repeats = draft.consts.get(node.input[1]) if node.op_type == "Tile" else None
    if repeats is None or not 1 < math.prod(repeats.tolist()) <= _MOST_PIECES:
        return None
    made, value = [], node.input[0]
    for axis, count in enumerate(repeats.tolist()):
        if count > 1:
            made.append(draft.node("Concat", [value] * count, axis=axis))
            value = made[-1].output[0]
    made[-1].output[0] = node.output[0]
    return made


def _gather(node: onnx.NodeProto, draft: Draft) -> Made:
    """Gather with known indices: pnnx leaves `Gather` or `torch.unbind`. As slices, put together again."""
    picked = draft.consts.get(node.input[1]) if node.op_type == "Gather" else None
    if picked is None or picked.ndim > 1 or node.input[0] in draft.consts:
        return None
    shape, out = draft.shapes[node.input[0]], draft.shapes[node.output[0]]
    axis = attribute(node, "axis", 0) % len(shape)
    if picked.ndim == 0 and axis > 0 and shape[0] == 1:
        return None  # pnnx has this one right
    if shape[axis] == 1 and picked.size == 1:
        return [draft.reshape(node.input[0], out, node.output[0])]
    indices = [int(index) % shape[axis] for index in picked.ravel().tolist()]
    source, made = node.input[0], []
    if axis == 0:  # the other axes as one: ncnn has four besides the batch
        shape = (1, shape[0], math.prod(shape[1:]))
        made.append(draft.reshape(source, shape))
        source, axis = made[-1].output[0], 1
    runs = [list(group) for _, group in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    if len(runs) > _MOST_PIECES or len(shape) > 5:
        return None
    pieces = [draft.slice(source, axis, run[0][1], run[-1][1] + 1) for run in runs]
    whole = [draft.node("Concat", [piece.output[0] for piece in pieces], axis=axis)] if len(pieces) > 1 else []
    return [*made, *pieces, *whole, draft.reshape((whole or pieces)[0].output[0], out, node.output[0])]


def _wrap(node: onnx.NodeProto, draft: Draft) -> Made:
    """Circular padding: pnnx takes it for replication. As slices of the other side, put before and behind."""
    pads = draft.consts.get(node.input[1]) if node.op_type == "Pad" and attribute(node, "mode") == b"wrap" else None
    if pads is None or len(node.input) > 3 or (pads < 0).any():
        return None
    made, value, rank = [], node.input[0], len(draft.shapes[node.input[0]])
    for axis, (before, after) in enumerate(zip(pads[:rank].tolist(), pads[rank:].tolist())):
        size = draft.shapes[node.input[0]][axis]
        if not before and not after:
            continue
        pieces = [draft.slice(value, axis, size - before, size)] if before else []
        behind = [draft.slice(value, axis, 0, after)] if after else []
        parts = [*(p.output[0] for p in pieces), value, *(p.output[0] for p in behind)]
        made += [*pieces, *behind, draft.node("Concat", parts, axis=axis)]
        value = made[-1].output[0]
    if made:
        made[-1].output[0] = node.output[0]
    return made or None


def _softplus(node: onnx.NodeProto, draft: Draft) -> Made:
    """torch's softplus is the identity above 20, where float32 does not tell the two apart: without the choice."""
    if node.op_type != "Where" or any(name not in draft.makers for name in (node.input[0], node.input[2])):
        return None
    choice, soft = draft.makers[node.input[0]], draft.makers[node.input[2]]
    limit = draft.consts.get(choice.input[1], np.zeros(2)) if choice.op_type == "Greater" else np.zeros(2)
    alike = soft.op_type == "Softplus" and choice.input[0] == soft.input[0] == node.input[1]
    if not alike or limit.size != 1 or float(limit.reshape(())) < 17:
        return None
    return [draft.node("Softplus", [node.input[1]], node.output[0])]


_RULES: tuple[Rule, ...] = (
    _softplus, _reduce, _instances, _power, _steps, _tile, _gather, _wrap,
    _ncnn_axes.squeeze, _ncnn_axes.leading, _ncnn_axes.joined, _ncnn_axes.pairs,
    _ncnn_axes.images, _ncnn_axes.transpose, _ncnn_axes.chain,
)  # fmt: skip
