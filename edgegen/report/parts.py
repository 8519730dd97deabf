"""Tables and lists of report.html. Every number taken from the report is a <data> element that names its path.

So a test (and a reader with the page's source) can hold each shown number against report.json.
"""

from __future__ import annotations

from html import escape
from typing import Any

from edgegen import registry
from edgegen.report import glossary, paired, text

Report = dict[str, Any]
DASH = '<span class="soft">–</span>'


def shown(path: str, value: Any, as_text: str) -> str:
    """`as_text`, bound to the exact `value` at `path` of report.json; plain text where there is no value."""
    if value is None:
        return f'<span class="soft">{escape(as_text)}</span>'
    return f'<data value="{value!r}" data-path="{escape(path)}">{escape(as_text)}</data>'


def mark(kind: str) -> str:
    """A small label: measured, estimated, not measured, kept, undone ..."""
    return f'<span class="mark {escape(kind.replace(" ", "-"))}">{escape(kind)}</span>'


def figure(path: str, value: Report | None, *, with_mark: bool = True) -> str:
    """Value, then below it the status, the interval and n; 'not measured' with its reason."""
    if value is None:
        return mark("not measured")
    if value["value"] is None:
        return mark("not measured") + f'<span class="sub">{escape(value["reason"])}</span>'
    lines = [mark(value["status"])] if with_mark else []
    if value["interval"] is not None:
        ends = zip(value["interval"], text.interval(value).split(" to "))
        both = " to ".join(shown(f"{path}.interval.{i}", end, words) for i, (end, words) in enumerate(ends))
        lines.append(f"{'95%' if value['status'] == 'measured' else 'range'} {both}")
    n = value["conditions"].get("n") or (value["percentiles"] or {}).get("n")
    lines += [f"n {escape(text.plain(n))}"] if n else []
    kinds = value["conditions"].get("kinds") or {}
    lines += [escape(f"{count} {kind}") for kind, count in kinds.items() if count]
    sub = "".join(f'<span class="sub">{line}</span>' for line in lines)
    return shown(f"{path}.value", value["value"], text.figure(value)) + sub


def figures_table(report: Report) -> str:
    """The one table: a row a figure, the baseline, the result, and what changed."""
    base, result = report["baseline"], report["result"]
    rows = _latency_rows(base, result) + _throughput_rows(base, result)
    for name, label, form in (
        ("macs", "MACs", text.count),
        ("params", "parameters", text.count),
        ("size_bytes", "file size", text.size),
        ("peak_memory_bytes", "peak memory", text.size),
    ):
        cells = [shown(f"{side}.{name}", report[side][name], form(report[side][name])) for side in _SIDES]
        change, kind = text.percent_less(base[name], result[name]), _better(base[name], result[name], "lower")
        if name == "peak_memory_bytes" and kind and abs(result[name] / base[name] - 1) < _MEMORY_NOISE:
            kind = ""
        rows.append(_row(label, cells, f'<span class="{kind}">{change}</span>'))
    rows += _quality_rows(base, result) + _precision_rows(report)
    head = f'<tr><td></td><th scope="col">baseline<span class="sub">{escape(base["label"])}</span></th>'
    head += f'<th scope="col" class="result">result<span class="sub">{escape(result["label"])}</span></th>'
    head += '<th scope="col">change</th></tr>'
    return table("figures", head, "".join(rows))


_SIDES = ("baseline", "result")
_MEMORY_NOISE = 0.05
"""Peak memory that changed by less than this share may be the same: one process was looked at."""


def table(kind: str, head: str, body: str) -> str:
    return f'<div class="card"><table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _row(label: str, cells: list[str], change: str, kind: str = "") -> str:
    base, result = cells
    return (
        f'<tr class="{kind}"><th scope="row">{escape(label)}</th><td>{base}</td>'
        f'<td class="result">{result}</td><td>{change}</td></tr>'
    )


def _better(before: float | None, after: float | None, direction: str) -> str:
    if before is None or after is None or before == after:
        return ""
    return "better" if (after < before) == (direction == "lower") else "worse"


def _latency_rows(base: Report, result: Report) -> list[str]:
    latencies = {"baseline": base["latency"], "result": result["latency"]}
    ratio = result["ratio"]
    change = ""
    if ratio is not None and ratio["value"] is not None:
        low_high = f" ({text.interval(ratio)})" if ratio["interval"] else ""
        kind = _better(1.0, ratio["value"], "lower") if ratio["status"] == "measured" else ""
        change = f'<span class="{kind}">{text.speed(ratio)}</span>'
        change += f'<span class="sub">{mark(ratio["status"])}</span><span class="sub">ratio '
        change += shown("result.ratio.value", ratio["value"], text.number(ratio["value"]))
        change += f"{low_high}</span>"
    elif ratio is not None:
        change = mark("not measured") + f'<span class="sub">{escape(ratio["reason"])}</span>'
    cells = [figure(f"{side}.latency", latencies[side]) for side in _SIDES]
    rows = [_row("latency p50", cells, change, "main")]
    if not any(latencies[side]["percentiles"] for side in _SIDES):
        return rows
    for name in ("p90", "p99"):
        cells = []
        for side in _SIDES:
            value = (latencies[side]["percentiles"] or {}).get(name)
            shown_text = "–" if value is None else f"{text.number(value)} {latencies[side]['unit']}"
            cells.append(shown(f"{side}.latency.percentiles.{name}", value, shown_text))
        rows.append(_row(f"latency {name}", cells, ""))
    return rows


def _throughput_rows(base: Report, result: Report) -> list[str]:
    """Samples a second one after the other, which is 1000 / p50 over the batch, then many at once."""
    cells, rates = [], []
    for side in (base, result):
        latency, batch = side["latency"], side["latency"]["conditions"].get("batch", 1)
        known = latency["status"] == "measured" and latency["value"] and latency["unit"] == "ms"
        rates.append(1000 * batch / latency["value"] if known else None)
        sub = f'<span class="sub">{mark("calculated")} 1000 / p50, batch {text.plain(batch)}</span>'
        cells.append(f"{text.number(rates[-1])}/s{sub}" if known else mark("not measured"))
    if not any(rates):
        return []
    rows = [_row("samples a second", cells, "")]
    ways = list(dict.fromkeys(_way(one) for side in (base, result) for one in side["throughput"]))
    for way in ways:
        cells, values = [], []
        for name, side in zip(_SIDES, (base, result), strict=True):
            found = next((i for i, one in enumerate(side["throughput"]) if _way(one) == way), None)
            cells.append(DASH if found is None else figure(f"{name}.throughput.{found}", side["throughput"][found]))
            values.append(None if found is None else side["throughput"][found]["value"])
        before, after = values
        change = f'<span class="{_better(before, after, "higher")}">{text.percent_less(before, after)}</span>'
        rows.append(_row(f"samples a second, {way}", cells, change))
    if not ways:
        rows.append(_row("samples a second, several at once", [mark("not measured")] * 2, ""))
    return rows


def _way(rate: Report) -> str:
    """How many ran at once, in words."""
    told = rate["conditions"]
    batch, count, each = (told.get(key, 1) for key in ("batch", "streams", "threads"))
    parts = [f"batch {text.plain(batch)}"] if batch != 1 else []
    if count != 1:
        parts.append(f"{text.plain(count)} at once ({text.plain(each)} thread{'s' * (each != 1)} each)")
    return ", ".join(parts) or "several at once"


def _quality_rows(base: Report, result: Report) -> list[str]:
    sides = {"baseline": base["quality"], "result": result["quality"]}
    names = list(dict.fromkeys(figure["name"] for side in _SIDES for figure in sides[side]))
    rows: list[str] = []
    for name in names:
        cells, values = [], []
        for side in _SIDES:
            index = next((i for i, item in enumerate(sides[side]) if item["name"] == name), None)
            item = None if index is None else sides[side][index]
            # the baseline has no distance to itself: a dash, not a missing measurement
            cells.append(figure(f"{side}.quality.{index}", item) if item else DASH)
            values.append(item)
        rows.append(_row(name, cells, _difference(*values), "group" if not rows else ""))
    return rows


def _difference(before: Report | None, after: Report | None) -> str:
    """How far a figure moved; sample by sample where both hold them. No colour where it may not have moved at all."""
    words = text.difference(before, after)
    if before is None or after is None or not words:
        return ""
    note, sure = "", True
    if words != "same" and (span := paired.interval(before, after)) is not None:
        sure = span[0] > 0 or span[1] < 0
        said = text.difference_span(span, after["unit"]) + ("" if sure else ", so it may be none")
        note = f'<span class="sub">on the same samples: 95% {escape(said)}</span>'
    elif words != "same" and before["interval"] and after["interval"]:
        (low, high), (least, most) = before["interval"], after["interval"]
        sure = not (low <= most and least <= high)
        note = "" if sure else '<span class="sub">the intervals overlap, so it may be none</span>'
    kind = _better(before["value"], after["value"], after["direction"]) if sure else ""
    return f'<span class="{kind}">{escape(words)}</span>{note}'


def _precision_rows(report: Report) -> list[str]:
    rows: list[str] = []
    for name, label in text.INT8_SHARES:
        values = [report[side]["precision"][name] for side in _SIDES]
        if any(value is not None for value in values):
            cells = [shown(f"{side}.precision.{name}", value, text.share(value)) for side, value in zip(_SIDES, values)]
            note = '<span class="soft">read back from the file</span>'
            rows.append(_row(label, cells, note, "" if rows else "group"))
    return rows


def steps(report: Report) -> str:
    """Every step: what it did, what it gained, and why it was kept or undone."""
    return "".join(_step(step, report) for step in report["steps"])


def _step(step: Report, report: Report) -> str:
    about = registry.summary("passes", step["name"]) if step["name"] in registry.names("passes") else ""
    options = text.plain(step["options"])
    took = f'<span class="soft">{text.seconds(step["seconds"])}</span>' if step["seconds"] is not None else ""
    head = f"<header><h3>{escape(step['name'])}</h3>{mark(step['status'])}<code>{escape(options)}</code>{took}</header>"
    told = f'<p class="soft">{escape(about)}</p>' if about else ""
    reason = f"<p>{escape(glossary.plainly(step['reason'], report))}</p>" if step["reason"] else ""
    facts = f'<p class="soft">{escape(facts)}</p>' if (facts := text.notes(step["figures"])) else ""
    folds = fold(f"{_layers(step['changed'])} changed", step["changed"])
    folds += fold(f"{_layers(step['skipped'])} left as they were", step["skipped"])
    kind = escape(step["status"].replace(" ", "-"))
    return f'<section class="step {kind}">{head}{told}{reason}{facts}{folds}</section>'


def _layers(named: Report) -> str:
    return "1 layer" if len(named) == 1 else f"{len(named)} layers"


def fold(title: str, named: Report) -> str:
    """A closed list of name and text; nothing when empty."""
    if not named:
        return ""
    rows = (f"<tr><th scope=row>{escape(k)}</th><td>{escape(text.plain(v))}</td></tr>" for k, v in named.items())
    return f"<details><summary>{escape(title)}</summary><table>{''.join(rows)}</table></details>"


def lines(pairs: dict[str, Any]) -> str:
    """Names and values, one below the other; empty values are left out, bytes and clocks have their units."""
    items = [(key, value) for key, value in pairs.items() if value not in ("", None, {}, [])]
    told = [(text.words(key.removesuffix("_bytes")), _with_unit(key, value)) for key, value in items]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in told)
    return f'<dl class="lines">{body}</dl>'


def _with_unit(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return text.size(value)
    return f"{value:,.0f} MHz" if key == "mhz" and isinstance(value, int | float) else text.plain(value)
