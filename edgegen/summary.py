"""The content of report.json from what a run decided; the pages are drawn from it alone."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgegen import calibration_lint, layer_rows, quality, recipe
from edgegen.candidates import Candidate
from edgegen.decide import ASKED
from edgegen.devices import local
from edgegen.final import Final
from edgegen.recovery import NEEDS
from edgegen.report import schema, text
from edgegen.run import Run
from edgegen.types import Measurement, PassResult
from edgegen.variants import REWRITTEN


def step_records(
    group: Sequence[recipe.Step], results: Sequence[PassResult], status: str, reason: str, network: str = ""
) -> list[dict[str, Any]]:
    """One record a pass; passes judged together share status and reason. network: the name of what they made.

    Training that stopped early is told beside the reason.
    """
    together = " + ".join(step.name for step in group)
    shared = f"judged together ({together}): {reason}" if len(group) > 1 else reason
    return [
        {
            "name": step.name,
            "options": step.told,
            "status": status,
            "reason": "; ".join(part for part in (shared, result.notes.get("stopped")) if part),
            "changed": dict(result.changed),
            "skipped": dict(result.skipped),
            "figures": _scalars(result.notes),
            "network": network,
        }
        for step, result in zip(group, results, strict=True)
    ]


def _scalars(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Notes that are one figure or word, and those that `layer_rows` takes as figures of single layers."""
    layers = {k: dict(v) for k in layer_rows.FIGURES if isinstance(v := notes.get(k), Mapping)}
    return {k: v for k, v in notes.items() if isinstance(v, (str, int)) or _is_finite(v)} | layers


def prepared(records: Sequence[dict[str, Any]], networks: Sequence[str], chosen: Candidate) -> list[dict[str, Any]]:
    """The records, with the last word on passes that prepare for INT8: kept when the chosen INT8 build holds them.

    The same for exact rewrites of the graph: kept when the chosen build is one of the rewritten graph.

    networks: names in the order in which they were made, each from the one before it.
    """
    own = chosen.of.removesuffix(REWRITTEN)
    held = set(networks[: networks.index(own) + 1]) if chosen.quantized else set()
    result = []
    for record in records:
        network = record.get("network", "")
        record = {key: value for key, value in record.items() if key != "network"}
        if record["name"] in recipe.PREPARING_PASSES and record["status"] == "kept":
            kept = network in held
            why = f"the chosen build holds it: {chosen.label}" if kept else f"chosen without it: {chosen.label}"
            record |= {"status": "kept" if kept else "undone", "reason": why}
        if record["name"] == "rewrite_graph" and record["status"] != "undone" and network != chosen.of:
            record |= {"status": "undone", "reason": f"{record['reason']}; chosen without it: {chosen.label}"}
        result.append(record)
    return result


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)  # NaN is not JSON


def precision_records(
    run: Run, chosen: Candidate, pool: Sequence[Candidate], plans: dict[str, dict[str, PassResult]]
) -> list[dict[str, Any]]:
    """Records of `quantize` and `cast`: kept when the chosen build has that precision, else undone and why."""
    records = []
    for step in run.recipe.steps:
        if step.name not in recipe.PRECISION_PASSES:
            continue
        wanted = "int8" if step.name == "quantize" else step.options.get("precision", "fp16")
        if chosen.graph.plan.precision == wanted or (wanted == "int8" and chosen.graph.plan.quantized):
            status, reason = ("kept" if run.bench.measures else "predicted"), chosen.reason
            if step.keep and reason.startswith(ASKED):
                status = "forced"
        else:
            tried = [c for c in pool if c.graph.plan.precision == wanted or (wanted == "int8" and c.quantized)]
            best = max(tried, key=lambda c: c.gain, default=None)
            status = "undone"
            reason = f"{best.label}: {best.reason}" if best is not None else f"no {wanted} build on {run.target.name}"
        result = plans[step.name].get(chosen.of) or plans[step.name]["original"]
        record = {"name": step.name, "options": dict(step.options), "status": status, "reason": reason}
        told = {"changed": dict(result.changed), "skipped": dict(result.skipped), "figures": _scalars(result.notes)}
        records.append({**record, **told})
    return records


def report(run: Run, final: Final, records: list[dict[str, Any]], pool: Sequence[Candidate]) -> dict[str, Any]:
    """The report as `report.schema` checks it, without what is known only when the run is over."""
    chosen = final.chosen
    request = run.request
    content = {
        "headline": unfinished(records) + headline(run, final),
        "model": run.model.name,
        "task": run.model.task,
        "target": run.target.name,
        "command": request.command or "edgegen.compress(...)",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": request.seed,
        "budget": {
            "quality drop": f"{run.budget.max_quality_drop:g} {run.gate.unit}",
            "latency": f"{run.budget.max_latency_ms:g} ms" if run.budget.max_latency_ms else "no limit",
            "size": f"{run.budget.max_size_bytes / 1e6:g} MB" if run.budget.max_size_bytes else "no limit",
        },
        "baseline": _row(final.baseline, final),
        "result": _row(chosen, final),
        "steps": records,
        "candidates": [_candidate(c, final) for c in [*pool, chosen]],
        "untried": untried(run),
        "calibration_curve": [{"images": n, "quality": schema.figure(one)} for n, one in final.curve.points],
        "calibration_reason": final.curve.reason,
        "data_source": "; ".join(f"{part}: {name}" for part, name in run.data.sources.items()),
        "data": data(run),
        "skipped_files": dict.fromkeys(run.data.broken, "cannot be decoded"),
        "provenance": {
            "source": run.model.provenance.source,
            "licence": run.model.provenance.licence,
            "paper": run.model.provenance.paper,
            "weights sha256": run.model.provenance.weights_sha256,
        },
        "versions": dict(chosen.artifact.versions) if chosen.artifact else {},
        "machine": machine(run),
        "stamps": stamps(run) + calibration_findings(run, chosen),
    }
    return schema.normalise(content)


def machine(run: Run) -> dict[str, Any]:
    """This host, and which of its processors networks learn on."""
    return local.probe() | {"trained on": run.train_device}


def untried(run: Run) -> dict[str, str]:
    """Runtime of the target -> why nothing was built for it."""
    slow = dict.fromkeys(run.target.thorough_runtimes, "its converter is slow; --thorough tries it")
    return {name: why for name, why in slow.items() if name not in run.target.runtimes} | run.bench.absent()


def stamps(run: Run) -> list[str]:
    """Warnings that belong to every figure of the bundle."""
    found = []
    if run.request.latency_only:
        drawn = "" if run.data.calibration is not None else " random calibration,"
        found.append(f"not for accuracy: --latency-only,{drawn} no quality was measured")
    if not run.bench.measures:
        found.append(f"latency on {run.target.name} is not measured: no device; a latency beside it is an estimate")
    return found


def calibration_findings(run: Run, chosen: Candidate) -> list[str]:
    """What speaks against the calibration set, where the chosen build took its ranges from it."""
    if chosen.graph.plan.precision != "int8" or run.data.calibration is None:
        return []
    return [f"calibration: {finding.text}" for finding in calibration_lint.lint(run.model, run.data.calibration)]


def unfinished(records: Sequence[dict[str, Any]]) -> str:
    """What stands before the headline of a network that was changed and not trained after it."""
    names = [record["name"] for record in records if record["status"] == NEEDS]
    return f"Not finished, {NEEDS} ({', '.join(names)}): " if names else ""


def headline(run: Run, final: Final) -> str:
    """One sentence: faster or not, by how much, against what, where, and at what cost in quality."""
    chosen, baseline = final.chosen, final.baseline
    against, size = f"the best unquantized build ({_plain(baseline)})", _smaller(baseline, chosen)
    if chosen.unknown:
        told = f"latency neither measured (no device) nor estimated; {size} than {against}"
    elif not run.bench.measures:
        told = f"latency not measured (no device); predicted {chosen.gain:.2f}x against {against}, {size}"
    elif chosen.label == baseline.label:
        told = f"nothing faster keeps the budget; {against} stays"
    else:
        speed = f"{chosen.gain:.2f}x faster" if chosen.gain >= 1 else f"{1 / max(chosen.gain, 1e-9):.2f}x slower"
        told = f"{speed} and {size} than {against}"
    return f"{run.model.name} on {run.target.name}: {told}; {_cost(run, chosen)}."


def _plain(candidate: Candidate) -> str:
    return candidate.label.removeprefix("original: ")


def _smaller(before: Candidate, after: Candidate) -> str:
    """The size against another's: "4.7x smaller", "3% larger", "no smaller"."""
    ratio = _size(before) / max(_size(after), 1)
    if 0.5 < ratio < 1.05:
        gap = 100 * abs(1 - 1 / ratio)
        return f"{gap:.0f}% {'smaller' if ratio > 1 else 'larger'}" if gap >= 1 else "no smaller"
    return f"{ratio:.1f}x smaller" if ratio > 1 else f"{1 / ratio if ratio else math.inf:.1f}x larger"


def _cost(run: Run, chosen: Candidate) -> str:
    """The deciding figure, what was lost of it, and what may be lost, in the words of the task."""
    if chosen.drop is None:
        return "quality not measured"
    gate, lost, allowed = run.gate, max(chosen.drop, 0.0), run.budget.max_quality_drop or 0.0
    figure = f"{gate.figure} {text.figure(schema.figure(quality.find(chosen.figures, gate.figure)))}"
    if gate.figure.startswith("perceptual"):
        return f"{figure}, that is {lost:.3g}% (at most {allowed:g}% asked for)"
    if run.model.task == "image-to-image":
        return f"{figure} (at least {quality.CEILING_DB - allowed:.4g} dB asked for)"
    if run.model.task == "unconditional":
        count = f"; {gate.unit[gate.unit.index('N = '):]}" if "N = " in gate.unit else ""
        return f"{figure}, within {lost / 1e3:.3g} of the teacher's ({allowed / 1e3:g} allowed{count})"
    unit = "points" if run.model.task == "classification" else "dB"
    note = f"; {gate.unit.partition('(')[2].rstrip(')')}" if "(asked" in gate.unit else ""
    return f"{figure}, {f'{lost:.3g} {unit}' if lost else 'nothing'} lost ({allowed:g} {unit} allowed{note})"


def _size(candidate: Candidate) -> int:
    return candidate.artifact.size_bytes if candidate.artifact is not None else 0


def _row(candidate: Candidate, final: Final) -> dict[str, Any]:
    artifact, seen = candidate.artifact, candidate.inspection
    latency = candidate.latency or Measurement("latency", "ms", math.nan, status="not measured", reason="not timed")
    is_baseline = candidate.label == final.baseline.label
    return {
        "label": candidate.label,
        "latency": schema.figure(latency),
        "ratio": None if is_baseline or candidate.ratio is None else schema.figure(candidate.ratio),
        "macs": candidate.graph.macs,
        "params": candidate.graph.params,
        "size_bytes": _size(candidate),
        "peak_memory_bytes": final.memory.get(candidate.label) or None,
        "quality": [schema.figure(figure) for figure in candidate.figures],
        "precision": {
            "plan": candidate.graph.plan.label,
            "int8_weight_share": seen.int8_weight_share if seen else None,
            "int8_macs_share": seen.int8_macs_share if seen else None,
            "layers": dict(seen.layers) if seen else {},
        },
        "throughput": [schema.figure(rate)] if (rate := final.throughput.get(candidate.label)) is not None else [],
        "artifacts": {file.name: file.stat().st_size for file in artifact.files} if artifact else {},
    }


def _candidate(candidate: Candidate, final: Final) -> dict[str, Any]:
    verdict = {"chosen": "chosen", "failed": "failed"}.get(candidate.verdict, "rejected")
    if candidate.label == final.baseline.label and verdict != "chosen":
        verdict = "baseline"
    deciding = candidate.figures[0] if candidate.figures else None
    return {
        "label": candidate.label,
        "latency": schema.figure(candidate.latency) if candidate.latency else None,
        "ratio": schema.figure(candidate.ratio) if candidate.ratio else None,
        "size_bytes": _size(candidate) or None,
        "quality": schema.figure(deciding) if deciding else None,
        "verdict": verdict,
        "reason": candidate.reason,
    }


def data(run: Run) -> dict[str, Any]:
    """Number and digest of each part of the data."""
    parts = {name: getattr(run.data, name) for name in ("train", "select", "test", "calibration")}
    return {
        name: {"count": len(part), "sha256": part.digest} for name, part in parts.items() if part is not None
    }
