"""Static post-training quantization of an ONNX graph: streamed calibration, then QuantizeLinear/DequantizeLinear.

Jacob et al., 2018, arXiv:1712.05877: q = clamp(round(x / scale) + zero_point). Weights are INT8 symmetric with a scale
for each output channel; activations are UINT8 asymmetric (u8s8) or INT8 symmetric with zero point 0 (s8s8). With s7 in
place of s8 weights keep to -64..64, for processors that add two products in 16 bits (`saturates` of the runtimes). The
range of an activation is its minimum and maximum over the calibration set, reduced inside the graph, so that memory
does not grow with the number of samples or the size of the activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, onnx_files, onnx_narrow, registry
from edgegen.onnx_cost import constants
from edgegen.types import Graph, PrecisionPlan, TensorSpec

FORMATS = ("u8s8", "s8s8", "u8s7", "s8s7")
PLACEMENTS = ("onnxruntime", "tensorrt", "openvino")

# ONNX Runtime has INT8 kernels for these and none for ConvTranspose, which would run between DQ and Q in float.
_EVERY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CORE = {"onnxruntime": ("Conv", "Gemm", "MatMul"), "tensorrt": _EVERY, "openvino": _EVERY}
# What ONNX Runtime computes or moves in INT8, so that a chain of layers need not go back to float between them.
# Softmax and normalisations are absent: in INT8 they lose accuracy, and ONNX Runtime has no INT8 normalisation.
_BETWEEN = frozenset(
    ("Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool")
) | {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Resize"}


def calibration_feeds(inputs: Sequence[TensorSpec], folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Calibration inputs one batch at a time, from one memory-mapped `<input name>.npy` an input.

    The first axis of every file counts the samples; the rest is the input's shape without its batch. Samples that do
    not fill a batch are left out.

    Raises:
        errors.DataError: a file is missing, holds objects, has another shape or too few samples, or is not finite.
    """
    arrays = {spec.name: _mapped(spec, folder) for spec in inputs}
    count = min(len(array) for array in arrays.values())
    batch = {spec.name: int(spec.shape[0]) if spec.shape else 1 for spec in inputs}
    steps = min(count // size for size in batch.values())
    if steps == 0:
        raise errors.DataError(f"{folder}: {count} calibration samples do not fill a batch of {max(batch.values())}")
    for step in range(steps):
        feed = {}
        for spec in inputs:
            size = batch[spec.name]
            feed[spec.name] = np.ascontiguousarray(arrays[spec.name][step * size : (step + 1) * size], dtype=spec.dtype)
            if not np.isfinite(feed[spec.name]).all():
                raise errors.DataError(f"{folder}: calibration sample {step * size} of {spec.name!r} is not finite")
        yield feed


def _mapped(spec: TensorSpec, folder: Path) -> np.ndarray:
    file = folder / f"{spec.name}.npy"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise errors.DataError(
            f"{file}: not a readable calibration file ({error}); write it with numpy.save"
        ) from error
    if array.shape[1:] != tuple(spec.shape[1:]):
        raise errors.DataError(
            f"{file}: samples have shape {array.shape[1:]}, input {spec.name!r} takes {spec.shape[1:]}"
        )
    return array


def ranges(
    graph: Graph, calibration: Path, tensors: Sequence[str], *, threads: int = 1
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each named tensor over the calibration set, by ONNX Runtime.

    ReduceMin and ReduceMax run inside the graph: only scalars come out, one sample is in flight at a time.

    Raises:
        errors.DataError: the calibration set is unusable.
        errors.RuntimeFailed: a tensor takes a value that is not finite.
    """
    import onnxruntime

    model = onnx.load(graph.onnx)
    outputs = []
    for i, tensor in enumerate(tensors):
        for op in ("ReduceMin", "ReduceMax"):
            name = f"edgegen_{op}_{i}"
            model.graph.node.append(onnx.helper.make_node(op, [tensor], [name], name=name, keepdims=0))
            outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for feed in calibration_feeds(graph.inputs, calibration):
        found = np.array(session.run(None, feed), dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(found).all():
            bad = tensors[int(np.argwhere(~np.isfinite(found))[0, 0])]
            raise errors.RuntimeFailed(f"{graph.stage}: tensor {bad!r} is not finite on a calibration sample")
        low, high = np.minimum(low, found[:, 0]), np.maximum(high, found[:, 1])
    return {name: (float(a), float(b)) for name, a, b in zip(tensors, low, high)}


def quantized_nodes(model: onnx.ModelProto, plan: PrecisionPlan, *, placement: str = "onnxruntime") -> list[str]:
    """Names of nodes that the plan puts in INT8, in graph order.

    Always the convolutions and matrix products that are not kept in float; for ONNX Runtime also what lies between
    them, where every computed input comes from an INT8 node. (So a GELU made of Div, Erf, Add and Mul stays whole: cut
    by Q/DQ it would not be fused, which is what makes INT8 transformers slow.)

    Raises:
        errors.UsageError: `plan.float_layers` names a node that is not in the graph.
    """
    check_layers(model, plan)
    consts = constants(model)
    quantized: list[str] = []
    carried: set[str] = set()
    for node in model.graph.node:
        computed = [name for name in node.input if name and name not in consts]
        if node.name in plan.float_layers or node.op_type in plan.float_types:
            continue
        core = node.op_type in _CORE[placement] and computed and _is_float_core(node, consts)
        between = placement != "tensorrt" and node.op_type in _BETWEEN and computed and carried.issuperset(computed)
        if core or between:
            quantized.append(node.name)
            # MatMul's result stays float: ONNX Runtime adds the bias to it before the next rounding
            carried.update(node.output if node.op_type != "MatMul" else ())
    return quantized


def _nothing(model: onnx.ModelProto, placement: str) -> str:
    """Why there is no layer to quantize: the first operation of each kind that has weights, and what could be done."""
    first = {node.op_type: node.name for node in reversed(model.graph.node) if node.op_type in _EVERY}
    known = f"{', '.join(f'{kind} {name!r}' for kind, name in sorted(first.items())) or 'no operation'} has weights"
    return (f"the plan leaves no layer to quantize; {known}, and INT8 is for {', '.join(_CORE[placement])}: "
            "build it in float, or for a runtime that has INT8 for these")  # fmt: skip


def check_layers(model: onnx.ModelProto, plan: PrecisionPlan) -> None:
    """Raise errors.UsageError when `plan.float_layers` names a node that is not in the graph."""
    names = tuple(node.name for node in model.graph.node)
    for name in plan.float_layers:
        if name not in names:
            near = registry.near(name, names)
            raise errors.UsageError(f"unknown layer {name!r}{near}; it must be a node of the graph")


def _is_float_core(node: onnx.NodeProto, consts: Mapping[str, onnx.TensorProto]) -> bool:
    """Convolutions and Gemm need a constant weight; MatMul may also multiply two activations (attention)."""
    return node.op_type == "MatMul" or node.input[1] in consts


def insert_qdq(
    graph: Graph,
    out: Path,
    *,
    calibration: Path,
    plan: PrecisionPlan | None = None,
    placement: str = "onnxruntime",
    threads: int = 1,
) -> Graph:
    """Write the graph with Q/DQ nodes around what the plan puts in INT8.

    With `plan.weights` "int4" large weights have 15 levels, and the file stores them in 4 bits (`onnx_narrow`).

    Args:
        graph: float32, simplified (see `onnx_graph.to_onnx`).
        calibration: folder with one `<input name>.npy` an input, first axis the samples.
        plan: default `graph.plan`. Its format is one of FORMATS; s8.. is symmetric, zero point 0.
        placement: "onnxruntime" quantizes results too and biases to INT32 (its INT8 kernels ask for it); "tensorrt"
            quantizes inputs and weights only, biases stay float; "openvino" as "onnxruntime", with float biases.
        threads: for the calibration runs.
    Raises:
        errors.UsageError: unknown format, placement or layer.
        errors.DataError: the calibration set is unusable.
        errors.Unsupported: the plan leaves nothing to quantize, or the graph already has Q/DQ nodes; no weight can be
            stored in 4 bits and `plan.weights` asks for it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    plan = plan or graph.plan
    for kind, got, known in (("format", plan.format, FORMATS), ("placement", placement, PLACEMENTS)):
        if got not in known:
            raise errors.UsageError(f"unknown Q/DQ {kind} {got!r}; there are: {', '.join(known)}")
    model = onnx.load(graph.onnx)
    nodes = quantized_nodes(model, plan, placement=placement)
    done = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if done or not nodes:
        reason = "the graph is already quantized" if done else _nothing(model, placement)
        raise errors.Unsupported(f"{graph.stage}: cannot build {plan.label}: {reason}")
    found = _found_ranges(model, graph, calibration, _activations(model, nodes), plan, threads)
    data = {n: TensorData(lowest=np.float32(a), highest=np.float32(b)) for n, (a, b) in found.items()}
    narrow = onnx_narrow.snap(model, [n for n in nodes if n not in plan.eight_bits]) if plan.weights == "int4" else {}
    symmetric = plan.format.startswith("s8")
    activation = QuantType.QInt8 if symmetric else QuantType.QUInt8
    quantizer = QDQQuantizer(
        model, True, plan.format.endswith("s7"), QuantType.QInt8, activation,
        TensorsData(CalibrationMethod.MinMax, data), nodes, [],
        sorted({node.op_type for node in model.graph.node if node.name in set(nodes)}),
        _options(placement, symmetric) | {"TensorQuantOverrides": onnx_narrow.overrides(narrow)},
    )  # fmt: skip
    quantized = quantizer.quantize_model()
    _free_outputs(quantized)
    made = onnx_files.tidy(quantized)
    if narrow:
        made = onnx_narrow.store(made)
    sha256 = onnx_files.write(made, out)
    return dataclasses.replace(graph, onnx=out, plan=plan, sha256=sha256)


def _found_ranges(
    model: onnx.ModelProto, graph: Graph, calibration: Path, tensors: Sequence[str], plan: PrecisionPlan, threads: int
) -> dict[str, tuple[float, float]]:
    """Range of each tensor: the plan's where it has one, by the node that makes it; the others are calibrated.

    A calibrated range holds all that an image can be, so that no white is clipped that the samples did not have.
    """
    learned = {name: (low, high) for name, low, high in plan.scales}
    places = {name: name for name in tensors} | {name: node.name for node in model.graph.node for name in node.output}
    known = {name: learned[places[name]] for name in tensors if places[name] in learned}
    open_ = [name for name in tensors if name not in known]
    found = ranges(graph, calibration, open_, threads=threads) if open_ else {}
    for name, (low, high) in image_ranges(graph).items():
        if name in found:
            found[name] = (min(found[name][0], low), max(found[name][1], high))
    return known | found


def image_ranges(graph: Graph) -> dict[str, tuple[float, float]]:
    """What inputs and outputs that are images can be: outputs by their value range, inputs where the graph knows how
    they are normalised."""
    found = {spec.name: spec.value_range for spec in graph.outputs if spec.value_range and len(spec.shape) == 4}
    how = graph.preprocessing
    for spec in graph.inputs:
        if how is not None and spec.value_range and len(spec.shape) == 4:
            shift, scale = (np.array(values or (default,)) for values, default in ((how.mean, 0.0), (how.std, 1.0)))
            ends = [(end - shift) / scale for end in spec.value_range]
            found[spec.name] = (float(np.min(ends)), float(np.max(ends)))
    return found


def activation_ranges(
    graph: Graph, calibration: Path, plan: PrecisionPlan, *, threads: int = 1
) -> tuple[tuple[str, float, float], ...]:
    """Calibrated ranges of all that an INT8 build of the plan rounds, as `plan.scales` has them.

    With these in its plan `insert_qdq` need not calibrate again, also for plans that leave more layers in float.
    """
    model = onnx.load(graph.onnx)
    tensors = _activations(model, quantized_nodes(model, plan))
    places = {name: name for name in tensors} | {name: node.name for node in model.graph.node for name in node.output}
    found = _found_ranges(model, graph, calibration, tensors, plan, threads)
    return tuple((places[name], low, high) for name, (low, high) in found.items())


def _options(placement: str, symmetric: bool) -> dict[str, Any]:
    return {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "QuantizeBias": placement == "onnxruntime",
        "OpTypesToExcludeOutputQuantization": ["MatMul"] if placement != "tensorrt" else list(_EVERY),
        "QDQOpTypePerChannelSupportToAxis": {"MatMul": -1},
    }


def _activations(model: onnx.ModelProto, nodes: Sequence[str]) -> list[str]:
    """Float tensors that enter or leave the named nodes and are computed, in graph order."""
    consts, wanted = constants(model), set(nodes)
    kinds = {
        i.name: i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    names = dict.fromkeys(
        name for node in model.graph.node if node.name in wanted for name in (*node.input, *node.output)
    )
    return [name for name in names if name not in consts and kinds.get(name) == onnx.TensorProto.FLOAT]


def _free_outputs(model: onnx.ModelProto) -> None:
    """Let a matrix product that is a graph output end in float: ONNX Runtime can, and logits keep their resolution."""
    graph = model.graph
    by_output = {name: node for node in graph.node for name in node.output}
    for info in graph.output:
        dequantize = by_output.get(info.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = by_output[dequantize.input[0]]
        source = by_output.get(quantize.input[0])
        shared = sum(quantize.input[0] in n.input or quantize.output[0] in n.input for n in graph.node) > 2
        if source is not None and source.op_type == "Gemm" and not shared:
            source.output[0] = info.name
            graph.node.remove(quantize)
            graph.node.remove(dequantize)
