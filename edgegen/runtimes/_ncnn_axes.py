"""Rewrites for pnnx of what moves axes: ncnn has no batch axis and at most four others, so shapes begin with 1."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx

from edgegen.runtimes._ncnn_draft import Draft, Made, attribute

_PAIRS = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Min"))
_IMAGES = frozenset(("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))
_MOST_WEIGHTS = 1 << 18  # a megabyte a layer


def squeeze(node: onnx.NodeProto, draft: Draft) -> Made:
    """Squeeze, Unsqueeze and Flatten as Reshape with numbers, so that chains of them become one."""
    if node.op_type not in ("Squeeze", "Unsqueeze", "Flatten") or node.input[0] in draft.consts:
        return None
    return [draft.reshape(node.input[0], draft.shapes[node.output[0]], node.output[0])]


def leading(node: onnx.NodeProto, draft: Draft) -> Made:
    """x[i:j] along the first axis, as query, key and value are cut: ncnn has no such axis. Along the second instead."""
    if node.op_type != "Slice" or len(node.input) < 4 or len(draft.shapes[node.input[0]]) < 2:
        return None
    shape, out = draft.shapes[node.input[0]], draft.shapes[node.output[0]]
    wanted = [draft.consts.get(name) for name in node.input[1:4]]
    if shape[0] == 1 or any(value is None or value.size != 1 for value in wanted):
        return None
    start, stop, axis = (int(value.ravel()[0]) for value in wanted if value is not None)
    if axis % len(shape) or (len(node.input) > 4 and int(draft.consts.get(node.input[4], np.zeros(1)).ravel()[0]) != 1):
        return None
    start, stop = (min(value + shape[0] if value < 0 else value, shape[0]) for value in (start, stop))
    flat = draft.reshape(node.input[0], (1, shape[0], math.prod(shape[1:])))
    cut = draft.slice(flat.output[0], 1, start, stop)
    return [flat, cut, draft.reshape(cut.output[0], out, node.output[0])]


def joined(node: onnx.NodeProto, draft: Draft) -> Made:
    """Tensors joined along the first axis, as the answers of two heads are stacked: along the second instead."""
    if node.op_type != "Concat" or any(name in draft.consts or name not in draft.shapes for name in node.input):
        return None
    out = draft.shapes[node.output[0]]
    if len(out) < 2 or int(attribute(node, "axis", 0)) % len(out):
        return None
    flat = [draft.reshape(name, (1, draft.shapes[name][0], math.prod(out[1:]))) for name in node.input]
    together = draft.node("Concat", [part.output[0] for part in flat], axis=1)
    return [*flat, together, draft.reshape(together.output[0], out, node.output[0])]


def pairs(node: onnx.NodeProto, draft: Draft) -> Made:
    """Sum, product and the like of too many axes, as Swin adds its mask: with axes merged that are broadcast alike."""
    if node.op_type not in _PAIRS:
        return None
    out = draft.shapes[node.output[0]]
    if len(out) <= (draft.most + 1 if out[0] == 1 else 4):
        return None
    sides = [(1,) * (len(out) - len(draft.shapes[name])) + draft.shapes[name] for name in node.input]
    groups: list[list[int]] = []
    for axis in (axis for axis, size in enumerate(out) if size > 1):
        alike = groups and all((side[axis] > 1) == (side[groups[-1][0]] > 1) for side in sides)
        groups[-1].append(axis) if alike else groups.append([axis])
    if len(groups) > draft.most:
        return None
    made, inputs = [], list(node.input)
    for at, side in enumerate(sides):
        if math.prod(side) > 1:
            merged = (1, *(math.prod(side[axis] for axis in group) for group in groups))
            made.append(draft.reshape(inputs[at], merged))
            inputs[at] = made[-1].output[0]
    both = draft.node(node.op_type, inputs)
    return [*made, both, draft.reshape(both.output[0], out, node.output[0])]


def images(node: onnx.NodeProto, draft: Draft) -> Made:
    """Convolution or pooling of several images, as MViT's of each head: as groups of one image of all their channels.

    The weights are stored once an image; where that is too much the refusals tell.
    """
    if node.op_type not in _IMAGES or draft.shapes[node.input[0]][0] == 1:
        return None
    shape, out = draft.shapes[node.input[0]], draft.shapes[node.output[0]]
    weighted = node.op_type == "Conv"
    if len(node.output) > 1 or (weighted and shape[0] * math.prod(draft.shapes[node.input[1]]) > _MOST_WEIGHTS):
        return None
    first = draft.reshape(node.input[0], (1, shape[0] * shape[1], *shape[2:]))
    stored = [draft.node("Concat", [name] * shape[0], axis=0) for name in node.input[1:] if weighted and name]
    options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if weighted:
        options["group"] = shape[0] * int(options.get("group", 1))
    both = draft.node(node.op_type, [first.output[0], *(part.output[0] for part in stored)], **options)
    return [first, *stored, both, draft.reshape(both.output[0], out, node.output[0])]


def transpose(node: onnx.NodeProto, draft: Draft) -> Made:
    """Transpose of five axes and more, or of a first axis that is no batch: with axes that stay neighbours merged.

    What still has more than `draft.most` is done in steps of at most as many, where there are such steps. One that
    moves but axes of 1 is a Reshape. That of a query of one token, as class attention has, must be: pnnx would make a
    MultiHeadAttention of it, which takes the packed channels of a single row for rows and reads behind its memory.
    """
    if node.op_type != "Transpose" or node.input[0] in draft.consts:
        return None
    shape, out = draft.shapes[node.input[0]], draft.shapes[node.output[0]]
    order = [int(axis) for axis in attribute(node, "perm", range(len(shape))[::-1])]
    moved = [axis for axis in order if shape[axis] > 1]
    real = sorted(moved)
    if len(shape) <= 4 and shape[0] == 1 and order[0] == 0 and moved != real:
        return None
    sizes = tuple(shape[axis] for axis in real)
    steps = _steps(tuple(real.index(axis) for axis in moved), draft.most)
    if steps is None:
        return None
    made, value = [], node.input[0]
    for step in steps:
        blocks = _blocks(step)
        ordered = sorted(blocks)
        merged = (1, *(math.prod(sizes[axis] for axis in block) for block in ordered))
        made.append(draft.reshape(value, merged))
        made.append(draft.node("Transpose", [made[-1].output[0]], perm=[0, *(1 + ordered.index(b) for b in blocks)]))
        value, sizes = made[-1].output[0], tuple(sizes[axis] for axis in step)
    return [*made, draft.reshape(value, out, node.output[0])]


def _blocks(order: Sequence[int]) -> list[list[int]]:
    """Runs of axes that are neighbours before and after a permutation."""
    blocks: list[list[int]] = []
    for axis in order:
        if blocks and axis == blocks[-1][-1] + 1:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    return blocks


@functools.cache
def _steps(order: tuple[int, ...], most: int) -> tuple[tuple[int, ...], ...] | None:
    """The fewest permutations of at most `most` blocks each that make one; none for one that changes nothing."""
    start = tuple(range(len(order)))
    if len(_blocks(order)) <= most:
        return (order,) if order != start else ()
    if len(order) > 6:
        return None
    single = [step for step in itertools.permutations(start) if step != start and len(_blocks(step)) <= most]
    reached: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {start: ()}
    edge = [start]
    while edge and order not in reached:
        before, edge = edge, []
        for place, step in itertools.product(before, single):
            made = tuple(place[axis] for axis in step)
            if made not in reached:
                reached[made] = (*reached[place], step)
                edge.append(made)
    return reached.get(order)


def chain(node: onnx.NodeProto, draft: Draft) -> Made:
    """A reshape of a reshape takes what the first one takes."""
    if node.op_type != "Reshape":
        return None
    source = node.input[0]
    while source in draft.makers and draft.makers[source].op_type == "Reshape":
        source = draft.makers[source].input[0]
    if source == node.input[0]:
        return None
    return [draft.reshape(source, draft.shapes[node.output[0]], node.output[0])]
