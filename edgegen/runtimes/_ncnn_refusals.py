"""What ncnn cannot take, told before any work: operator, layer and nearest cure. Read from the ONNX graph alone.

The lists were made by converting one small network for each construct with pnnx 20261020 and comparing outputs with
ONNX Runtime; what is not on them has not been seen to work.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from edgegen.runtimes._ncnn_draft import Draft, attribute
from edgegen.types import Graph, Problem

_WORKING = frozenset((
    "Abs", "Add", "AveragePool", "Celu", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "Cos", "DepthToSpace",
    "Div", "Einsum", "Elu", "Erf", "Exp", "Expand", "Floor", "Gather", "Gelu", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "GridSample", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LRN",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg",
    "PRelu", "Pad", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Relu", "Reshape", "Resize", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Slice", "Softmax",
    "Softplus", "SpaceToDepth", "Split", "Sqrt", "Sub", "Tanh", "Transpose",
))  # fmt: skip
_CURES = {
    "ArgMax": "give out the scores and take the largest outside the network",
    "TopK": "give out the scores and take the largest outside the network",
    "Where": "write it with Clip, Relu or a product with a constant mask",
    "Greater": "write it with Clip, Relu or Sign",
    "Less": "write it with Clip, Relu or Sign",
    "GatherND": "take channels with slices and a concatenation, or permute the weights of the layer before",
    "Cast": "keep all tensors in float32",
    "CumSum": "multiply with a constant triangular matrix",
    "BatchNormalization": "fold it into the layer before",
    "If": "fix the branch at export",
    "NonZero": "keep all tokens and weigh them by the mask, or a number that is fixed: ncnn has no shapes from data",
    "Loop": "unroll it at export",
}


def problems(model: onnx.ModelProto, graph: Graph) -> list[Problem]:
    """Every reason why ncnn cannot take a prepared model."""
    found = [
        Problem("graph", spec.name, f"fix the batch to 1: ncnn has no batch axis, the input is {spec.shape}")
        for spec in graph.inputs
        if not spec.shape or spec.shape[0] != 1
    ]
    found += [
        Problem("graph", spec.name, f"give it as float32: ncnn takes no {spec.dtype} input")
        for spec in graph.inputs
        if spec.dtype != "float32"
    ]
    draft = Draft.of(model)
    for node in model.graph.node:
        cure = _cure(node, draft)
        if cure:
            found.append(Problem(node.op_type, node.name, cure))
    return found


def _cure(node: onnx.NodeProto, draft: Draft) -> str:
    """What would make a node convertible; "" when it is."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in _WORKING:
        return _CURES.get(node.op_type, "rewrite it with convolutions, pooling, reshapes and element-wise operations")
    if any(name not in draft.shapes for name in node.output):
        return "fix the input shapes: the shape of its output depends on data"
    shape = draft.shapes[node.output[0]]
    if len(shape) > 5 or (len(shape) == 5 and shape[0] != 1):
        return f"split it: ncnn's tensors have at most four axes besides the batch, this one is {shape}"
    check = _CHECKS.get(node.op_type)
    return check(node, draft) if check else ""


def _gather(node: onnx.NodeProto, draft: Draft) -> str:
    picked = draft.consts.get(node.input[1])
    return "" if picked is not None and picked.ndim == 0 else "take slices with known bounds instead of indices"


def _pow(node: onnx.NodeProto, draft: Draft) -> str:
    power = draft.consts.get(node.input[1], np.zeros(2))
    if power.size != 1:
        return "use one known exponent: ncnn has no power of two tensors that is right below zero"
    value = float(power.reshape(()))
    return "" if value == 2 or value != int(value) else "write it as products: ncnn's power is wrong below zero"


def _slice(node: onnx.NodeProto, draft: Draft) -> str:
    wanted = [draft.consts.get(name) for name in node.input[1:] if name]
    if any(value is None for value in wanted):
        return "slice with known bounds"
    steps = wanted[3].ravel().tolist() if len(wanted) > 3 and wanted[3] is not None else [1]
    return "" if set(steps) <= {1, -1} else "step by a divisor of the size, or take a convolution with stride"


def _pad(node: onnx.NodeProto, draft: Draft) -> str:
    mode, pads = attribute(node, "mode", b"constant"), draft.consts.get(node.input[1]) if len(node.input) > 1 else None
    if pads is None or len(node.input) > 3 or pads.size != 2 * len(draft.shapes.get(node.input[0], ())):
        return "pad every axis by known amounts"
    half = pads.size // 2
    if pads[0] or pads[half]:
        return "do not pad the batch axis"
    if mode == b"constant":
        return ""
    if mode not in (b"reflect", b"edge"):
        return "pad by constant, reflect or edge"
    return "" if half == 4 and not (pads[1] or pads[half + 1]) else "pad height and width of images only"


def _image(node: onnx.NodeProto, draft: Draft) -> str:
    many = draft.shapes.get(node.input[0], (1,))[:1]
    if many in ((1,), *(draft.shapes.get(value.name, (1,))[:1] for value in draft.model.graph.input)):
        return ""  # one image, or told once of the input
    return f"give it one image at a time: ncnn has no batch axis, this one has {many[0]} images"


def _resize(node: onnx.NodeProto, draft: Draft) -> str:
    mode, place = attribute(node, "mode", b"nearest"), attribute(node, "coordinate_transformation_mode", b"half_pixel")
    if attribute(node, "antialias", 0) or attribute(node, "exclude_outside", 0):
        return "resize without antialiasing"
    if mode == b"nearest":
        right = place == b"asymmetric" and attribute(node, "nearest_mode", b"round_prefer_floor") == b"floor"
        return "" if right else "use nearest with asymmetric coordinates and floor, as torch does"
    if mode == b"cubic" and abs(attribute(node, "cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        return "use a cubic coefficient of -0.75, as torch does"
    right = place in (b"half_pixel", b"pytorch_half_pixel", b"align_corners")
    return "" if right else "use half-pixel or aligned-corner coordinates"


_CHECKS: dict[str, Callable[[onnx.NodeProto, Draft], str]] = {
    "Gather": _gather, "Pow": _pow, "Slice": _slice, "Pad": _pad, "Resize": _resize, "Conv": _image,
    "ConvTranspose": _image, "MaxPool": _image, "AveragePool": _image,
}  # fmt: skip
