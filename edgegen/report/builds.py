"""Every build that was tried: latency, ratio, size, quality and verdict; and how to read their names."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from edgegen.report import glossary, text
from edgegen.report.parts import DASH, mark, shown, table

Report = dict[str, Any]
_LABELS = (
    '<p class="soft">A build is named "network: runtime precision"; the network is the original, or what the '
    "named passes made of it. In brackets behind int8: how activations are stored (u8s8 without a sign, s8s8 with "
    "one; s7 in place of s8: weights keep to 7 bits, as this processor would cut off larger sums) or how their ranges "
    "were found in calibration (minmax: the extremes of all samples, mean: the mean of each sample's), then the "
    "precision of what is not int8. A ratio is the latency divided by the baseline's. All "
    "builds were timed in one short run; then the baseline and the chosen one once more, in a long one, which the "
    "result above and the chosen row show. So compare rows by their ratios, not by their milliseconds.</p>"
)
_PARTS = (
    '<p class="soft">Quality: of the chosen build on the samples that are kept for the report, of the others on those '
    "that decisions are made on. So the chosen row cannot be compared with the others in it.</p>"
)


def section(report: Report) -> str:
    """Every build that was tried, with a bar for its latency; the fastest first, then what was not timed."""
    rows = report["candidates"]
    if not rows:
        return ""
    longest = max((row["latency"]["value"] or 0 for row in rows if row["latency"]), default=0)
    order = sorted(range(len(rows)), key=lambda index: _slowness(rows[index]))
    body = "".join(_candidate(index, report, longest) for index in order)
    names = ("build", "latency p50", "ratio", "size", "quality", "verdict")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return table("candidates", f"<tr>{heads}</tr>", body) + _LABELS + (_PARTS if _differ(rows) else "")


def _differ(rows: list[Report]) -> bool:
    """Whether the chosen build and another one have quality, which are then of different samples."""
    scored = {row["verdict"] for row in rows if row["quality"] is not None and row["quality"]["value"] is not None}
    return "chosen" in scored and len(scored) > 1


def _slowness(row: Report) -> float:
    """The ratio, infinite where there is none."""
    return math.inf if row["ratio"] is None or row["ratio"]["value"] is None else float(row["ratio"]["value"])


def _candidate(index: int, report: Report, longest: float) -> str:
    row, path = report["candidates"][index], f"candidates.{index}"
    latency = row["latency"]
    bar = ""
    if longest and latency and latency["value"] is not None:
        bar = f'<span class="bar" style="width:{100 * latency["value"] / longest:.1f}%"></span>'
    size = shown(f"{path}.size_bytes", row["size_bytes"], text.size(row["size_bytes"]) if row["size_bytes"] else "–")
    reason = glossary.plainly(row["reason"], report, row)
    cells = (
        ("latency", _short(f"{path}.latency", latency) + _turns(latency) + bar),
        ("ratio", _short(f"{path}.ratio", row["ratio"]) + _speed(row["ratio"])),
        ("size", size),
        ("quality", _short(f"{path}.quality", row["quality"]) + _samples(report, row)),
        ("", f'{mark(row["verdict"])}<span class="sub">{escape(reason)}</span>'),
    )
    body = "".join(f'<td data-name="{name}">{cell}</td>' if name else f"<td>{cell}</td>" for name, cell in cells)
    body = body.replace(f">{DASH}</td>", f' class="none">{DASH}</td>')
    return f'<tr class="{escape(row["verdict"])}"><th scope="row">{escape(row["label"])}</th>{body}</tr>'


def _turns(latency: Report | None) -> str:
    """How long a build was timed: rows of different runs of timing cannot be compared to the last digit."""
    rounds = latency["conditions"].get("rounds") if latency and latency["status"] == "measured" else None
    return f'<span class="sub">in {escape(str(rounds))} turns</span>' if rounds else ""


def _samples(report: Report, row: Report) -> str:
    """That the figure of the chosen build is of other samples than those of the builds beside it."""
    apart = row["verdict"] == "chosen" and _differ(report["candidates"])
    return '<span class="sub">on other samples</span>' if apart else ""


def _speed(ratio: Report | None) -> str:
    """A ratio in words: the reasons of verdicts speak so."""
    said = text.speed(ratio)
    return f'<span class="sub">{escape(said)}</span>' if said else ""


def _short(path: str, value: Report | None) -> str:
    """A figure without interval; marked only when it is not a measurement."""
    if value is None:
        return DASH
    if value["value"] is None:
        return f'<span title="{escape(value["reason"])}">{mark("not measured")}</span>'
    shown_value = shown(f"{path}.value", value["value"], text.figure(value))
    return shown_value + (f" {mark(value['status'])}" if value["status"] != "measured" else "")
