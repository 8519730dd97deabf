"""Which operators of an ONNX file the deep learning accelerator (DLA) of a Jetson takes, and what cures the others.

NVIDIA TensorRT documentation, DLA Supported Layers and Restrictions
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/dla-layer-restrictions.html: general limits,
activations, concatenation, convolution, deconvolution, element-wise, LRN were read there; pooling, reduction, resize,
slice, softmax and the ranges of padding and dilation are from memory of the same page). On the device the parser's flag
REPORT_CAPABILITY_DLA has the last word. What the DLA does not take runs on the GPU when GPU fallback is allowed, and
every change between the two costs a copy and a conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgegen import onnx_cost
from edgegen.types import Problem, Target

_ANY = frozenset(("Relu", "Sigmoid", "Tanh", "Clip", "Identity", "BatchNormalization", "Constant", "Dropout"))
_SUMS = frozenset(("Add", "Sub", "Mul", "Max", "Min", "Div", "Pow"))
_CURES = {
    "LayerNormalization": "use batch normalization, which folds into the convolution before it",
    "InstanceNormalization": "use batch normalization, which folds into the convolution before it",
    "GroupNormalization": "use batch normalization, which folds into the convolution before it",
    "Gelu": "use ReLU or a sigmoid gate", "Erf": "use ReLU instead of GELU", "HardSwish": "use ReLU",
    "HardSigmoid": "use Sigmoid", "Elu": "use LeakyRelu", "Softplus": "use Relu",
    "Gather": "slice or split with constant bounds", "MatMul": "use a 1x1 convolution with constant weights",
    "Einsum": "use 1x1 convolutions", "GridSample": "use resize and convolution", "Pad": "put the padding into the "
    "convolution or pooling behind it, or pad with zeros", "DepthToSpace": "upsample by a transposed convolution or by "
    "Resize, followed by a convolution", "SpaceToDepth": "use a convolution with a stride",
    "Split": "run two convolutions instead of one that is split", "ReduceMean": "use average pooling with windows up "
    "to 8x8, in steps", "GlobalAveragePool": "use average pooling with windows up to 8x8, in steps",
}  # fmt: skip


def dla(source: Path | onnx.ModelProto, target: Target) -> list[Problem]:
    """What keeps a file off the target's DLA: operator, layer and the nearest cure. Empty for a target without DLA.

    Q/DQ nodes are told once: before TensorRT 11.4 the DLA takes FP16 files, and INT8 only by calibration, which
    edgegen does not do.
    """
    cores = target.release.dla if target.release else 0
    if not cores:
        return []
    model = onnx.load(source) if isinstance(source, Path) else source
    facts, found = _Facts(model), []
    quantized = False
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            quantized = True
            continue
        found += [Problem(node.op_type, node.name, rule) for rule in _rules(node, facts, target)]
    if quantized:
        found.insert(0, Problem("QuantizeLinear", "", "build FP16 for the DLA: it takes no Q/DQ before TensorRT 11.4"))
    return found


class _Facts:
    """Shapes, constants and attributes of a model."""

    def __init__(self, model: onnx.ModelProto):
        self.shapes, self.consts = onnx_cost.static_shapes(model), onnx_cost.constants(model)

        made = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
        self.constant = {*self.consts, *(name for node in made for name in node.output)}

    def value(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self.consts[name]) if name in self.consts else None


def _rules(node: onnx.NodeProto, facts: _Facts, target: Target) -> Iterator[str]:
    """Why the DLA does not take a node, as cures."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shape = facts.shapes.get(node.input[0] if node.input else "", ())
    if len(shape) > 3 and int(np.prod(shape[:-3])) > 4096:
        yield "give it a batch of at most 4096"
    if any(d > 8192 for d in shape[-3:]):
        yield f"keep channels, height and width at most 8192, they are {shape[-3:]}"
    if node.op_type in _ANY:
        return
    rule = _RULES.get(node.op_type)
    if rule is None:
        yield _CURES.get(node.op_type, f"replace {node.op_type}: the DLA has no such layer")
    else:
        yield from rule(node, given, shape, facts, target)


def _within(values: Any, low: int, high: int) -> bool:
    return all(low <= int(v) <= high for v in values)


def _convolution(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    weight = facts.shapes.get(node.input[1], ())
    if len(weight) != 4:
        yield "use a two-dimensional convolution"
        return
    if node.input[1] not in facts.constant:
        yield "use one kernel for all inputs: this one is computed from the input, as in CondConv"
    if not _within(weight[2:], 1, 32):
        yield f"use kernels of 1 to 32, it is {weight[2:]}"
    if not _within(given.get("strides", (1,)), 1, 8):
        yield f"use strides of 1 to 8, they are {tuple(given['strides'])}"
    if not _within(given.get("pads", (0,)), 0, 31):
        yield f"use paddings of 0 to 31, they are {tuple(given['pads'])}"
    if not _within(given.get("dilations", (1,)), 1, 32):
        yield f"use dilations of 1 to 32, they are {tuple(given['dilations'])}"
    if not _within((weight[0], weight[1] * given.get("group", 1)), 1, 8192):
        yield "use 1 to 8192 channels"


def _deconvolution(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    weight = facts.shapes.get(node.input[1], ())
    if len(weight) != 4:
        yield "use a two-dimensional transposed convolution"
        return
    if given.get("group", 1) != 1:
        yield "use a transposed convolution without groups"
    if not _within(given.get("dilations", (1,)), 1, 1):
        yield "use a transposed convolution without dilation"
    if any((*given.get("pads", (0,)), *given.get("output_padding", (0,)))):
        yield "use no padding: a kernel as large as its stride, or resize and convolution"
    if not _within((*weight[2:], *given.get("strides", (1,))), 1, 32):
        yield "use kernels and strides of 1 to 32"


def _pooling(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    window = given.get("kernel_shape", ())
    if len(window) != 2:
        yield "use two-dimensional pooling"
    elif not _within(window, 1, 8):
        yield f"pool in steps with windows of 1 to 8, it is {tuple(window)}"
    if not _within(given.get("pads", (0,)), 0, 7) or not _within(given.get("strides", (1,)), 1, 16):
        yield "use paddings of 0 to 7 and strides of 1 to 16"
    if node.op_type == "AveragePool" and any(given.get("pads", ())) and not given.get("count_include_pad", 0):
        yield "count the padding in the average, or pool without padding"


def _concatenation(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if len(shape) != 4 or given.get("axis", 1) % max(1, len(shape)) != 1:
        yield "join along the channel axis"


def _elementwise(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    shapes = [facts.shapes.get(name, ()) for name in node.input]
    plain = all(len(s) in (0, 4) or int(np.prod(s)) == 1 or name in facts.consts for s, name in zip(shapes, node.input))
    if not plain:
        yield "give it tensors of four dimensions"


def _leaky(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if node.op_type == "PRelu" and node.input[1] not in facts.consts:
        yield "give it a constant slope"


def _resize(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    out = facts.shapes.get(node.output[0], ())
    ratios = [b / a for a, b in zip(shape[2:], out[2:])] if len(shape) == len(out) == 4 else []
    mode = given.get("mode", b"nearest")
    most = {b"nearest": 32, b"linear": 4}.get(mode, 0)
    if not most:
        yield "resize by nearest or linear"
    elif not ratios or any(r != int(r) or not 1 <= r <= most for r in ratios):
        yield f"enlarge by whole factors of 1 to {most}"


def _softmax(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if target.compute_capability != "8.7":
        yield "leave it out of the network and compute it afterwards: only Orin's DLA has softmax"
    elif shape and shape[given.get("axis", -1)] > 1024:
        yield "take it over at most 1024 values"


def _slice(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if len(shape) != 4 or any(name and name not in facts.consts for name in node.input[1:]):
        yield "slice a tensor of four dimensions with constant bounds"


def _gemm(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if node.input[1] not in facts.consts:
        yield "use a 1x1 convolution with constant weights"


def _reshape(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    out = facts.shapes.get(node.output[0], ())
    if len(shape) != 4 or (len(out) != 4 and int(np.prod(out[1:])) != int(np.prod(shape[1:]))):
        yield "keep four dimensions; a flattening at the end runs on the GPU"


def _transpose(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    order = given.get("perm", ())
    if len(order) != 4 or order[0] != 0:
        yield "keep four dimensions, and the batch first"


def _lrn(node: Any, given: dict[str, Any], shape: Any, facts: _Facts, target: Target) -> Iterator[str]:
    if given.get("size") not in (3, 5, 7, 9):
        yield "use a window of 3, 5, 7 or 9"


_RULES: dict[str, Callable[[Any, dict[str, Any], Any, _Facts, Target], Iterator[str]]] = {
    "Conv": _convolution, "ConvTranspose": _deconvolution, "MaxPool": _pooling, "AveragePool": _pooling,
    "Concat": _concatenation, "LeakyRelu": _leaky, "PRelu": _leaky, "Resize": _resize, "Softmax": _softmax,
    "Slice": _slice, "Gemm": _gemm, "Reshape": _reshape, "Flatten": _reshape, "LRN": _lrn,
    "Squeeze": _reshape, "Unsqueeze": _reshape, "Transpose": _transpose,
    **dict.fromkeys(_SUMS, _elementwise), "Cast": lambda *_: iter(()),
}  # fmt: skip
