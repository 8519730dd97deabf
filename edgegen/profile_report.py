"""From the records of a device and the reports of the bundles to the trade-off page: which figure goes where."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import bundle, device_records, files
from edgegen.device_records import Record
from edgegen.errors import MissingExtra, UsageError
from edgegen.report import tradeoff
from edgegen.report.tradeoff import Moment, Point

PREFERRED = ("FID", "KID", "top-1", "PSNR to the reference", "PSNR to the teacher", "agreement")


def check(bundles: Sequence[Path], quality: str) -> None:
    """Refuse what could not be drawn, before anything is measured.

    Raises:
        UsageError: a figure that no report has; names those that are there. MissingExtra: matplotlib is not here.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "to draw the trade-off", "report")
    _axis([_report(path) for path in bundles], quality)


def write(
    out: Path, bundles: Sequence[Path], records: Sequence[Record], quality: str = "", minutes: float = 0.0
) -> list[Path]:
    """Write the page and its pictures beside it; the paths.

    Args:
        quality: name of the figure on the axis; "": the first of PREFERRED that a report has, else its first.
        minutes: the run was this long: its course is drawn too.
    Raises:
        UsageError: a figure that no report has; names those that are there. MissingExtra: matplotlib.
    """
    reports = {files.sha256(path / "manifest.json"): _report(path) for path in bundles}
    name, direction = _axis(list(reports.values()), quality)
    points = [_point(record, reports.get(record.provenance.bundle_sha256, {}), name) for record in records]
    facts: dict[str, Any] = next((record.device.get("facts", {}) for record in records), {})
    where = facts.get("model") or facts.get("cpu_model") or "device"
    notes = [f"Latency was measured on {where}, all in turns; quality is that of the bundles' own reports."]
    notes += [f"{point.label}: {finding}" for point, record in zip(points, records, strict=True)
              for finding in device_records.findings(record)]  # fmt: skip
    run = moments(records[0]) if minutes and records else []
    if run:
        notes.append(_course(run))
    title = f"{len(points)} build{'s' * (len(points) != 1)} on {where}"
    return tradeoff.write(out, title, points, name, direction, notes=notes, run=run)


def moments(record: Record) -> list[Moment]:
    """The rounds of a record as the course of a run; seconds are those that the network ran."""
    found, seconds = [], 0.0
    for one in record.rounds:
        samples = one.ms or one.bare_ms
        if not samples:
            continue
        seconds += (sum(one.ms) + sum(one.bare_ms)) / 1e3
        clock, heat = (_highest(one.state.get(key, {})) for key in ("mhz", "celsius"))
        found.append(Moment(seconds, statistics.median(samples), float(np.percentile(samples, 99)), clock, heat))
    return found


def _highest(told: dict[str, float]) -> float | None:
    return max((value for name, value in told.items() if not name.endswith(" max")), default=None)


def _course(run: Sequence[Moment]) -> str:
    third = max(1, len(run) // 3)
    first, last = (statistics.median(m.p50 for m in part) for part in (run[:third], run[-third:]))
    absent = [name for name, values in (("clock", [m.mhz for m in run]), ("temperature", [m.celsius for m in run]))
              if all(value is None for value in values)]  # fmt: skip
    unknown = f" Not told by the device: {' and '.join(absent)}." if absent else ""
    return (
        f"Over {run[-1].seconds:.0f} s of running, p50 was {first:.4g} ms in the first third and {last:.4g} ms in the "
        f"last ({last / first - 1:+.1%}).{unknown}"
    )


def _report(path: Path) -> dict[str, Any]:
    file = bundle.read(path).path / "report.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told if isinstance(told, dict) and "result" in told else {}


def _axis(reports: Sequence[dict[str, Any]], asked: str) -> tuple[str, str]:
    """(name, direction) of the figure on the quality axis."""
    figures = [figure for report in reports for figure in report.get("result", {}).get("quality", [])]
    known = {figure["name"]: figure["direction"] for figure in figures}
    if asked and asked not in known:
        raise UsageError(f"--quality {asked}: in no report; there are: {', '.join(known) or 'none'}")
    name = asked or next((name for name in PREFERRED if name in known), next(iter(known), "quality"))
    return name, known.get(name, "higher")


def _point(record: Record, report: dict[str, Any], name: str) -> Point:
    measured = device_records.measurements(record)[0]
    latency = None
    if record.status == "measured":
        latency = (measured.value, *(measured.interval or (measured.value, measured.value)))
    artifact = record.artifact
    shape = next((spec["shape"] for spec in artifact.inputs if spec["shape"]), [1])
    facts = {"precision": artifact.precision, "runtime": artifact.runtime, "batch": str(shape[0])}
    if len(shape) == 4:
        facts["resolution"] = f"{shape[3]} x {shape[2]}"
    if unit := artifact.options.get("compute_unit"):
        facts["unit"] = str(unit)
    if steps := artifact.options.get("steps"):
        facts["steps"] = str(steps)
    quality, reason = _quality(record, report, name)
    said = "; ".join(filter(None, (record.reason, reason)))
    return Point(f"{record.network.name} ({record.target})", latency, quality, facts, said)


def _quality(record: Record, report: dict[str, Any], name: str) -> tuple[tuple[float, float, float] | None, str]:
    """The figure of the report, which is about the bundle's chosen build; of the others it says nothing."""
    result = report.get("result")
    if not result:
        return None, "the bundle has no report"
    planned = result["precision"]["plan"]
    if planned and planned != record.artifact.precision:
        return None, f"the report is about another build ({planned})"
    figure = next((one for one in result["quality"] if one["name"] == name), None)
    if figure is None or figure["value"] is None:
        return None, f"{name} not measured"
    low, high = figure["interval"] or (figure["value"], figure["value"])
    return (figure["value"], low, high), ""
