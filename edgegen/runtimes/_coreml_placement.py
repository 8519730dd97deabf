"""Where Core ML would probably run a graph. Only a Mac's compute plan knows; this is rules, and labelled "predicted".

Rules: M. Hollemans, The Neural Engine: what do we know about it?, https://github.com/hollance/neural-engine
(unsupported-layers.md). Small networks are scheduled on the CPU whatever their layers are (aosama/astronomical#540).
"""

from __future__ import annotations

from typing import Any

import onnx

from edgegen import onnx_cost
from edgegen.types import Graph

_OFF_ENGINE = {
    "GridSample": "resampling", "LSTM": "recurrent", "GRU": "recurrent", "RNN": "recurrent", "TopK": "sorting",
    "GatherND": "gathering", "ScatterND": "scattering", "NonZero": "data-dependent shape", "Einsum": "einsum",
}  # fmt: skip
_SMALL_MACS = 5_000_000  # below this a network was seen to stay on the CPU; a rule of thumb, not a limit of Apple's


def predict(graph: Graph) -> dict[str, Any]:
    """{"label": "predicted", "place", "why", "evictors": node -> reason}; macs decide the place of small networks.

    place: "Neural Engine", "Neural Engine with parts on GPU or CPU", or "CPU".
    """
    model = onnx.load(graph.onnx)
    shapes = onnx_cost.static_shapes(model)
    evictors = {node.name: why for node in model.graph.node if (why := _reason(node, shapes))}
    macs = onnx_cost.cost(model).macs
    if macs < _SMALL_MACS:
        place, why = "CPU", f"{macs:,} MACs: small networks are scheduled on the CPU"
    elif graph.plan.precision == "fp32":
        place, why = "GPU or CPU", "the Neural Engine computes in FP16 and INT8, not FP32"
    elif evictors:
        place, why = "Neural Engine with parts on GPU or CPU", f"{len(evictors)} operations leave it"
    else:
        place, why = "Neural Engine", "no operation is known to leave it"
    return {"label": "predicted", "place": place, "why": why, "evictors": evictors}


def _reason(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> str:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _OFF_ENGINE:
        return _OFF_ENGINE[node.op_type]
    if node.op_type in ("Conv", "ConvTranspose") and max(values.get("dilations", [1])) > 1:
        return "dilated convolution"
    pooling = node.op_type in ("MaxPool", "AveragePool")
    if pooling and (max(values.get("kernel_shape", [1])) > 13 or max(values.get("strides", [1])) > 2):
        return "pooling with a kernel above 13 or a stride above 2"
    largest = max((max(shapes[name], default=0) for name in node.output if name in shapes), default=0)
    return f"a dimension of {largest}, above 16,384" if largest > 16384 else ""
