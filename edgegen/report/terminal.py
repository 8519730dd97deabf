"""The result on a terminal: the headline, the table and the decisions; `progress` is what is shown on the way there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgegen.report import glossary, paired, text
from edgegen.report.progress import progress
from edgegen.report.schema import Report, normalise

_STYLES = {
    "kept": "green", "chosen": "green", "predicted": "yellow", "forced": "yellow", "failed": "red",
    "needs recovery": "yellow",
    "undone": "dim", "rejected": "dim", "skipped": "dim", "baseline": "",
}  # fmt: skip


__all__ = ["progress", "render", "table"]


def render(report: Mapping[str, Any] | Report, console: Console | None = None) -> None:
    """Print `table(report)` on standard output, or on the console given."""
    (console or Console()).print(table(report))


def table(report: Mapping[str, Any] | Report) -> RenderableType:
    """Headline, stamps, the table of the page, and what became of each step and build."""
    checked = normalise(report)
    parts: list[RenderableType] = [Text(checked["headline"], style="bold")]
    parts += [Text(stamp, style="bold yellow") for stamp in checked["stamps"]]
    parts += [Text(""), _figures(checked)]
    if checked["resolutions"]:
        parts += [Text(""), _sizes(checked["resolutions"])]
    if checked["steps"]:
        rows = [(s["name"], s["status"], glossary.plainly(s["reason"], checked)) for s in checked["steps"]]
        parts += [Text(""), _decisions("step", rows)]
    if checked["candidates"]:
        parts += [Text(""), _builds(checked)]
    return Group(*parts)


def _figures(report: dict[str, Any]) -> Table:
    base, result = report["baseline"], report["result"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(f"baseline\n{escape(base['label'])}", justify="right", style="dim")
    table.add_column(f"result\n{escape(result['label'])}", justify="right", style="bold")
    table.add_column("change", justify="left")
    ratio = result["ratio"]
    change = ""
    if ratio and ratio["value"] is not None:
        spread = f", {text.interval(ratio)}" if ratio["interval"] else ""
        change = f"{text.speed(ratio)} (ratio {text.number(ratio['value'])}{spread})"
    table.add_row("latency p50", _cell(base["latency"]), _cell(result["latency"]), change)
    for name in ("p90", "p99"):
        if base["latency"]["percentiles"] or result["latency"]["percentiles"]:
            cells = (text.number((row["latency"]["percentiles"] or {}).get(name)) for row in (base, result))
            table.add_row(f"latency {name}", *(cell if cell == "–" else f"{cell} ms" for cell in cells), "")
    forms: tuple[tuple[str, str, Callable[[int | None], str]], ...] = (
        ("macs", "MACs", text.count), ("params", "parameters", text.count),
        ("size_bytes", "file size", text.size), ("peak_memory_bytes", "peak memory", text.size),
    )  # fmt: skip
    for key, label, form in forms:
        table.add_row(label, form(base[key]), form(result[key]), text.percent_less(base[key], result[key]))
    _quality_rows(table, base["quality"], result["quality"])
    for key, label in text.INT8_SHARES:
        shares = [row["precision"][key] for row in (base, result)]
        if any(value is not None for value in shares):
            table.add_row(label, *map(text.share, shares), "read back from the file")
    return table


def _sizes(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title="input sizes", title_justify="left", title_style="bold")
    for name in ("height x width", "p50", "ratio", "size", "quality", ""):
        table.add_column(name, header_style="dim")
    for row in rows:
        figures = (row["latency"], row["ratio"], *row["quality"][:1], *([] if row["quality"] else [None]))
        latency, ratio, quality = (_cell(value) if value else "–" for value in figures)
        size = text.size(row["size_bytes"]) if row["size_bytes"] is not None else "–"
        table.add_row("x".join(map(str, row["size"])), latency, ratio, size, quality, escape(row["reason"]))
    return table


def _quality_rows(table: Table, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    sides = [{figure["name"]: figure for figure in side} for side in (before, after)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        cells = [_cell(side[name]) if name in side else "–" for side in sides]
        table.add_row(escape(name), *cells, _moved(*(side.get(name) for side in sides)))


def _moved(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """How far a figure moved, with the interval of that where both have the same samples, else with the result's."""
    change, spread = text.difference(before, after), text.interval(after)
    if change and before is not None and after is not None and (span := paired.interval(before, after)) is not None:
        return f"{change} (95% {text.difference_span(span, after['unit'])})"
    return "; ".join(filter(None, (change, spread and f"result 95% {spread}")))


def _cell(figure: dict[str, Any]) -> str:
    """Value and unit; an estimate says so, a missing measurement gives its reason."""
    reason = f": {figure['reason']}" if figure["value"] is None and figure["reason"] else ""
    return escape(text.figure(figure) + reason + (" (estimated)" if figure["status"] == "estimated" else ""))


def _decisions(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, status, reason in rows:
        table.add_row(escape(name), Text(status, style=_STYLES[status]), escape(reason))
    table.title, table.title_justify, table.title_style = f"{title}s", "left", "bold"
    return table


def _builds(report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, title="builds tried", title_justify="left", title_style="bold")
    for name in ("build", "p50", "ratio", "size", "quality", "verdict"):
        table.add_column(name, justify="left" if name in ("build", "verdict") else "right", header_style="dim")
    for row in report["candidates"]:
        reason = glossary.plainly(row["reason"], report, row)
        verdict = Text.assemble((row["verdict"], _STYLES[row["verdict"]]), f"  {reason}" if reason else "")
        numbers = [_cell(row[key]) if row[key] else "–" for key in ("latency", "ratio")]
        quality = _cell(row["quality"]) if row["quality"] else "–"
        size = text.size(row["size_bytes"]) if row["size_bytes"] is not None else "–"
        table.add_row(escape(row["label"]), *numbers, size, quality, verdict)
    return table
