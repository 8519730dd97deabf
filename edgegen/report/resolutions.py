"""The result at several input sizes: a row a size, each with its own latency, size and quality."""

from __future__ import annotations

from html import escape
from typing import Any

from edgegen.report import text
from edgegen.report.parts import figure, mark, shown

Report = dict[str, Any]
_NAMES = ("input (height x width)", "latency p50", "ratio", "size", "quality", "")


def section(report: Report) -> str:
    """The table; empty where the bundle is for one size that nobody asked for."""
    rows = report["resolutions"]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in _NAMES)
    body = "".join(_row(f"resolutions.{number}", row) for number, row in enumerate(rows))
    said = "Passes and precision were decided at the first size; the others are the same network, built the same way."
    table = f'<table class="candidates"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<p class="soft">{said}</p><div class="card">{table}</div>'


def _row(path: str, row: Report) -> str:
    deciding = row["quality"][0] if row["quality"] else None
    size = shown(f"{path}.size_bytes", row["size_bytes"], text.size(row["size_bytes"]) if row["size_bytes"] else "–")
    cells = (
        ("latency", figure(f"{path}.latency", row["latency"])),
        ("ratio", figure(f"{path}.ratio", row["ratio"]) if row["ratio"] else '<span class="soft">–</span>'),
        ("size", size),
        ("quality", figure(f"{path}.quality.0", deciding)),
    )
    absent = mark("failed") if row["artifact"] is None else ""
    body = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells)
    verdict = f'<td>{absent}<span class="sub">{escape(row["reason"])}</span></td>'
    return f'<tr><th scope="row">{row["size"][0]}x{row["size"][1]}</th>{body}{verdict}</tr>'
