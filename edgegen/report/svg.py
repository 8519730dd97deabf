"""The latency samples of two builds as one inline picture: a dot a sample on a shared axis that starts at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from edgegen.report import text

WIDTH, LEFT, RIGHT, BAND, TOP = 880, 12, 12, 102, 6
DOTS = 400


def strip(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Rows of (label, CSS class, figure with samples); '' when none has samples.

    The axis ends a little beyond the largest p99; how many samples lie beyond it is said, not hidden. Of more than
    DOTS samples, DOTS evenly spaced order statistics are drawn, which keeps the shape.
    """
    rows = [row for row in rows if row[2]["samples"]]
    if not rows:
        return ""
    end, step = _axis(max(max(row[2]["percentiles"]["p99"] for row in rows) * 1.08, 1e-9))
    height = TOP + BAND * len(rows) + 34

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / end

    body = [_band(row, TOP + BAND * index, end, x) for index, row in enumerate(rows)]
    unit = escape(rows[0][2]["unit"])
    return (
        f'<div class="plot" tabindex="0"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="latency samples">'
        + "".join(body)
        + _ticks(end, step, height - 22, x, unit)
        + "</svg></div>"
    )


def _axis(largest: float) -> tuple[float, float]:
    """(end, tick distance): five to ten round ticks."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if largest / (power * factor) <= 10)
    return largest, step


def _band(row: tuple[str, str, dict[str, Any]], top: float, end: float, x: Callable[[float], float]) -> str:
    label, kind, figure = row
    kind, unit = escape(kind), figure["unit"]
    ordered = sorted(figure["samples"])
    inside = [value for value in ordered if value <= end]
    beyond = len(ordered) - len(inside)
    if len(inside) > DOTS:
        inside = [inside[round(i * (len(inside) - 1) / (DOTS - 1))] for i in range(DOTS)]
    p = figure["percentiles"]
    note = f"p50 {text.number(p['p50'])}, p90 {text.number(p['p90'])}, p99 {text.number(p['p99'])} {unit}, n {p['n']}"
    note += f"; {beyond} beyond the axis, up to {text.number(ordered[-1])} {unit}" if beyond else ""
    # a fixed pattern instead of random jitter: the same report draws the same page
    dots = "".join(
        f'<circle class="dot {kind}" cx="{x(value):.1f}" cy="{top + 50 + (index * 0.618034 % 1) * 36:.1f}" r="2.6"/>'
        for index, value in enumerate(inside)
    )
    marks = "".join(
        f'<line class="{kind}" x1="{x(p[name]):.1f}" x2="{x(p[name]):.1f}" y1="{top + 44}" y2="{top + 92}" '
        f'stroke-width="{width}"/>'
        for name, width in (("p50", 2.5), ("p90", 1.2), ("p99", 1.2))
        if p[name] <= end
    )
    name = f'<text class="name" x="{LEFT}" y="{top + 16}">{escape(label)}</text>'
    return name + f'<text x="{LEFT}" y="{top + 34}">{escape(note)}</text>' + dots + marks


def _ticks(end: float, step: float, y: float, x: Callable[[float], float], unit: str) -> str:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    for index in range(int(end / step) + 1):
        place = x(index * step)
        anchor = "start" if index == 0 else "middle" if place < WIDTH - 30 else "end"
        label = text.number(index * step, 2) + (f" {unit}" if index == 0 else "")
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{y}" y2="{y + 4}"/>')
        parts.append(f'<text x="{place:.1f}" y="{y + 17}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)
