"""Two bundles beside each other: what differs, whether it is beyond noise, and whether the second is worse.

Latency is measured anew, in turns, where both are for this machine; figures of two different runs are shown and never
divided. Quality comes from the reports, paired by sample where both were judged on the same data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import bundle, measuring, registry, stats, targets
from edgegen.errors import BundleError, TargetError, UsageError
from edgegen.report import paired, schema, text
from edgegen.types import Artifact, Bundle, Measurement

NOISE = 0.02
"""A latency or a size that changed by less than this share is the same: see candidates.LEAST_GAIN."""

Progress = Callable[[str, float], Any]


@dataclass(frozen=True)
class Line:
    """One thing that is compared. change: in words; verdict: better, worse, same, differs or not comparable; how: what
    the verdict rests on. ratio: after / before; interval: 95% of the ratio, or of the difference."""

    name: str
    before: str
    after: str
    change: str = ""
    verdict: str = "same"
    how: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Names of the two bundles, and a line for each figure."""

    before: str
    after: str
    lines: tuple[Line, ...]

    @property
    def worse(self) -> tuple[Line, ...]:
        """What is worse beyond noise."""
        return tuple(line for line in self.lines if line.verdict == "worse")

    @property
    def headline(self) -> str:
        """One sentence."""
        better, unknown = self._named("better"), self._named("not comparable")
        if self.worse:
            told = f"{self.after} is worse than {self.before} in {self._named('worse')}"
            told += f"; better in {better}" * bool(better)
        else:
            told = f"{self.after} is not worse than {self.before}" + " in what was compared" * bool(unknown)
            told += f", and better in {better}" * bool(better)
        return told + f"; not comparable: {unknown}" * bool(unknown)

    def _named(self, verdict: str) -> str:
        return ", ".join(line.name for line in self.lines if line.verdict == verdict)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `worse` says whether anything is."""
        lines = [asdict(line) for line in self.lines]
        return {"before": self.before, "after": self.after, "worse": bool(self.worse), "lines": lines}


def compare(
    before: Path,
    after: Path,
    *,
    measure: bool = True,
    rounds: int = 15,
    noise: float = NOISE,
    quality_drop: float = 0.0,
    progress: Progress = lambda text, fraction: None,
) -> Comparison:
    """Compare the chosen artifacts of two bundles.

    Args:
        measure: time both now, in turns, when they are for this machine; False: the figures of their reports.
        noise: share by which latency or size may grow. quality_drop: how far a figure may move, in its own unit.
    Raises:
        UsageError: networks of different tasks, or numbers out of range. BundleError: not a bundle, or without report.
    """
    if not 0 <= noise < 1 or quality_drop < 0 or rounds < 3:
        raise UsageError(
            f"noise must lie in [0, 1), quality drop be 0 or more and rounds 3 or more, got {noise:g}, {quality_drop:g}"
            f" and {rounds}"
        )
    sides = [bundle.read(path) for path in (before, after)]
    tasks = [str(side.manifest["model"]["task"]) for side in sides]
    if tasks[0] != tasks[1]:
        raise UsageError(f"{after} is for {tasks[1]}, {before} for {tasks[0]}: there is nothing to compare")
    reports = [_report(side) for side in sides]
    results = [report["result"] for report in reports]
    lines = [_latency(sides, results, measure, rounds, noise, progress)]
    lines += [_number("size", key, results, noise, text.size) for key in ("size_bytes",)]
    lines += [_number("peak memory", "peak_memory_bytes", results, 0.1, text.size)]
    lines += _quality(reports, quality_drop)
    lines += [_told(name, *values) for name, values in _facts(sides, reports)]
    return Comparison(str(before), str(after), tuple(lines))


def _report(opened: Bundle) -> dict[str, Any]:
    file = opened.path / "report.json"
    try:
        return schema.normalise(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: no report to compare ({' '.join(str(error).split())[:120]})") from error


def _latency(
    sides: Sequence[Bundle], results: Sequence[dict[str, Any]], measure: bool, rounds: int, noise: float,
    progress: Progress,
) -> Line:  # fmt: skip
    why = _not_here(sides) if measure else "not asked to measure again"
    if not why:
        artifacts = [bundle.artifacts(side)[0] for side in sides]
        progress("latency of both, in turns", 0.0)
        times = measuring.time_interleaved(artifacts, [_feeds(*both) for both in zip(sides, artifacts)], rounds=rounds)
        progress("latency of both, in turns", 1.0)
        failed = [f"{side.path}: {one.reason}" for side, one in zip(sides, times) if one.status != "measured"]
        if not failed:
            return _timed(times, noise)
        why = "; ".join(failed)
    before, after = (text.figure(result["latency"]) for result in results)
    how = f"from the two reports, whose runs were not interleaved ({why})"
    return Line("latency p50", before, after, "", "not comparable", how)


def _timed(times: Sequence[Measurement], noise: float) -> Line:
    ratio = measuring.ratio(times[1], times[0])
    verdict = "same"
    if ratio.interval is not None and ratio.interval[0] > 1.0 and ratio.value > 1.0 + noise:
        verdict = "worse"
    if ratio.interval is not None and ratio.interval[1] < 1.0 and ratio.value < 1.0 - noise:
        verdict = "better"
    told = schema.figure(ratio)
    before, after = (text.figure(schema.figure(one)) for one in times)
    change = f"{text.speed(told)} (ratio {text.number(ratio.value)}, 95% {text.interval(told)})"
    where = times[1].conditions.get("cpu_model")
    how = f"measured now, in {ratio.conditions['rounds']} turns{f' on {where}' if where else ''}"
    return Line("latency p50", before, after, change, verdict, how, ratio.value, ratio.interval)


def _not_here(sides: Sequence[Bundle]) -> str:
    """Why the two cannot be timed on this machine; empty when they can."""
    for side in sides:
        name = str(side.manifest["target"])
        try:
            here = targets.load(name).is_host
        except TargetError:
            here = False
        if not here:
            return f"{side.path} is for {name}, which is not this machine"
        if why := registry.module("runtimes", bundle.artifacts(side)[0].runtime).missing():
            return why
    return ""


def _feeds(opened: Bundle, artifact: Artifact) -> dict[str, np.ndarray]:
    """One golden input, else zeros."""
    for case in opened.manifest["golden"]:
        if case["artifact"] == 0:
            with np.load(opened.path / case["file"], allow_pickle=False) as stored:
                return {k.removeprefix("input:"): stored[k][:1] for k in stored.files if k.startswith("input:")}
    return {spec.name: np.zeros([int(size) for size in spec.shape], spec.dtype) for spec in artifact.inputs}


def _number(
    name: str, key: str, results: Sequence[dict[str, Any]], noise: float, form: Callable[[int | None], str]
) -> Line:
    old, new = (result[key] for result in results)
    shown = (form(old), form(new))
    if not old or new is None:
        return Line(name, *shown, "", "not comparable", "not in both reports")
    verdict = "worse" if new > old * (1 + noise) else "better" if new < old * (1 - noise) else "same"
    how = f"from the reports; the same within {noise:.0%}"
    return Line(name, *shown, text.percent_less(old, new), verdict, how, new / old)


def _quality(reports: Sequence[dict[str, Any]], allowed: float) -> list[Line]:
    sides = [{figure["name"]: figure for figure in report["result"]["quality"]} for report in reports]
    tests = [report["data"].get("test", {}) for report in reports]
    same_data = bool(tests[0]) and tests[0] == tests[1] and bool(tests[0].get("sha256"))
    found = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = (side.get(name) for side in sides)
        if old is None or new is None or old["value"] is None or new["value"] is None:
            found.append(Line(name, text.figure(old), text.figure(new), "", "not comparable", "not in both reports"))
        else:
            found.append(_figure(name, old, new, same_data, allowed))
    return found


def _figure(name: str, old: dict[str, Any], new: dict[str, Any], same_data: bool, allowed: float) -> Line:
    shown, change = (text.figure(old), text.figure(new)), text.difference(old, new)
    told = [side["conditions"] for side in (old, new)]
    differing = [key for key in ("n", "seed", "extractor_sha256") if told[0].get(key) != told[1].get(key)]
    if not same_data or differing:
        how = f"judged with another {', '.join(differing) or 'test data'}: from two reports"
        return Line(name, *shown, change, "not comparable", how)
    by_sample = paired.differences(old, new)
    if by_sample is not None:
        interval: tuple[float, float] = stats.mean_interval(by_sample)
        how = f"the same {len(by_sample)} samples, paired; 95% of the difference {_span(interval)}"
    elif old["interval"] and new["interval"]:
        interval = (new["interval"][0] - old["interval"][1], new["interval"][1] - old["interval"][0])
        how = f"from the two intervals; the difference lies in {_span(interval)}"
    else:
        return Line(name, *shown, change, "not comparable", "a figure without interval")
    sign = 1.0 if new["direction"] == "higher" else -1.0
    if new["conditions"].get("two_sided"):  # zero is best: away from it is worse, on either side
        sign = -1.0 if max(old["value"], new["value"], key=abs) > 0 else 1.0
    low, high = sorted(sign * end for end in interval)  # of the gain
    verdict = "worse" if high < -allowed else "better" if low > 0 else "same"
    return Line(name, *shown, change, verdict, how, None, interval)


def _span(interval: tuple[float, float]) -> str:
    return f"{text.number(interval[0])} to {text.number(interval[1])}"


def _facts(
    sides: Sequence[Bundle], reports: Sequence[dict[str, Any]]
) -> list[tuple[str, tuple[str, str]]]:
    """What is told, not judged: (name, (before, after))."""

    def both(read: Callable[[Bundle, dict[str, Any]], str]) -> tuple[str, str]:
        first, second = (read(*pair) for pair in zip(sides, reports, strict=True))
        return first, second

    return [
        ("network", both(lambda side, _: str(side.manifest["model"]["name"]))),
        ("target", both(lambda side, _: str(side.manifest["target"]))),
        ("build", both(lambda side, _: bundle.artifacts(side)[0].label)),
        ("MACs", both(lambda _, report: text.count(report["result"]["macs"]))),
        ("parameters", both(lambda _, report: text.count(report["result"]["params"]))),
        *((label, both(functools.partial(_share, key))) for key, label in text.INT8_SHARES),
        ("passes kept", both(lambda _, report: _passes(report))),
    ]


def _share(key: str, _: Bundle, report: dict[str, Any]) -> str:
    return text.share(report["result"]["precision"][key])


def _passes(report: dict[str, Any]) -> str:
    kept = [step for step in report["steps"] if step["status"] in ("kept", "forced", "predicted", "needs recovery")]
    options = (f" ({text.plain(step['options'])})" if step["options"] else "" for step in kept)
    return ", ".join(step["name"] + more for step, more in zip(kept, options, strict=True)) or "none"


def _told(name: str, before: str, after: str) -> Line:
    return Line(name, before, after, "", "same" if before == after else "differs")


def notes(found: Comparison) -> list[str]:
    """What each verdict rests on; lines that rest on the same are told together."""
    groups: dict[str, list[str]] = {}
    for line in found.lines:
        if line.how:
            groups.setdefault(line.how, []).append(line.name)
    return [f"{', '.join(names)}: {how}" for how, names in groups.items()]


def markdown(found: Comparison) -> str:
    """The comparison as a table for a pull request."""
    marks = {"worse": "**worse**", "better": "better", "same": "same", "differs": "differs"}

    def cell(words: str) -> str:
        return words.replace("|", "\\|").replace("\n", " ")

    rows = [
        f"| {cell(line.name)} | {cell(line.before)} | {cell(line.after)} | {cell(line.change)} | "
        f"{marks.get(line.verdict, line.verdict)} |"
        for line in found.lines
    ]
    head = f"| | `{found.before}` | `{found.after}` | change | |\n|---|---|---|---|---|"
    listed = "\n".join(f"- {cell(note)}" for note in notes(found))
    return f"**{found.headline}.**\n\n{head}\n" + "\n".join(rows) + f"\n\n{listed}"
