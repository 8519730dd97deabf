"""Q/DQ as TensorRT wants it, checked on the ONNX file without a device; and the precision of each layer as written.

NVIDIA TensorRT documentation, Working with Quantized Types: INT8 is symmetric (zero point 0), weights per tensor or per
output channel, activations per tensor, Q and DQ around whatever is to run in INT8. Per output channel is axis 0 of a
convolution's weight (K, C / groups, ...) and axis 1 of a transposed one's (C, K / groups, ...): there the axis does not
reach all output channels when there are groups (NVIDIA/TensorRT#1694, #2280), so such a weight takes one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgegen import onnx_cost
from edgegen.runtimes import _tensorrt_parser
from edgegen.types import Inspection, Problem, Target

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_FIRST_FP16_SCALES = 19
_FLOAT_NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def lint(source: Path | onnx.ModelProto, target: Target) -> list[Problem]:
    """Everything about a file that TensorRT on the target is known to refuse or to get wrong."""
    model = onnx.load(source) if isinstance(source, Path) else source
    graph = _Graph(model)
    found = _tensorrt_parser.problems(model, target)
    for node in model.graph.node:
        if node.op_type in _QDQ:
            rules = (*graph.values(node), *graph.pairs(node))
        elif node.op_type in onnx_cost.WEIGHTED:
            rules = (*graph.weighted(node),)
        elif node.op_type == "Add":
            rules = (*graph.addition(node),)
        else:
            rules = ()
        found += [Problem(node.op_type, node.name, rule) for rule in rules]
    return found


def read_back(source: Path | onnx.ModelProto) -> Inspection:
    """Precision of each weighted layer as the file asks for it: int8 where DQ feeds both of its operands.

    A weight behind Q/DQ counts as one byte an element, as in the engine, whether the file holds it in INT8 or not.
    """
    model = onnx.load(source) if isinstance(source, Path) else source
    graph, total = _Graph(model), onnx_cost.cost(model)
    by_name = {node.name: node for node in model.graph.node}
    layers = {layer.name: graph.precision(by_name[layer.name]) for layer in total.layers}
    macs = sum(layer.macs for layer in total.layers if layers[layer.name] == "int8")
    narrow = wide = 0
    weights = {layer.weight: layers[layer.name] == "int8" for layer in total.layers if layer.weight}
    for name, quantized in weights.items():
        tensor = graph.consts[name]
        count = int(np.prod(tensor.dims))
        narrow += count if quantized else 0
        wide += 0 if quantized else count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return Inspection(layers, narrow / max(1, narrow + wide), macs / max(1, total.macs))


def sparse(source: Path | onnx.ModelProto) -> list[str]:
    """Layers of which at least two in every four successive weights along the inputs are zero.

    Mishra et al., 2021, arXiv:2104.08378, section 3: what sparse tensor cores take.
    """
    model = onnx.load(source) if isinstance(source, Path) else source
    consts, makers = onnx_cost.constants(model), {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        name = onnx_cost.weight_of(node, consts, makers) if node.op_type in onnx_cost.WEIGHTED else ""
        if name and _two_of_four(numpy_helper.to_array(consts[name]), _input_axis(node)):
            found.append(node.name)
    return found


def _input_axis(node: onnx.NodeProto) -> int:
    """Axis of the weight that is summed over."""
    if node.op_type == "Gemm":
        return int(next((a.i for a in node.attribute if a.name == "transB"), 0))
    return {"Conv": 1, "ConvTranspose": 0}.get(node.op_type, -2)


def _two_of_four(weight: np.ndarray, axis: int) -> bool:
    if weight.ndim < 2 or weight.shape[axis] % 4:
        return False
    groups = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool(((groups == 0).sum(1) >= 2).all())


class _Graph:
    """A model with what its rules look up: constants, producers, consumers, types and shapes."""

    def __init__(self, model: onnx.ModelProto):
        self.consts, self.shapes = onnx_cost.constants(model), onnx_cost.static_shapes(model)
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.types = {t.name: t.data_type for t in model.graph.initializer}
        for info in (*inferred.input, *inferred.output, *inferred.value_info):
            self.types[info.name] = info.type.tensor_type.elem_type
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)

    def source(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear behind a tensor, looked up through casts and moves of data; None if there is none."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Cast", "Transpose", "Reshape"):
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def precision(self, node: onnx.NodeProto) -> str:
        if all(self.source(name) is not None for name in node.input[:2]):
            return "int8"
        return _FLOAT_NAMES.get(self.types.get(node.input[0], 0), "unknown")

    def values(self, node: onnx.NodeProto) -> Iterator[str]:
        """Zero point 0, INT8, scales positive and finite, known when the engine is built."""
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero and zero not in self.consts:
            yield "give it a constant zero point of 0"
        elif zero and np.any(numpy_helper.to_array(self.consts[zero])):
            yield "quantize symmetrically: TensorRT takes no zero point but 0"
        stored = self.types.get(zero if zero else node.input[0] if node.op_type == "DequantizeLinear" else "", 0)
        if stored not in (TensorProto.INT8, TensorProto.UNDEFINED) or (not zero and node.op_type == "QuantizeLinear"):
            kind = TensorProto.DataType.Name(stored) if zero else "the default, UINT8"
            yield f"quantize to INT8, it is {kind}"
        if node.input[1] not in self.consts:
            yield "give it a constant scale"
            return
        scale = numpy_helper.to_array(self.consts[node.input[1]])
        if not np.isfinite(scale).all() or not (scale > 0).all():
            yield f"its scale must be positive and finite, the smallest is {float(np.min(scale)):g}"
        if scale.dtype != np.float32 and self.opset < _FIRST_FP16_SCALES:
            yield f"a scale of {scale.dtype} needs opset {_FIRST_FP16_SCALES}, the file is in {self.opset}"

    def pairs(self, node: onnx.NodeProto) -> Iterator[str]:
        """Q feeds DQ and nothing else; DQ takes a Q's result or a stored weight; activations have one scale."""
        if node.op_type == "QuantizeLinear":
            if any(user.op_type != "DequantizeLinear" for user in self.consumers.get(node.output[0], [])):
                yield "let its result go through DequantizeLinear only"
            if node.input[0] not in self.consts and self.scales(node) > 1:
                yield "give an activation one scale: TensorRT takes scales per channel for weights alone"
        elif node.input[0] not in self.consts:
            maker = self.producers.get(node.input[0])
            if maker is None or maker.op_type != "QuantizeLinear":
                yield "let it follow a QuantizeLinear, or a stored weight"

    def weighted(self, node: onnx.NodeProto) -> Iterator[str]:
        """Both operands through DQ or none; the weight's axis is that of the output channels; no quantized bias."""
        sources = [self.source(name) for name in node.input[:2]]
        quantized = [source is not None for source in sources]
        if any(quantized) and not all(quantized):
            yield f"quantize its {'weight' if quantized[0] else 'input'} too: one without the other runs in float"
        if len(node.input) > 2 and node.input[2] and self.source(node.input[2]) is not None:
            yield "keep its bias in float: TensorRT quantizes biases itself"
        weight = sources[1]
        if weight is not None and self.scales(weight) > 1 and self.stored(weight):
            yield from self.channels(node, weight)

    def channels(self, node: onnx.NodeProto, weight: onnx.NodeProto) -> Iterator[str]:
        """Scales per channel lie along the output channels, one for each."""
        flags = {a.name: a.i for a in node.attribute}
        shape = self.shapes.get(weight.input[0], ())
        if node.op_type == "ConvTranspose" and flags.get("group", 1) > 1:
            yield "give the weight of a transposed convolution with groups one scale, or leave the layer in float"
            return
        last = len(shape) - 1
        wanted = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if flags.get("transB") else 1}.get(node.op_type, last)
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        axis += len(shape) if axis < 0 else 0
        if axis != wanted:
            yield f"put its weight's scales along axis {wanted}, the output channels; they lie along axis {axis}"
        elif shape and self.scales(weight) != shape[axis]:
            yield f"give its weight {shape[axis]} scales, one for each channel; there are {self.scales(weight)}"

    def addition(self, node: onnx.NodeProto) -> Iterator[str]:
        """Both inputs of a residual sum are INT8: behind DQ, or the result of an INT8 layer, which the sum joins."""
        sources = [self.producers.get(name) for name in node.input]
        through = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        joined = [source is not None and source.op_type in onnx_cost.WEIGHTED and self.precision(source) == "int8"
                  for source in sources]  # fmt: skip
        if any(through) and not all(a or b for a, b in zip(through, joined)):
            yield "quantize both inputs of the sum, or none"

    def scales(self, node: onnx.NodeProto) -> int:
        return int(np.prod(self.consts[node.input[1]].dims)) if node.input[1] in self.consts else 1

    def stored(self, node: onnx.NodeProto) -> bool:
        """Whether a DQ's data is a constant, directly or through a Q."""
        if node.input[0] in self.consts:
            return True
        maker = self.producers.get(node.input[0])
        return maker is not None and maker.input[0] in self.consts
