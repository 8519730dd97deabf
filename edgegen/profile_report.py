"""From the records of a device and the reports of the bundles to the trade-off page: which figure goes where."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import bundle, device_records, files, samplers
from edgegen.device_records import Record
from edgegen.errors import MissingExtra, UsageError
from edgegen.report import tradeoff
from edgegen.report.tradeoff import Moment, Point

_PER_IMAGE = (
    "Of a denoiser, the latency is that of an image: the runs of the network that it takes, times the latency of a run."
)
_OTHER_DATA = (
    "The bundles were not all judged on the same samples (see the column of that name): their quality can be compared"
    " only within the same ones, which have a front of their own."
)
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
    told = names(bundles)
    sides = {_key(path): _side(path, told[_key(path)]) for path in bundles}
    name, direction, unit = _axis([side.report for side in sides.values()], quality)
    points = [_point(record, sides.get(record.provenance.bundle_sha256), name) for record in records]
    facts: dict[str, Any] = next((record.device.get("facts", {}) for record in records), {})
    where = facts.get("model") or facts.get("cpu_model") or "device"
    notes = [f"Latency was measured on {where}, all in turns; quality is that of the bundles' own reports, each with "
             "its own interval. What two bundles judged on the same samples differ in, edgegen compare tells closer."]
    if any(side.runs > 1 for side in sides.values()):
        notes.append(_PER_IMAGE)
    if len({point.data for point in points if point.quality is not None}) > 1:
        notes.append(_OTHER_DATA)
    notes += [f"Not steady: {point.label}: {finding}" for point, record in zip(points, records, strict=True)
              for finding in device_records.findings(record)]  # fmt: skip
    run = moments(records[0]) if minutes and records else []
    if run:
        notes.append(course(run))
    title = f"{len(points)} build{'s' * (len(points) != 1)} on {where}"
    shown = f"{name} ({unit})" if unit else name
    return tradeoff.write(out, title, points, shown, direction, notes=notes, run=run)


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


def course(run: Sequence[Moment]) -> str:
    """What latency did over a long run, in a sentence; "" without rounds."""
    if not run:
        return ""
    third = max(1, len(run) // 3)
    first, last = (statistics.median(m.p50 for m in part) for part in (run[:third], run[-third:]))
    absent = [name for name, values in (("clock", [m.mhz for m in run]), ("temperature", [m.celsius for m in run]))
              if all(value is None for value in values)]  # fmt: skip
    unknown = f" Not told by the device: {' and '.join(absent)}." if absent else ""
    return (
        f"Over {run[-1].seconds:.0f} s of running, p50 was {first:.4g} ms in the first third and {last:.4g} ms in the "
        f"last ({last / first - 1:+.1%}).{unknown}"
    )


@dataclass(frozen=True)
class _Side:
    """A bundle: its name in the picture, its report, how many runs of the network an image takes and how many of them
    are partial ones, the steps of its sampler (0: it has none)."""

    name: str
    report: dict[str, Any]
    runs: int = 1
    partial: int = 0
    steps: int = 0


def _side(path: Path, name: str) -> _Side:
    loop = samplers.of(bundle.read(path).manifest["model"]["options"])
    if loop is None:
        return _Side(name, _report(path))
    runs, partial = samplers.calls(loop)
    return _Side(name, _report(path), runs, partial, int(loop["steps"]))


def names(bundles: Sequence[Path]) -> dict[str, str]:
    """`Provenance.bundle_sha256` of each bundle -> its folder's name, or its path where two have the same name."""
    short = {path: path.resolve().name for path in bundles}
    apart = len(set(short.values())) == len(short)
    return {_key(path): name if apart else str(path) for path, name in short.items()}


def _key(path: Path) -> str:
    return files.sha256(path / "manifest.json")


def _report(path: Path) -> dict[str, Any]:
    file = bundle.read(path).path / "report.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told if isinstance(told, dict) and "result" in told else {}


def _axis(reports: Sequence[dict[str, Any]], asked: str) -> tuple[str, str, str]:
    """(name, direction, unit as it is shown) of the figure on the quality axis."""
    figures = [figure for report in reports for figure in report.get("result", {}).get("quality", [])]
    known = {figure["name"]: figure for figure in figures}
    if asked and asked not in known:
        raise UsageError(f"--quality {asked}: in no report; there are: {', '.join(known) or 'none'}")
    name = asked or next((name for name in PREFERRED if name in known), next(iter(known), "quality"))
    unit = known.get(name, {}).get("unit", "")
    return name, known.get(name, {}).get("direction", "higher"), "%" if unit == "share" else unit


def _point(record: Record, side: _Side | None, name: str) -> Point:
    side = side or _Side(record.network.name, {})
    latency, untold = _latency(record, side)
    artifact = record.artifact
    shape = _shape(record)
    facts = {"network": record.network.name, "target": record.target, "runtime": artifact.runtime}
    facts |= {"precision": artifact.precision, "batch": str(shape[0])}
    if len(shape) == 4:
        facts["resolution"] = f"{shape[3]} x {shape[2]}"
    if unit := artifact.options.get("compute_unit"):
        facts["unit"] = str(unit)
    if side.steps:
        facts |= {"steps": str(side.steps), "runs an image": str(side.runs)}
    quality, reason = _quality(record, side.report, name)
    tested = side.report.get("data", {}).get("test", {})
    if tested.get("sha256"):
        facts["samples"] = f"{tested['count']:,} ({tested['sha256'][:6]})"
    said = "; ".join(filter(None, (untold, reason)))
    return Point(side.name, latency, quality, facts, said, tested.get("sha256", ""))


def _latency(record: Record, side: _Side) -> tuple[tuple[float, float, float] | None, str]:
    """(p50 and its interval in ms, of an image where several runs make one; why it is not known)."""
    if record.status != "measured":
        return None, record.reason
    if side.partial:
        return None, "with cached blocks two networks take turns, and here only the whole one was timed"
    measured = device_records.measurements(record)[0]
    low, high = measured.interval or (measured.value, measured.value)
    return (measured.value * side.runs, low * side.runs, high * side.runs), ""


def _shape(record: Record) -> list[int]:
    return next((spec["shape"] for spec in record.artifact.inputs if spec["shape"]), [1])


def _quality(record: Record, report: dict[str, Any], name: str) -> tuple[tuple[float, float, float] | None, str]:
    """The figure of the report, which is about the chosen build at each of its sizes; of others it says nothing."""
    result = report.get("result")
    if not result:
        return None, "the bundle has no report"
    planned = result["precision"]["plan"]
    if planned and planned != record.artifact.precision:
        return None, f"the report is about another build ({planned})"
    sizes = {tuple(row["size"]): row["quality"] for row in report.get("resolutions", [])}
    known = sizes.get(tuple(_shape(record)[2:]), []) if sizes else result["quality"]
    figure = next((one for one in known if one["name"] == name), None)
    if figure is None or figure["value"] is None:
        return None, f"{name} not measured"
    share = 100.0 if figure["unit"] == "share" else 1.0
    low, high = figure["interval"] or (figure["value"], figure["value"])
    return (share * figure["value"], share * low, share * high), ""
