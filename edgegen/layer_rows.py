"""The layers of a built network as report.json lists them: work, bytes, time, precision promised and obtained."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from edgegen import estimate, onnx_cost, registry
from edgegen.types import Artifact, Graph, Inspection, Target

_FUSED = 3
"""How many operations behind a layer a runtime may fuse to it."""
FIGURES = ("sqnr_db", "recovers")
"""Keys of `PassResult.notes` that hold a figure a layer: {layer: number}."""


def rows(
    graph: Graph,
    inspection: Inspection | None,
    times: Sequence[Mapping[str, Any]],
    noted: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Every weighted layer in order, then kernels without weights that took time; dicts for `schema.Layer`.

    Args:
        times: as `measuring.Worker.layer_times` gives them; empty where the runtime tells none.
        noted: notes of the passes that were kept, which may hold figures a layer under the keys of FIGURES.
    """
    model = onnx.load(graph.onnx)
    costs = {layer.name: layer for layer in onnx_cost.cost(model).layers}
    work = {layer.name: layer for layer in estimate.layers_of(graph.onnx)}
    known = _aliases(model)
    obtained = {known.get(name, name): got for name, got in (inspection.layers if inspection else {}).items()}
    timed: dict[str, list[Mapping[str, Any]]] = {}
    for row in times:
        name = row["name"].removesuffix("_nchwc")  # ONNX Runtime names its blocked kernels after their output
        timed.setdefault(known.get(name, name), []).append(row)
    figures = {key: _figures(noted, key) for key in FIGURES}
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
            # a pass may name the module, body.0.conv, where the graph says body.0.conv/Conv
            **{key: figures[key].get(name, figures[key].get(name.rpartition("/")[0])) for key in FIGURES},
        })  # fmt: skip
    return found


def _aliases(model: onnx.ModelProto) -> dict[str, str]:
    """Name of a tensor that a weighted layer, or what a runtime fuses to it, gives out -> the layer's name."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in onnx_cost.WEIGHTED:
            continue
        behind = node
        for _ in range(_FUSED + 1):
            found.setdefault(behind.output[0], node.name)
            following = readers.get(behind.output[0], [])
            if len(following) != 1 or following[0].op_type in onnx_cost.WEIGHTED:
                break
            behind = following[0]
    names = {node.name for node in model.graph.node}
    return {alias: name for alias, name in found.items() if alias not in names}


def roof(target: Target) -> dict[str, Any]:
    """What the target states: for `schema.Roof`."""
    return {"peak_macs_per_s": dict(target.peak_macs_per_s), "bytes_per_s": target.bandwidth_bytes_per_s}


def dla(artifact: Artifact, target: Target) -> dict[str, Any] | None:
    """Which layers of a built file the target's deep learning accelerator takes: for `schema.Dla`; None without one."""
    cores = target.release.dla if target.release is not None else 0
    module = registry.module("runtimes", artifact.runtime)
    if not cores or not hasattr(module, "dla"):
        return None
    model = onnx.load(artifact.path)
    aside = ("QuantizeLinear", "DequantizeLinear", "Constant")
    names = [node.name for node in model.graph.node if node.op_type not in aside]
    problems: dict[str, str] = {}
    whole = ""
    for found in module.dla(model, target):
        if found.op == "QuantizeLinear":
            whole = found.rewrite
        else:
            before = problems.get(found.layer)
            problems[found.layer] = f"{before}; {found.rewrite}" if before else f"{found.op}: {found.rewrite}"
    eligible = sum(name not in problems for name in names)
    return {"cores": cores, "layers": len(names), "eligible": eligible, "whole": whole, "problems": problems}


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


def _figures(noted: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for notes in noted:
        told = notes.get(key)
        if isinstance(told, Mapping):
            found |= {str(name): float(value) for name, value in told.items() if isinstance(value, int | float)}
    return found
