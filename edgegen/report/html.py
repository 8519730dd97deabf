"""report.html: one page without scripts, nothing from a network; report.json beside it holds every sample.

The frame is a Jinja2 template; what goes into it is escaped where it is made (`parts`, `layers`, `svg`).
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from edgegen import files
from edgegen.errors import BundleError
from edgegen.report import advice, builds, glossary, layers, parts, resolutions, svg, svg_plots, text
from edgegen.report.schema import Report, normalise

EMBED_BYTES = 3_400_000  # pictures in the page; base64 makes a third more of it, and the page stays under 5 MB
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_KINDS_OF_ROW = (("baseline", "base"), ("result", "result"))
_CONDITIONS = ("device", "cpu_model", "cores", "threads", "batch", "io", "rounds", "iterations", "method", "tool")
_PARTS = {"train": "to learn from", "select": "to decide on", "test": "to report on", "calibration": "to calibrate on"}
_NO_LIMIT = "no limit"  # as `summary` says it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path, report: Mapping[str, Any] | Report) -> dict[str, Any]:
    """Write report.json and report.html of the same content into `folder`; returns what report.json holds.

    Raises:
        ValueError: the report does not follow `schema.Report`.
        BundleError: an image is not a picture file below `folder`.
    """
    checked = normalise(report)
    files.write_json(folder / "report.json", checked)
    write_html(folder / "report.html", checked)
    return checked


def write_html(out: Path, report: Mapping[str, Any] | Report) -> None:
    """Write the page; `report` is (or becomes) a `schema.Report`, images are relative to the page's folder."""
    checked = normalise(report)
    files.write_text(out, page(checked, out.parent))


def page(report: dict[str, Any], folder: Path) -> str:
    """The whole page as text; `report` as `schema.normalise` returns it."""
    here = Path(__file__).parent
    template = _environment().from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    sections = (
        ("Result", "result", parts.figures_table(report) + _legend(report) + _next(report) + glossary.section(report)),
        ("Input sizes", "resolutions", resolutions.section(report)),
        ("Pictures", "pictures", _pictures(report, folder)),
        ("Steps", "steps", parts.steps(report)),
        ("Builds tried", "builds", builds.section(report)),
        ("Latency samples", "samples", _samples(report)),
        ("Layers of the result", "layers", layers.section(report)),
        ("Precision obtained", "precision", _precision(report)),
        ("Accelerator", "accelerator", _accelerator(report)),
        ("Calibration", "calibration", _calibration(report)),
        ("Data", "data", _data(report)),
        ("Where it comes from", "provenance", parts.lines(report["provenance"])),
        ("Machine and versions", "machine", parts.lines(report["machine"] | report["versions"])),
        ("Do it again", "again", _again(report)),
    )
    return template.render(
        report=report,
        policy=Markup(_POLICY),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=f"{report['model']} on {report['target']}",
        asked=_asked(report),
        where=Markup(_where(report)),
        date=report["date"].removesuffix("+00:00").replace("T", " ") + " UTC" * report["date"].endswith("+00:00"),
        parts=[{"title": title, "id": name, "content": Markup(content)} for title, name, content in sections],
    )


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _where(report: dict[str, Any]) -> str:
    """On which device the latency was measured, or that it was not."""
    latency, told = report["result"]["latency"], report["result"]["latency"]["conditions"]
    if latency["status"] != "measured":
        why = latency["reason"] or "this device was not here"
        return f"{parts.mark(latency['status'])} latency on {escape(report['target'])}: {escape(why)}."
    here = report["machine"].get("cpu_model", "this machine")
    device = told.get("device", "local") if told.get("device", "local") != "local" else told.get("cpu_model") or here
    threads = f", {text.plain(told['threads'])} thread{'s' * (told['threads'] != 1)}" if told.get("threads") else ""
    batch = f", batch {text.plain(told.get('batch', 1))}"
    beside = "" if report["result"]["ratio"] is None else ", in turns with the baseline"
    return f"{parts.mark('measured')} on {escape(text.plain(device))}{threads}{batch}{beside}."


def _asked(report: dict[str, Any]) -> str:
    """The limits in words, those that were not given last."""
    given = {key: value for key, value in report["budget"].items() if value not in (None, _NO_LIMIT)}
    limits = ", ".join(f"{text.words(key)} at most {text.plain(value)}" for key, value in given.items())
    free = " or ".join(text.words(key) for key, value in report["budget"].items() if value == _NO_LIMIT)
    parts = [limits, f"no limit of {free}" if free else "", f"seed {report['seed']}"]
    return "; ".join(part for part in parts if part) + "."


def _next(report: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in advice.next_steps(report))
    return f'<div class="next"><h3>What to do next</h3><ul>{items}</ul></div>' if items else ""


def _samples(report: dict[str, Any]) -> str:
    sides = _KINDS_OF_ROW if report["baseline"]["label"] != report["result"]["label"] else _KINDS_OF_ROW[1:]
    drawn = svg.strip([(report[side]["label"], kind, report[side]["latency"]) for side, kind in sides])
    return drawn and drawn + _samples_note(len(sides))


def _calibration(report: dict[str, Any]) -> str:
    """The curve where there is one; else on how many samples it was calibrated, where that is known."""
    missing = f"{parts.mark('not measured')} {escape(why)}." if (why := report["calibration_reason"]) else ""
    if drawn := svg_plots.curve(report["calibration_curve"]):
        said = f"{parts.mark('measured')} the same build calibrated on more and more samples, judged on the same data."
        return f'<p class="soft">{said} {missing}</p>{drawn}'
    part = report["data"].get("calibration")
    if part is None:
        return ""
    absent = missing or f"{parts.mark('not measured')} how quality changes with their number."
    return f"<p>{part['count']:,} samples were there to calibrate on. {absent}</p>"


def _legend(report: dict[str, Any]) -> str:
    told = report["result"]["latency"]["conditions"]
    conditions = {key: told[key] for key in _CONDITIONS if told.get(key) not in (None, "")}
    how = f"Latency: {escape(text.plain(conditions))}. " if conditions else ""
    return (
        f'<p class="soft">{how}{parts.mark("measured")} on the built file, with its 95% interval. '
        f"{parts.mark('calculated')} from other figures here. "
        f"{parts.mark('estimated')} from a model of the device, with its error band. "
        f"{parts.mark('not measured')} with the reason. "
        "The baseline is the best unquantized build of the same network on this target.</p>"
    )


def _pictures(report: dict[str, Any], folder: Path) -> str:
    room, shown = EMBED_BYTES, []
    for image in report["images"]:
        file = _picture_file(folder, image["file"])
        size = file.stat().st_size
        caption = f"<figcaption>{escape(image['caption'])}</figcaption>"
        if size > room:
            caption = f'<p class="soft">Not in this page (too large): {escape(image["file"])}</p>' + caption
            shown.append(f"<figure>{caption}</figure>")
            continue
        room -= size
        content = base64.b64encode(file.read_bytes()).decode()
        source = f"data:{_KINDS[file.suffix.lower()]};base64,{content}"
        picture = f'<img class="wide" alt="{escape(image["caption"])}" src="{source}">'
        label = escape(f"enlarge: {image['caption']}")
        zoom = f'<label class="zoom"><input type="checkbox" aria-label="{label}"><span>enlarge</span>{picture}</label>'
        shown.append(f'<figure><div class="scroll" tabindex="0">{zoom}</div>{caption}</figure>')
    told = (
        '<p class="soft">The teacher is the network as it was given, the student is the result; the reference is the '
        "true image. Differences are those between teacher and student, amplified for the eye.</p>"
    )
    return told + "".join(shown) if shown else ""


def _picture_file(folder: Path, name: str) -> Path:
    file = folder / name
    if file.suffix.lower() not in _KINDS:
        raise BundleError(f"report image {name!r} is not a picture; allowed: {', '.join(_KINDS)}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"report image {name!r} lies outside {folder}; put it into that folder")
    if not file.is_file():
        raise BundleError(f"report image {name!r} does not exist in {folder}")
    return file


def _samples_note(sides: int) -> str:
    turns = ", in turns between the two builds" if sides == 2 else ""
    return (
        f'<p class="soft">A dot is a run of the network{turns}; the further left, the less time. The thick line is '
        f"p50, the thin ones p90 and p99. Of more than {svg.DOTS} runs, {svg.DOTS} are drawn, evenly spread over their "
        "order; all are in report.json.</p>"
    )


def _accelerator(report: dict[str, Any]) -> str:
    """What the deep learning accelerator of a Jetson takes, where the target has one."""
    dla = report["dla"]
    if dla is None:
        return ""
    cores = "1 DLA core" if dla["cores"] == 1 else f"{dla['cores']} DLA cores"
    eligible = parts.shown("dla.eligible", dla["eligible"], text.count(dla["eligible"]))
    layers = parts.shown("dla.layers", dla["layers"], text.count(dla["layers"]))
    whole = f" As it is, the file does not go there: {escape(dla['whole'])}." if dla["whole"] else ""
    said = f"{parts.mark('predicted')} {cores}: {eligible} of {layers} layers fit their rules.{whole}"
    return f"<p>{said}</p>" + parts.fold("each layer that does not, and its nearest cure", dla["problems"])


def _precision(report: dict[str, Any]) -> str:
    precision = report["result"]["precision"]
    if not precision["layers"]:
        return ""
    counts = ", ".join(f"{n} {escape(name)}" for name, n in Counter(precision["layers"].values()).most_common())
    asked = f"Asked for {escape(precision['plan'])}; " if precision["plan"] else ""
    return f"<p>{asked}the built file has {counts}.</p>" + parts.fold("each layer", precision["layers"])


def _data(report: dict[str, Any]) -> str:
    if not report["data"] and not report["data_source"]:
        return ""
    pairs = {"source": report["data_source"]}
    for name in sorted(report["data"], key=lambda name: [*_PARTS, name].index(name)):
        part = report["data"][name]
        digest = f" (SHA-256 {part['sha256']})" if part["sha256"] else ""
        pairs[_PARTS.get(name, name)] = f"{part['count']:,}{digest}"
    skipped = report["skipped_files"]
    return parts.lines(pairs) + parts.fold(f"{len(skipped)} file{'s' * (len(skipped) != 1)} not read", skipped)


def _again(report: dict[str, Any]) -> str:
    took = f"<p>The run took {text.seconds(report['duration_s'])}.</p>" if report["duration_s"] is not None else ""
    took = _cost(report) or took
    return f"<pre>{escape(report['reproduce'])}</pre>{took}" if report["reproduce"] else took


def _cost(report: dict[str, Any]) -> str:
    """What the run took beside what its plan says."""
    if report["cost"] is None:
        return ""
    forms = (("seconds", "time", text.seconds), ("memory_bytes", "memory of the largest process", text.size),
             ("disk_bytes", "disk while it ran", text.size))  # fmt: skip
    rows = []
    for key, label, form in forms:
        cells = (form(report["cost"][side][key]) for side in ("predicted", "used"))
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    heads = f'<td></td><th scope="col">{parts.mark("predicted")}</th><th scope="col">{parts.mark("measured")}</th>'
    note = '<p class="soft">The run was resumed: the time is that of its last part.</p>'
    told = '<p class="soft">What the run took, beside what <code>--dry-run</code> predicts for it.</p>'
    table = f'<table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'{told}<div class="card">{table}</div>{note if report["cost"]["resumed"] else ""}'
