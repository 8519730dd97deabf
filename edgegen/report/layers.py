"""The layers of report.html: where the time goes, what each layer reached, precision promised and obtained."""

from __future__ import annotations

from html import escape
from typing import Any

from edgegen.report import svg_plots, text
from edgegen.report.parts import mark, shown

Report = dict[str, Any]
_SENSITIVE = (
    "SQNR: signal to noise of the network's output when this layer alone is INT8; low ones cost the most quality."
    " Recovers: what comes back when it alone is left in float, in dB, or in the task's figure if that was measured."
)
_FIRST = 10
"""Rows that are open; the rest is one press away."""
_SENSITIVITY = '<code>pass = "quantize"</code> with <code>options = { sensitivity = "output" }</code>'
_OPTIONAL = (("sqnr_db", "SQNR"), ("recovers", "recovers if left in float"))


def section(report: Report) -> str:
    """Plots and table of the layers, with what is measured, calculated and not known said above; '' without layers."""
    layers = report["layers"]
    if not layers:
        return ""
    timed = [layer for layer in layers if layer["ms"]]
    roof = report["roof"]
    pictures = _titled(_GAP, svg_plots.gap(layers, roof)) + _titled(_WATER, svg_plots.waterline(layers, roof))
    return _told(report, timed) + (f'<div class="plots">{pictures}</div>' if pictures else "") + _table(report, timed)


_GAP = (
    "Efficiency gap: where time is lost",
    "A box is a layer: as wide as its MACs, as high as the speed that it reached. What is empty above the boxes is time"
    " that a better kernel, or another width of the layer, could win.",
)
_WATER = (
    "Waterline: what waits for memory",
    "How much a layer computes for each byte that it moves. Low ones wait for memory rather than compute: narrower"
    " types, and layers that are fused or left out, help them.",
)


def _titled(title: tuple[str, str], picture: str) -> str:
    return f'<h3>{title[0]}</h3><p class="soft">{title[1]}</p>{picture}' if picture else ""


def _told(report: Report, timed: list[Report]) -> str:
    parts = []
    if timed:
        parts.append(f"{mark('measured')} times of single layers, with the runtime's own counters on ({timed[0]['n']} "
                     "runs, median); counting costs time, so their sum is more than the latency."
                     + _beside(timed))
    else:
        reason = report["layers_reason"] or "this report holds none"
        parts.append(f"{mark('not measured')} times of single layers: {escape(reason)}.")
    parts.append(f"{mark('calculated')} MACs and bytes, from shapes and the precision obtained.")
    absent = [label for key, label in _OPTIONAL if all(layer[key] is None for layer in report["layers"])]
    if absent:
        parts.append(f"{mark('not measured')} {escape(' and '.join(absent))} of single layers: no pass of this run "
                     f"reported it; {_SENSITIVITY} in a recipe does.")
    return f'<p class="soft">{" ".join(parts)}</p>'


def _beside(timed: list[Report]) -> str:
    """How much of the time went to kernels without MACs, which the plot of MACs cannot show."""
    total, beside = (sum(layer["ms"] for layer in kind) for kind in (timed, [x for x in timed if not x["macs"]]))
    return f" {text.share(beside / total)} of it went to kernels without MACs, such as resizing." if beside else ""


def _table(report: Report, timed: list[Report]) -> str:
    """Slowest layers first where times are known, else in the order of the network."""
    layers, roof = report["layers"], report["roof"]
    total = sum(layer["ms"] for layer in timed)
    longest = max((layer["ms"] for layer in timed), default=0.0)
    shares, named = svg_plots.reached(layers, roof)
    columns = [key for key, _ in _OPTIONAL if any(layer[key] is not None for layer in layers)]
    names = ["layer", "time", "MACs", "bytes", f"reached{'*' if named else ''}", "precision", "ran as"]
    names += [label + ", dB" * (key == "sqnr_db") for key, label in _OPTIONAL if key in columns]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = []
    for index in sorted(range(len(layers)), key=lambda i: -(layers[i]["ms"] or 0.0)):
        layer, share, path = layers[index], shares[index], f"layers.{index}"
        bar = f'<span class="bar" style="width:{100 * layer["ms"] / longest:.1f}%"></span>' if layer["ms"] else ""
        part = f'<span class="sub">{text.share(layer["ms"] / total)}</span>' if layer["ms"] else ""
        time = shown(f"{path}.ms", layer["ms"], "–" if layer["ms"] is None else f"{text.number(layer['ms'])} ms")
        cells = [
            time + part + bar,
            shown(f"{path}.macs", layer["macs"], "–" if layer["macs"] is None else text.count(layer["macs"])),
            shown(f"{path}.bytes", layer["bytes"], "–" if layer["bytes"] is None else text.size(layer["bytes"])),
            "–" if share is None else text.share(share),
            _precision(layer),
            escape(layer["kernel"] or "–"),
        ]
        cells += [shown(f"{path}.{key}", layer[key], text.number(layer[key])) for key in columns]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{escape(layer["name"])}<span class="sub">{escape(layer["op"])}</span></th>'
                    f"{row}</tr>")
    note = f'<p class="soft">* Share {escape(named)}.</p>' if named else ""
    note += f'<p class="soft">{_SENSITIVE}</p>' if columns else ""
    more = body[_FIRST:]
    rest = f"<details><summary>{len(more)} more layers</summary>{_card(head, more)}</details>" if more else ""
    return _card(head, body[:_FIRST]) + note + rest


def _card(head: str, body: list[str]) -> str:
    table = f'<table class="layers"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="card" tabindex="0" role="region" aria-label="layers">{table}</div>'


def _precision(layer: Report) -> str:
    promised, obtained = layer["promised"], layer["obtained"]
    if not obtained:
        return "–" if not promised else f'{escape(promised)} asked<span class="sub">not read back</span>'
    if not promised or promised == obtained:
        return escape(obtained)
    return f'<span class="worse">{escape(obtained)}</span><span class="sub">asked: {escape(promised)}</span>'
