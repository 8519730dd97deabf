"""report.html: one page without scripts, nothing from a network; report.json beside it holds every sample."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from edgegen import files
from edgegen.errors import BundleError
from edgegen.report import parts, svg, text
from edgegen.report.schema import Report, normalise

EMBED_BYTES = 3_400_000  # pictures in the page; base64 makes a third more of it, and the page stays under 5 MB
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
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
    title = f"{report['model']} on {report['target']}"
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    stamps = "".join(f'<p class="stamp">{escape(stamp)}</p>' for stamp in report["stamps"])
    pictures = _pictures(report, folder)
    samples = svg.strip([(report[s]["label"], kind, report[s]["latency"]) for s, kind in _KINDS_OF_ROW])
    body = (
        f'<p class="over">{escape(title)} · {escape(report["task"])} · {escape(report["date"])}</p>'
        f"<h1>{escape(report['headline'])}</h1>{stamps}{_asked(report)}"
        + _section("Result", parts.figures_table(report) + _legend(report))
        + _section("Pictures", pictures)
        + _section("Steps", parts.steps(report))
        + _section("Builds tried", parts.candidates(report))
        + _section("Latency samples", samples and samples + _samples_note())
        + _section("Precision obtained", _precision(report))
        + _section("Data", _data(report))
        + _section("Where it comes from", parts.lines(report["provenance"]))
        + _section("Machine and versions", parts.lines(report["machine"] | report["versions"]))
        + _section("Do it again", _again(report))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - edgegen</title><style>\n{style}</style></head>\n<body><main>{body}"
        "<footer>Written by edgegen. report.json beside this page holds every sample.</footer></main></body></html>\n"
    )


_KINDS_OF_ROW = (("baseline", "base"), ("result", "result"))


def _section(title: str, content: str) -> str:
    return f"\n<section><h2>{title}</h2>{content}</section>" if content else ""


def _asked(report: dict[str, Any]) -> str:
    budget = ", ".join(f"{text.words(k)} {text.plain(v)}" for k, v in report["budget"].items() if v is not None)
    asked = f"<pre>{escape(report['command'])}</pre>"
    return asked + f'<p class="soft">Limits: {escape(budget or "none given")}. Seed {report["seed"]}.</p>'


def _legend(report: dict[str, Any]) -> str:
    conditions = report["result"]["latency"]["conditions"]
    how = f"Latency: {escape(text.plain(conditions))}. " if conditions else ""
    return (
        f'<p class="soft">{how}{parts.mark("measured")} on the built file, with its 95% interval. '
        f"{parts.mark('estimated')} calculated, with its error band. {parts.mark('not measured')} with the reason. "
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
        shown.append(f'<figure><div class="scroll" tabindex="0">{picture}</div>{caption}</figure>')
    return "".join(shown)


def _picture_file(folder: Path, name: str) -> Path:
    file = folder / name
    if file.suffix.lower() not in _KINDS:
        raise BundleError(f"report image {name!r} is not a picture; allowed: {', '.join(_KINDS)}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"report image {name!r} lies outside {folder}; put it into that folder")
    if not file.is_file():
        raise BundleError(f"report image {name!r} does not exist in {folder}")
    return file


def _samples_note() -> str:
    return (
        '<p class="soft">One dot a run of the network, in alternation between the two builds; the thick line is p50, '
        "the thin ones p90 and p99.</p>"
    )


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
    for name, part in report["data"].items():
        pairs[name] = f"{part['count']:,}" + (f" (SHA-256 {part['sha256']})" if part["sha256"] else "")
    skipped = report["skipped_files"]
    return parts.lines(pairs) + parts.fold(f"{len(skipped)} file{'s' * (len(skipped) != 1)} not read", skipped)


def _again(report: dict[str, Any]) -> str:
    took = f"<p>The run took {text.seconds(report['duration_s'])}.</p>" if report["duration_s"] is not None else ""
    return f"<pre>{escape(report['reproduce'])}</pre>{took}" if report["reproduce"] else took
