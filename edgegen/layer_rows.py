"""The layers of a built network as report.json lists them: work, bytes, time, precision promised and obtained."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from edgegen import estimate, onnx_cost
from edgegen.types import Graph, Inspection, PassResult, Target

_FIGURES = ("sqnr_db", "recovers")
"""Keys of `PassResult.notes` that hold a figure a layer: {layer: number}."""


def rows(
    graph: Graph,
    inspection: Inspection | None,
    times: Sequence[Mapping[str, Any]],
    results: Sequence[PassResult] = (),
) -> list[dict[str, Any]]:
    """Every weighted layer in order, then kernels without weights that took time; dicts for `schema.Layer`.

    Args:
        times: as `measuring.Worker.layer_times` gives them; empty where the runtime tells none.
        results: passes whose notes may hold figures a layer.
    """
    costs = {layer.name: layer for layer in onnx_cost.cost(graph.onnx).layers}
    work = {layer.name: layer for layer in estimate.layers_of(graph.onnx)}
    obtained = dict(inspection.layers) if inspection is not None else {}
    timed: dict[str, list[Mapping[str, Any]]] = {}
    for row in times:
        timed.setdefault(row["name"], []).append(row)
    noted = {key: _noted(results, key) for key in _FIGURES}
    found = []
    for name in [*costs, *(name for name in timed if name not in costs)]:
        cost, mine = costs.get(name), timed.get(name, [])
        precision = obtained.get(name, "")
        promised = _promised(graph, name, cost.op) if cost is not None else ""
        width = estimate.BYTES.get(precision.rpartition(" ")[2], 0)
        moved = work[name].elements * width if name in work and width else None
        runs = min((len(row["ms"]) for row in mine), default=0)
        found.append({
            "name": name,
            "op": cost.op if cost is not None else mine[0]["op"],
            "macs": cost.macs if cost is not None else None,
            "params": cost.params if cost is not None else None,
            "bytes": moved,
            "ms": sum(statistics.median(row["ms"]) for row in mine) if runs else None,
            "n": runs,
            "kernel": _kernel(mine),
            "promised": promised,
            "obtained": precision,
            **{key: noted[key].get(name) for key in _FIGURES},
        })  # fmt: skip
    return found


def roof(target: Target) -> dict[str, Any]:
    """What the target states: for `schema.Roof`."""
    return {"peak_macs_per_s": dict(target.peak_macs_per_s), "bytes_per_s": target.bandwidth_bytes_per_s}


def _promised(graph: Graph, name: str, op: str) -> str:
    plan = graph.plan
    if plan.precision != "int8":
        return plan.precision
    left = name in plan.float_layers or op in plan.float_types
    return plan.rest if left else "int8"


def _kernel(mine: Sequence[Mapping[str, Any]]) -> str:
    """The kernel that took longest, without the provider's suffix."""
    timed = [row for row in mine if row["ms"]]
    longest = max(timed, key=lambda row: statistics.median(row["ms"]), default=None)
    return re.sub(r"ExecutionProvider$", "", longest["kernel"]) if longest is not None else ""


def _noted(results: Sequence[PassResult], key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for result in results:
        told = result.notes.get(key)
        if isinstance(told, Mapping):
            found |= {str(name): float(value) for name, value in told.items() if isinstance(value, int | float)}
    return found
