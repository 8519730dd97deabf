"""Latency against quality over bundles, with intervals and the Pareto front; a long run over time. Drawn by matplotlib.

One page (HTML) with the pictures inside, in a light and a dark form, and the same picture as PNG and SVG files. In the
page a dot says what it is when the pointer is on it.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from edgegen import files
from edgegen.errors import MissingExtra
from edgegen.report import text

_NAMES = ("paper", "ink", "soft", "line", "dot", "off")
_INKS = {
    False: dict(zip(_NAMES, ("#ffffff", "#1b1f24", "#5b636d", "#dfe1dd", "#0a6f69", "#7a828c"))),
    True: dict(zip(_NAMES, ("#14171a", "#e8eaec", "#a2abb5", "#343a41", "#4fc7bd", "#8d96a1"))),
}
_LOG_FROM = 10.0
"""A range of latencies of more than this factor is drawn on a logarithmic axis."""
_MANY = 20
"""With more points than this the numbers of those off the front are small."""
_LABEL = 44
"""Characters of an axis label in one line."""
_DOT = "edgegen-dot-"
Drawer = Callable[[str, bool], bytes]  # (svg or png, dark) -> the picture


@dataclass(frozen=True)
class Point:
    """One artifact. latency, quality: (value, low, high), the ends equal to the value where there is no interval, or
    None: not known, `reason` says why. facts: what tells it from the others, such as precision and batch. data: on
    what its quality was judged; only points of the same data are compared."""

    label: str
    latency: tuple[float, float, float] | None
    quality: tuple[float, float, float] | None
    facts: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    data: str = ""


@dataclass(frozen=True)
class Moment:
    """A part of a long run: seconds since its start, p50 and p99 of its samples in ms, clock (MHz), temperature."""

    seconds: float
    p50: float
    p99: float
    mhz: float | None = None
    celsius: float | None = None


def front(points: Sequence[Point], direction: str) -> list[int]:
    """Positions of the points that no other one of the same data beats in latency and quality, from fast to slow.

    direction: "higher" or "lower" quality is better. Points without one of the two figures are not on it.
    """
    return [index for one in fronts(points, direction) for index in one]


def fronts(points: Sequence[Point], direction: str) -> list[list[int]]:
    """The front of each data that points were judged on."""
    return [_front(points, direction, data) for data in dict.fromkeys(p.data for p in points)]


def _front(points: Sequence[Point], direction: str, data: str) -> list[int]:
    sign = 1.0 if direction == "higher" else -1.0
    known = [
        (p.latency[0], -sign * p.quality[0], i)
        for i, p in enumerate(points) if p.latency and p.quality and p.data == data
    ]  # fmt: skip
    best, found = math.inf, []
    for _, loss, index in sorted(known):
        if loss < best:
            best = loss
            found.append(index)
    return found


def draw(points: Sequence[Point], quality: str, direction: str, *, kind: str = "svg", dark: bool = False) -> bytes:
    """The picture: a numbered dot for each point, its intervals, and the front as a line.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    inks, best = _INKS[dark], front(points, direction)
    figure, axes = _figure(inks)
    for one in fronts(points, direction):
        places = [(p.latency[0], p.quality[0]) for p in (points[i] for i in one) if p.latency and p.quality]
        axes.step(*zip(*places), where="post", color=inks["dot"], linestyle="--", zorder=1) if len(places) > 1 else None
    for index, point in enumerate(points):
        if point.latency is None or point.quality is None:
            continue
        ink = inks["dot"] if index in best else inks["off"]
        (x, *xs), (y, *ys) = point.latency, point.quality
        errors = [[[x - xs[0]], [xs[1] - x]], [[y - ys[0]], [ys[1] - y]]]
        drawn = axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=ink, markersize=6, elinewidth=1,
                              zorder=2)  # fmt: skip
        drawn[0].set_gid(f"{_DOT}{index}")
        size, told = (10, "ink") if len(points) <= _MANY or index in best else (7, "soft")
        axes.annotate(str(index + 1), (x, y), xytext=(6, 6), textcoords="offset points", color=inks[told], size=size)
    values = [p.latency[0] for p in points if p.latency and p.quality]
    if values and max(values) > _LOG_FROM * min(values):
        _logarithmic(axes.set_xscale, axes.xaxis)
    axes.set_xlabel("latency p50 (ms), less is better")
    label = f"{quality}, {'more' if direction == 'higher' else 'less'} is better"
    axes.set_ylabel(textwrap.fill(label, _LABEL))
    return _saved(figure, kind, "dark" if dark else "light")


def _logarithmic(scale: Any, axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_run(moments: Sequence[Moment], *, kind: str = "svg", dark: bool = False) -> bytes:
    """Latency, clock and temperature over the seconds of a long run; what the device does not tell is left out."""
    inks = _INKS[dark]
    rows: list[tuple[str, list[tuple[float, float]]]] = [
        ("clock (MHz)", [(m.seconds, m.mhz) for m in moments if m.mhz is not None]),
        ("temperature (°C)", [(m.seconds, m.celsius) for m in moments if m.celsius is not None]),
    ]
    known = [(label, values) for label, values in rows if values]
    figure, axes = _figure(inks, rows=1 + len(known))
    every = list(axes) if known else [axes]
    every[0].plot([m.seconds for m in moments], [m.p50 for m in moments], color=inks["dot"], label="p50")
    every[0].plot([m.seconds for m in moments], [m.p99 for m in moments], color=inks["off"], linewidth=0.8, label="p99")
    every[0].set_ylabel("latency (ms)")
    every[0].set_ylim(bottom=0)
    every[0].legend(frameon=False, labelcolor=inks["ink"])
    for axis, (label, values) in zip(every[1:], known):
        axis.plot(*zip(*values), color=inks["dot"])
        axis.set_ylabel(label)
    every[-1].set_xlabel("seconds")
    return _saved(figure, kind, "dark" if dark else "light")


def _figure(inks: dict[str, str], rows: int = 1) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "to draw the trade-off", "report") from error
    figure = Figure(figsize=(8, 3.2 + 1.6 * rows), layout="constrained", facecolor=inks["paper"])
    axes = figure.subplots(rows, sharex=True)
    for axis in axes if rows > 1 else [axes]:
        axis.set_facecolor(inks["paper"])
        axis.grid(color=inks["line"], linewidth=0.6)
        axis.tick_params(colors=inks["soft"])
        axis.xaxis.label.set_color(inks["ink"])
        axis.yaxis.label.set_color(inks["ink"])
        for spine in axis.spines.values():
            spine.set_color(inks["line"])
    return figure, axes


def _saved(figure: Any, kind: str, salt: str) -> bytes:
    buffer = io.BytesIO()
    # no date and no random ids: the same figures give the same file; both forms lie in one page, with ids of their own
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": f"edgegen {salt}"}):
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def write(
    out: Path,
    title: str,
    points: Sequence[Point],
    quality: str,
    direction: str,
    *,
    notes: Sequence[str] = (),
    run: Sequence[Moment] = (),
    command: str = "profile",
    what: str = "build",
) -> list[Path]:
    """Write `out` (.html) and the pictures beside it as .svg and .png; the paths written.

    command: that the page is of. what: a point is, as the head of its column.

    Without a point that has both figures there is no picture of the trade-off, and the page says so.
    """
    drawers: dict[str, Drawer] = {}
    if any(p.latency and p.quality for p in points):
        drawers["tradeoff"] = lambda kind, dark: draw(points, quality, direction, kind=kind, dark=dark)
    if run:
        drawers["run"] = lambda kind, dark: draw_run(run, kind=kind, dark=dark)
    made = [file for name, drawer in drawers.items() for file in _beside(out, name, drawer)]
    pictures = [
        (name, *(_hovered(drawer("svg", dark), points, quality) for dark in (False, True)))
        for name, drawer in drawers.items()
    ]
    best = front(points, direction)
    rows = [
        {"number": i + 1, "point": p, "best": i in best, "latency": _told(p.latency, "ms"), "quality": _told(p.quality)}
        for i, p in enumerate(points)
    ]
    here = Path(__file__).parent
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        (here / "tradeoff.html.j2").read_text(encoding="utf-8")
    )
    style = Markup((here / "page.css").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(key for p in points for key in p.facts))
    alike = [key for key in names if len(points) > 1 and len({p.facts.get(key) for p in points}) == 1]
    shared = {key: points[0].facts[key] for key in alike}
    names = [name for name in names if name not in shared]
    notes = [f"All of them: {text.plain(shared)}.", *notes] if shared else notes
    files.write_text(out, template.render(
        title=title, command=command, what=what, style=style, pictures=pictures, rows=rows, quality=quality,
        names=names, notes=notes, captions=_captions(points, quality),
    ))  # fmt: skip
    return [out, *made]


def _captions(points: Sequence[Point], quality: str) -> dict[str, str]:
    drawn = [figure for p in points if p.latency and p.quality for figure in (p.latency, p.quality)]
    bars = "Bars: 95% intervals. " if any(low != high for _, low, high in drawn) else ""
    return {
        "tradeoff": f"Latency against {quality}; the numbers are those of the table. {bars}Coloured: nothing here is "
        "better in both; a dashed line joins these (the Pareto front). A dot under the pointer says what it is.",
        "run": "One network, run again and again: what latency, clock and temperature did.",
    }


def _beside(out: Path, name: str, drawer: Drawer) -> list[Path]:
    """The picture as files beside the page."""
    made = [out.with_name(f"{out.stem}-{name}.{kind}") for kind in ("svg", "png")]
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in made:
        with files.whole(file) as temporary:
            temporary.write_bytes(drawer(file.suffix[1:], False))
    return made


def _hovered(svg: bytes, points: Sequence[Point], quality: str) -> Markup:
    """The picture to be put into a page, with a title for each dot."""
    picture = svg.decode("utf-8")
    picture = picture[picture.index("<svg") :]

    def titled(found: re.Match[str]) -> str:
        point = points[int(found.group(1))]
        told = [point.label, f"{_told(point.latency, 'ms')}, {quality} {_told(point.quality)}",
                *(f"{name}: {value}" for name, value in point.facts.items())]  # fmt: skip
        return f'<g class="hover"><title>{escape(chr(10).join(told))}</title>'

    return Markup(re.sub(rf'<g id="{_DOT}([0-9]+)">', titled, picture))


def _told(figure: tuple[float, float, float] | None, unit: str = "") -> str:
    if figure is None:
        return text.NOT_MEASURED
    value, low, high = (text.number(one, 4) for one in figure)
    between = f" ({low} to {high})" if low != high else ""
    return f"{value}{' ' * bool(unit)}{unit}{between}"
