"""Exact rewrites of an ONNX graph that need fewer multiplications or waste fewer lanes; node names are kept.

`merge_upsampling`: nearest-neighbour x2 and a 3x3 convolution are one transposed 4x4 convolution of stride 2 (each
output pixel sees only 2x2 different inputs: 2.25 times fewer MACs; the sub-pixel view of Shi et al., 2016,
arXiv:1609.05158). With T = [[0,0,1],[0,1,1],[1,1,0],[1,0,0]] the kernel is T w T'. Zero padding of the conv stays
zero padding; padding of 1 that reflects or repeats the enlarged image repeats the small one's edge.

`block_output`: a convolution to few channels (an RGB image: 3 of a register's 16 lanes) computes b x b neighbouring
pixels as channels, with the kernel shifted once for each, at stride b, followed by DepthToSpace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# row k: which of the three taps fall on the input pixel that the transposed kernel's tap k spreads
_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)
_FEW = 4  # output channels
_ENLARGES = {b"asymmetric": (b"floor",), b"half_pixel": (b"round_prefer_floor", b"round_prefer_ceil")}


class _Graph:
    """Lookup of producers, uses and constants of a model that is being changed."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.constants = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.uses = [name for node in model.graph.node for name in node.input] + [o.name for o in model.graph.output]
        self.taken = set(self.uses) | set(self.constants) | set(self.makers)

    def constant(self, name: str) -> np.ndarray | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def maker(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of that kind whose only user is the asking one."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind and self.uses.count(name) == 1 else None

    def add(self, base: str, value: np.ndarray) -> str:
        name = next(n for n in (base, *(f"{base}_{i}" for i in range(1, 10_000))) if n not in self.taken)
        self.taken.add(name)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        """Put `new` where the last of `old` was."""
        nodes = list(self.graph.node)
        place = nodes.index(old[-1])
        kept = [node for node in nodes[:place] if not any(node is o or node == o for o in old)]
        rest = nodes[place + 1 :]
        del self.graph.node[:]
        self.graph.node.extend([*kept, *new, *rest])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _plain(node: onnx.NodeProto) -> dict[str, Any] | None:
    """Attributes of a stride-1, undilated, ungrouped 2-d convolution with explicit pads, or None."""
    found = _attributes(node)
    standard = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}
    if any(found.get(key, value) != value for key, value in standard.items()):
        return None
    return {**found, "pads": list(found.get("pads", [0, 0, 0, 0]))}


def _doubles(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Whether a Resize repeats every pixel of (N, C, H, W) 2x2 times."""
    found = _attributes(node)
    modes = _ENLARGES.get(found.get("coordinate_transformation_mode", b"half_pixel"), ())
    scales = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    nearest = found.get("mode", b"nearest") == b"nearest"
    fits = nearest and found.get("nearest_mode", b"round_prefer_floor") in modes
    return fits and scales is not None and scales.tolist() == [1.0, 1.0, 2.0, 2.0]


def _border(graph: _Graph, conv: onnx.NodeProto, pads: list[int]) -> tuple[str, onnx.NodeProto | None] | None:
    """("zero" or "edge", the Pad node if there is one) of a 3x3 convolution that keeps the size, or None."""
    pad = graph.maker(conv.input[0], "Pad")
    if pad is None:
        return ("zero", None) if pads == [1, 1, 1, 1] else None
    amounts = graph.constant(pad.input[1]) if len(pad.input) > 1 else None
    mode = _attributes(pad).get("mode", b"constant")
    plain = len(pad.input) < 4 and amounts is not None and amounts.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    return ("edge", pad) if plain and mode in (b"reflect", b"edge") and pads == [0, 0, 0, 0] else None


def merge_upsampling(model: onnx.ModelProto) -> dict[str, str]:
    """Nearest x2, [Pad by 1: reflect or edge], 3x3 convolution -> [Pad edge], ConvTranspose 4x4 stride 2. In place.

    Returns:
        Node name of each convolution that was rewritten -> what was done.
    """
    return _each_convolution(model, _merge)


def block_output(model: onnx.ModelProto, *, block: int = 2) -> dict[str, str]:
    """Convolution to at most 4 channels -> the same at stride `block` to block^2 times as many, DepthToSpace. In place.

    Only where the output's height and width (static) divide by `block`.
    """
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.output)
    }

    def one(graph: _Graph, conv: onnx.NodeProto) -> str:
        return _block(graph, conv, shapes.get(conv.output[0], []), block)

    return _each_convolution(model, one)


def _each_convolution(model: onnx.ModelProto, one: Callable[[_Graph, onnx.NodeProto], str]) -> dict[str, str]:
    changed: dict[str, str] = {}
    for name in [node.name for node in model.graph.node if node.op_type == "Conv"]:
        conv = next(node for node in model.graph.node if node.name == name and node.op_type == "Conv")
        if text := one(_Graph(model), conv):
            changed[name] = text
    if changed:
        used = {name for node in model.graph.node for name in node.input}
        kept = [t for t in model.graph.initializer if t.name in used]
        del model.graph.initializer[:], model.graph.value_info[:]
        model.graph.initializer.extend(kept)
    return changed


def _merge(graph: _Graph, conv: onnx.NodeProto) -> str:
    weight, found = graph.constant(conv.input[1]), _plain(conv)
    if weight is None or found is None or weight.shape[2:] != (3, 3):
        return ""
    border = _border(graph, conv, found["pads"])
    if border is None:
        return ""
    resize = graph.maker(border[1].input[0] if border[1] else conv.input[0], "Resize")
    if resize is None or not _doubles(graph, resize):
        return ""
    merged = np.einsum("ka,lb,oiab->iokl", _SPREAD, _SPREAD, weight.astype(np.float64)).astype(weight.dtype)
    source, nodes, cut = resize.input[0], [], 1
    if border[1] is not None:
        amounts = graph.add(f"{conv.name}.edge", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        nodes = [helper.make_node("Pad", [source, amounts], [border[1].output[0]], border[1].name, mode="edge")]
        source, cut = border[1].output[0], 3
    inputs = [source, graph.add(f"{conv.input[1]}.merged", merged), *conv.input[2:]]
    options: dict[str, Any] = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [cut] * 4}
    nodes.append(helper.make_node("ConvTranspose", inputs, list(conv.output), conv.name, **options))
    graph.replace([node for node in (resize, border[1], conv) if node is not None], nodes)
    return "nearest x2 and 3x3 convolution -> transposed 4x4 convolution of stride 2"


def _block(graph: _Graph, conv: onnx.NodeProto, shape: list[int], block: int) -> str:
    weight, found = graph.constant(conv.input[1]), _plain(conv)
    bias = graph.constant(conv.input[2]) if len(conv.input) > 2 else None
    if weight is None or found is None or (len(conv.input) > 2 and bias is None):
        return ""
    outputs, inputs, height, width = weight.shape
    divides = len(shape) == 4 and all(size and size % block == 0 for size in shape[2:])
    if outputs > _FEW or height * width == 1 or not divides:
        return ""
    wide = np.zeros((block, block, outputs, inputs, height + block - 1, width + block - 1), weight.dtype)
    for dy in range(block):
        for dx in range(block):
            wide[dy, dx, :, :, dy : dy + height, dx : dx + width] = weight
    blocked = f"{conv.output[0]}.blocked"
    names = [conv.input[0], graph.add(f"{conv.input[1]}.blocked", wide.reshape(-1, *wide.shape[3:]))]
    if bias is not None:
        names.append(graph.add(f"{conv.input[2]}.blocked", np.tile(bias, block * block)))
    options: dict[str, Any] = {"kernel_shape": list(wide.shape[4:]), "strides": [block, block], "pads": found["pads"]}
    spread = helper.make_node(
        "DepthToSpace", [blocked], list(conv.output), f"{conv.name}/DepthToSpace", blocksize=block, mode="DCR"
    )
    graph.replace([conv], [helper.make_node("Conv", names, [blocked], conv.name, **options), spread])
    return f"{outputs} channels -> {block}x{block} pixels at once as {outputs * block * block} channels"
