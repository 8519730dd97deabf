"""Latency of a graph on a device that is not here: from its operator table, else a roofline band from its facts.

An operator table (`edgegen profile-device`) holds small networks timed on the device; an estimate from it stands with
its error on whole networks that the fit has not seen. Without a table, the roofline, which no device has validated:
Williams, Waterman and Patterson, 2009, Roofline, doi:10.1145/1498765.1498785: a layer takes max(MACs / peak, bytes /
bandwidth). The lower bound uses all of both, fuses whatever can be fused, and launches kernels for LAUNCH_S[0] each.
The upper bound uses the shares below, runs norms, poolings and resizes as kernels of their own, and pays LAUNCH_S[1].
The value is the geometric mean of the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import errors, latency, operator_fit, operator_table, operators
from edgegen.types import Graph, Measurement, PrecisionPlan, Target

LOW_UTILISATION = 0.1
"""Share of the peak in the upper bound; a tenth is common for batch 1 on small tensors."""
LOW_BANDWIDTH = 0.4
"""Share of the memory bandwidth in the upper bound."""
LAUNCH_S = (2e-6, 10e-6)
"""Seconds to start one kernel: lower and upper bound. Assumed, as the two shares are."""
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}

# What a runtime folds into its neighbours, or does without touching the data.
_FREE = frozenset({
    "Add", "BatchNormalization", "Cast", "Clip", "Constant", "DequantizeLinear", "Dropout", "Flatten", "HardSwish",
    "Identity", "LeakyRelu", "Mul", "PRelu", "QuantizeLinear", "Relu", "Reshape", "Shape", "Sigmoid", "Squeeze",
    "Unsqueeze",
})


@dataclass(frozen=True)
class Layer:
    """Work of one kernel: MACs, and elements read and written (inputs, weights, outputs)."""

    name: str
    op: str
    macs: int
    elements: int


def estimate_latency(
    graph: Graph, target: Target, precision: str, *, runtime: str = "", layers: Iterable[Layer] | None = None,
    tables: Path | None = None,
) -> Measurement:  # fmt: skip
    """Estimated latency of one run in ms, status "estimated"; `conditions["method"]` says how, and how good that is.

    From the operator table of this target, runtime and precision where there is one, else a roofline band. "not
    measured" with the reason when the target states no bandwidth or no peak for a precision that is needed.

    Args:
        precision: of the build; in an int8 build, layers that `graph.plan` leaves in float count in `graph.plan.rest`.
        runtime: of the build; "": the target's first.
        layers: the graph's work, when it is known already; None: counted from `graph.onnx`.
        tables: folder of operator tables; None: targets/operators/.
    """
    runtime = runtime or target.runtimes[0]
    conditions = {"device": target.name, "runtime": runtime, "precision": precision}
    table, why = operator_table.find(target, runtime, precision, tables) if layers is None else (None, "")
    if table is not None:
        return _by_table(graph, table, runtime, precision, conditions)
    try:
        return _roofline(graph, target, precision, layers, {**conditions, "table": why})
    except errors.TargetError as error:
        return latency.not_measured("latency", "ms", str(error), conditions)


def _by_table(graph: Graph, table: Path, runtime: str, precision: str, conditions: dict[str, Any]) -> Measurement:
    """The sum over the kernels; the interval is the 90th percentile of the error, validated or of the table itself."""
    work = operators.kernels(graph.onnx, runtime, dataclasses.replace(graph.plan, precision=precision))
    fitted = operator_table.fitted(table, runtime, precision)
    value = float(operator_fit.predict(fitted, work).sum())
    told = operator_table.validation(table, runtime, precision)
    method = f"operator table, validated: {describe(told)}" if told else "operator table, unvalidated"
    error = told["p90"] if told else fitted.error[1]
    foreign = operator_fit.unknown(fitted, work)
    conditions = {
        **conditions, "method": method, "table": table.name, "interval": f"error of 90% of networks: {error:.0%}",
        "layers": len(work), "macs": sum(kernel.macs for kernel in work),
        **({"not in the table": foreign} if foreign else {}),
    }  # fmt: skip
    band = (value / (1 + error), value * (1 + error))
    reason = f"no measurement on {conditions['device']}; the sum of its operators"
    return Measurement("latency", "ms", value, band, conditions=conditions, status="estimated", reason=reason)


def describe(told: Mapping[str, Any]) -> str:
    """`operator_table.errors_of` in words."""
    return (f"median {told['median']:.0%}, p90 {told['p90']:.0%}, {told['within10']:.0%} within 10% "
            f"({told['networks']} networks)")  # fmt: skip


def _roofline(
    graph: Graph, target: Target, precision: str, layers: Iterable[Layer] | None, conditions: dict[str, Any]
) -> Measurement:
    work = tuple(layers_of(graph.onnx) if layers is None else layers)
    low = high = 0.0
    for layer in work:
        kind = _precision(layer, precision, graph.plan)
        compute, memory = layer.macs / _peak(target, kind), layer.elements * BYTES[kind] / target.bandwidth_bytes_per_s
        high += max(compute / LOW_UTILISATION, memory / LOW_BANDWIDTH) + LAUNCH_S[1]
        if layer.macs:
            low += max(compute, memory) + LAUNCH_S[0]
    low = low or len(work) * LAUNCH_S[0]  # no weighted layer at all
    conditions |= {
        "method": "roofline, unvalidated",
        "interval": f"{LOW_UTILISATION:.0%} to 100% of peak, {LOW_BANDWIDTH:.0%} to 100% of bandwidth, "
        f"{LAUNCH_S[1] * 1e6:g} to {LAUNCH_S[0] * 1e6:g} us a kernel",
        "layers": len(work),
        "macs": sum(layer.macs for layer in work),
    }
    reason = f"no measurement on {target.name}; computed from its data sheet"
    value, band = 1e3 * math.sqrt(low * high), (1e3 * low, 1e3 * high)
    return Measurement("latency", "ms", value, band, conditions=conditions, status="estimated", reason=reason)


def layers_of(onnx_file: Path) -> list[Layer]:
    """Every kernel of an ONNX file with static shapes; what runtimes always fold away is left out."""
    import onnx

    from edgegen import onnx_cost

    model = onnx.load(onnx_file)
    shapes, total = onnx_cost.static_shapes(model), onnx_cost.cost(model)
    weighted = iter(total.layers)  # in node order
    found = []
    for node in model.graph.node:
        cost = next(weighted) if node.op_type in onnx_cost.WEIGHTED else None
        if cost is None and node.op_type in _FREE:
            continue
        names = [name for name in (node.input[0] if node.input else "", *node.output) if name in shapes]
        second = shapes.get(node.input[1], ()) if cost and not cost.weight else ()
        elements = sum(math.prod(shapes[name]) for name in names) + (math.prod(second) if second else 0)
        found.append(Layer(node.name, node.op_type, cost.macs if cost else 0, elements + (cost.params if cost else 0)))
    return found


def _precision(layer: Layer, precision: str, plan: PrecisionPlan) -> str:
    if precision != "int8":
        return precision
    left = layer.name in plan.float_layers or layer.op in plan.float_types or not layer.macs
    return plan.rest if left else precision


def _peak(target: Target, precision: str) -> float:
    peak = target.peak_macs_per_s.get(precision, 0.0)
    if not peak or not target.bandwidth_bytes_per_s:
        known = ", ".join(target.peak_macs_per_s) or "none"
        raise errors.TargetError(
            f"{target.name} cannot be estimated in {precision}: it needs bandwidth_bytes_per_s and peak_macs_per_s."
            f"{precision}, got bandwidth {target.bandwidth_bytes_per_s:g} and peaks for: {known}"
        )
    return peak
