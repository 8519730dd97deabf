"""FP16 weights and arithmetic baked into an ONNX file, with FP32 inputs and outputs.

TensorRT 11 is strongly typed only, so precision has to be in the file. Sums of squares overflow FP16 (the largest
value is 65,504), so normalisation, softmax and whatever looks like a variance stay in FP32, and a chain of such
operations stays in FP32 between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgegen import errors, fp16_lint, onnx_files
from edgegen.fp16_lint import FP16_MAX
from edgegen.types import Graph, PrecisionPlan

_NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "LpNormalization"}
_SUMS = {"Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
_MAKERS = {"Range", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
KEPT_FP32 = frozenset(_NORMS | _SUMS | _MAKERS | {"CumSum", "TopK", "NonMaxSuppression", "RoiAlign", "OneHot"})
_SMALLEST = np.float16(6e-8)  # a scale must not become zero
_FIRST_FP16_QDQ = 19  # before this opset QuantizeLinear takes float32 only
_ALWAYS_FLOAT = {"Resize": (1, 2)}  # region and scales: float32 by definition


def to_fp16(graph: Graph, out: Path, *, calibration: Path | None = None) -> Graph:
    """Write the graph with FP16 weights and arithmetic; inputs and outputs stay FP32 (casts at the border).

    `graph.plan.float_layers` and `float_types` are left in FP32 as well, and with a calibration set whatever
    `fp16_lint` finds on it that FP16 does not hold. A graph with Q/DQ nodes keeps them: scales
    become FP16 and the rest of the graph with them (the operator set is raised to 19, which allows it).

    Raises:
        errors.ModelError: a weight is too large for FP16 (named), or the graph has branches or loops.
    """
    model = onnx.load(graph.onnx)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized and _opset(model) < _FIRST_FP16_QDQ:
        model = onnx.version_converter.convert_version(model, _FIRST_FP16_QDQ)
    # what an INT8 plan keeps in float is kept out of INT8, not out of FP16
    plan = PrecisionPlan("fp16") if quantized else graph.plan
    flagged = fp16_lint.lint(graph, calibration) if calibration is not None else {}
    kept_types, kept_names = KEPT_FP32 | set(plan.float_types), {*plan.float_layers, *flagged}
    _Halving(model, graph.stage, lambda node: node.op_type in kept_types or node.name in kept_names).rewrite()
    sha256 = onnx_files.write(onnx_files.tidy(model), out)
    plan = dataclasses.replace(graph.plan, rest="fp16") if quantized else PrecisionPlan("fp16")
    return dataclasses.replace(graph, onnx=out, plan=plan, sha256=sha256)


def _opset(model: onnx.ModelProto) -> int:
    return max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


class _Halving:
    """Rewrites a model in place; each tensor exists in the precision of its maker, and in the other on demand."""

    def __init__(self, model: onnx.ModelProto, stage: str, is_kept: Callable[[onnx.NodeProto], bool]):
        self.graph, self.stage, self.is_kept = model.graph, stage, is_kept
        self.weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        infos = (*inferred.input, *inferred.output, *inferred.value_info)
        self.floating = {i.name for i in infos if i.type.tensor_type.elem_type == TensorProto.FLOAT} | set(self.weights)
        self.made = {i.name: TensorProto.FLOAT for i in model.graph.input}
        self.versions: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> None:
        """Raises errors.ModelError where FP16 is impossible."""
        for node in self.graph.node:
            self._convert(node)
        for info in self.graph.output:
            self._restore(info.name)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)

    def _convert(self, node: onnx.NodeProto) -> None:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise errors.ModelError(f"{self.stage}: {node.op_type} {node.name!r} holds a graph; fp16 needs a plain one")
        wanted = TensorProto.FLOAT if self.is_kept(node) else TensorProto.FLOAT16
        for i, name in enumerate(node.input):
            if name in self.floating:
                whole = i in _ALWAYS_FLOAT.get(node.op_type, ())
                node.input[i] = self._version(name, TensorProto.FLOAT if whole else wanted)
        if wanted == TensorProto.FLOAT16:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
                elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                    attribute.t.CopyFrom(self._half(attribute.t, attribute.t.name))
        self.made.update(dict.fromkeys(node.output, wanted))
        self.nodes.append(node)

    def _version(self, name: str, wanted: int) -> str:
        """The tensor in the wanted precision: itself, a stored copy, or through a cast."""
        if self.made.get(name) == wanted or (name in self.weights and wanted == TensorProto.FLOAT):
            return name
        if (name, wanted) not in self.versions:
            self.versions[name, wanted] = other = f"{name}_{'fp16' if wanted == TensorProto.FLOAT16 else 'fp32'}"
            if name in self.weights:
                self.graph.initializer.append(self._half(self.weights[name], other))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}/Cast", to=wanted))
        return self.versions[name, wanted]

    def _half(self, tensor: TensorProto, name: str) -> TensorProto:
        value = numpy_helper.to_array(tensor)
        peak = float(np.abs(value).max(initial=0))
        if not peak <= FP16_MAX:
            raise errors.ModelError(
                f"{self.stage}: weight {tensor.name!r} reaches {peak:.3g}, FP16 ends at {FP16_MAX:g}; use bf16 or fp32"
            )
        half = value.astype(np.float16)
        return numpy_helper.from_array(np.where((half == 0) & (value > 0), _SMALLEST, half), name)

    def _restore(self, name: str) -> None:
        """Graph outputs are FP32 under their own name."""
        if name not in self.floating or self.made[name] == TensorProto.FLOAT:
            return
        inner = f"{name}_fp16"
        for node in self.nodes:
            node.input[:] = [inner if x == name else x for x in node.input]
            node.output[:] = [inner if x == name else x for x in node.output]
        self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
