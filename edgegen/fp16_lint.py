"""Which layers FP16 does not hold: activations near its end, found on calibration samples, and subnormal weights.

FP16 ends at 65,504, and a layer norm, a variance or a wide sum gets there with activations of a few hundred: the result
is infinity, then NaN or a black image (NVIDIA/TensorRT#1787, #1262). Calibration samples are not all inputs, so a peak
above an eighth of the end counts. Numbers below 2^-14 have fewer bits than others, and many chips take them for zero;
with a tenth of a layer's weights there, the rest lies so low that those zeros move its output by a percent and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgegen import onnx_qdq
from edgegen.onnx_cost import constants
from edgegen.types import Graph

FP16_MAX = 65504.0
NEAR = FP16_MAX / 8
SUBNORMAL = 2.0**-14
SHARE = 0.1
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def lint(
    graph: Graph, calibration: Path, *, near: float = NEAR, share: float = SHARE, threads: int = 1
) -> dict[str, str]:
    """Layers to keep in FP32 -> why, in graph order.

    Args:
        graph: float32 ONNX, with or without Q/DQ nodes.
        calibration: folder with one `<input name>.npy` an input; streamed, one sample in flight.
        near: largest |activation| that is still fine. A layer that makes a larger one, or takes it, is named.
        share: smallest fraction of a layer's non-zero weights below 2^-14 (and not zero) that is told.
    Raises:
        errors.DataError: the calibration set is unusable.
        errors.RuntimeFailed: the float graph itself yields values that are not finite.
    """
    model = onnx.load(graph.onnx)
    peaks = activation_peaks(model, graph, calibration, threads)
    weights = dict(_weights(model, share))
    found = {}
    for node in model.graph.node:
        sides = (("output", node.output), ("input", node.input))
        loud = [(side, name) for side, names in sides for name in names if peaks.get(name, 0.0) > near]
        reasons = [f"its {side} {name!r} reaches {peaks[name]:.3g}" for side, name in loud]
        if node.op_type not in _QUANTIZERS:  # a runtime asks for them in the precision of the layers around
            reasons += [weights[name] for name in node.input if name in weights]
        if reasons:
            found[node.name] = f"{'; '.join(dict.fromkeys(reasons))} (FP16 ends at {FP16_MAX:g})"
    return found


def activation_peaks(model: onnx.ModelProto, graph: Graph, calibration: Path, threads: int = 1) -> dict[str, float]:
    """Largest magnitude of every computed float tensor, and of every input, over the calibration set."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    infos = (*inferred.input, *inferred.value_info, *inferred.output)
    floating = {info.name for info in infos if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    consts = constants(model)
    made = [info.name for info in model.graph.input] + [name for node in model.graph.node for name in node.output]
    wanted = [name for name in dict.fromkeys(made) if name in floating and name not in consts]
    ranges = onnx_qdq.ranges(graph, calibration, wanted, threads=threads)
    return {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}


def subnormal_share(weight: np.ndarray) -> float:
    """Fraction (0..1) of the elements that are not zero whose magnitude lies below 2^-14."""
    magnitude = np.abs(weight[weight != 0])
    return float((magnitude < SUBNORMAL).mean()) if magnitude.size else 0.0


def _weights(model: onnx.ModelProto, share: float) -> Iterator[tuple[str, str]]:
    for name, tensor in constants(model).items():
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        value = numpy_helper.to_array(tensor)
        peak, low = float(np.abs(value).max(initial=0)), subnormal_share(value)
        if peak > FP16_MAX:
            yield name, f"its weight {name!r} reaches {peak:.3g}"
        elif low >= share:
            yield name, f"{low:.0%} of its weight {name!r} are below {SUBNORMAL:.1e}"
