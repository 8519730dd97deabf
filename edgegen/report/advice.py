"""What a reader can do next, from what the report says and what it lacks. Only facts of the report decide."""

from __future__ import annotations

from typing import Any

from edgegen.report import text

FEW = 100
"""Fewer held-out samples than this leave intervals so wide that small losses cannot be told from none."""
RISES = {"dB": 0.5, "share": 0.005}
"""What the last doubling of the calibration set brought, by unit, for another one to be worth a try."""

Report = dict[str, Any]


def next_steps(report: Report) -> list[str]:
    """Sentences, the most useful first; empty when nothing is open."""
    return [
        *_latency(report), *_runtimes(report), *_quality(report), *_calibration(report), *_steps(report), *_use(report)
    ]  # fmt: skip


def _latency(report: Report) -> list[str]:
    base, result = report["baseline"], report["result"]
    folder, found = _folder(report), []
    if result["latency"]["status"] != "measured":
        found.append(
            f"The latency on {report['target']} is not measured. Measure it there: edgegen profile {folder} --device "
            "ssh://user@device (or adb)."
        )
    elif result["label"] == base["label"]:
        found.append(
            "Nothing faster kept the limits. Allow more loss (--max-quality-drop), give more data to learn from"
            " (--data) or a stronger recipe (edgegen list recipes)."
        )
    ratio = result["ratio"]
    if ratio and ratio["interval"] and ratio["status"] == "measured" and ratio["interval"][1] >= 1:
        low, high = (text.number(end) for end in ratio["interval"])
        found.append(f"The interval of the ratio ({low} to {high}) holds 1: the gain may be none. Measure again on a "
                     f"quiet machine: edgegen profile {folder}")
    if result["latency"]["conditions"].get("load_before", 0) > 0.8 * result["latency"]["conditions"].get("cores", 1):
        turns = "the ratio holds, since both ran in turns, but " if ratio else ""
        found.append(f"The machine was busy while this was measured: {turns}the milliseconds are higher than on a "
                     "quiet machine.")
    return found


def _runtimes(report: Report) -> list[str]:
    """Another runtime may be faster than anything that was tried."""
    if not report["untried"]:
        return []
    named = "; ".join(f"{name} ({why})" for name, why in report["untried"].items())
    return [f"Not tried on {report['target']}, and perhaps faster: {named}."]


def _quality(report: Report) -> list[str]:
    quality, tested = report["result"]["quality"], report["data"].get("test")
    if not quality:
        return ["No quality was measured. Give images to judge on (--data or --eval-data) before this goes anywhere."]
    if tested is not None and tested["count"] < FEW:
        return [f"Quality was judged on {tested['count']} held-out samples. Give more (--eval-data) for narrower "
                "intervals."]
    return []


def _calibration(report: Report) -> list[str]:
    """Whether more samples to calibrate on may help: whether the end of the curve still rises."""
    last = [point for point in report["calibration_curve"] if point["quality"]["value"] is not None][-2:]
    if len(last) < 2:
        return []
    before, after = (point["quality"] for point in last)
    if after["value"] - before["value"] < RISES.get(after["unit"], float("inf")):
        return []
    return [f"Quality still rose with the last doubling of the calibration set ({text.difference(before, after)} from "
            f"{last[0]['images']} to {last[1]['images']} samples): give more (--calibration-images)."]  # fmt: skip


def _use(report: Report) -> list[str]:
    """How to take the result along."""
    if not report["reproduce"]:
        return []
    return [f"To use it: {_folder(report)}/README.md says how to run it; edgegen verify {_folder(report)} checks it "
            "on another machine."]  # fmt: skip


def _folder(report: Report) -> str:
    return report["reproduce"].removeprefix("edgegen reproduce ") or "BUNDLE"


def _steps(report: Report) -> list[str]:
    forced = [step["name"] for step in report["steps"] if step["status"] == "forced"]
    if forced:
        return [f"{', '.join(forced)} was kept only because --keep asked for it: without it the result would be better "
                "by the figures here."]
    return []
