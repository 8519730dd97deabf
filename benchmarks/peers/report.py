"""What the lines of peers.jsonl say: ratios, verdicts, a Markdown table, a plot. Pure: no machine is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OWN = "edgegen"
RESAMPLES = 2000
GOALS = {"speed": 1.0, "mean": 1.5, "time": 1.2, "memory": 1.1}
Row = Mapping[str, Any]


def read(file: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Key -> newest line. A last line that was cut off is left out; any other damaged line is an error.

    Raises:
        ValueError: a damaged line in the middle; says which.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file.name}, line {number}: {error}") from error
        found[key(row)] = row
    return found


def key(row: Row) -> tuple[str, ...]:
    """What a line is about."""
    return (row["case"], row["peer"], row["setting"]) if row["kind"] == "cell" else (row["case"],)


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """How many times `below` `above` takes: the median of the ratios paired by round, 95 % bootstrap over rounds.

    Raises:
        ValueError: not the same number of rounds, or none.
    """
    if len(above) != len(below) or not len(above):
        raise ValueError(f"both sides need the same rounds, got {len(above)} and {len(below)}")
    drawn = _medians(np.divide(above, below), seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(np.median(np.divide(above, below))), "interval": (float(low), float(high))}


def _medians(pairs: np.ndarray, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    return np.median(pairs[rows], axis=1)


def geometric_mean(pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any] | None:
    """Of the cases' ratios, each of (above, below) rounds; the interval resamples the rounds of every case."""
    paired = [np.divide(above, below) for above, below in pairs]
    if not paired:
        return None
    value = math.exp(np.mean([math.log(np.median(p)) for p in paired]))
    drawn = np.exp(np.mean([np.log(_medians(p, seed)) for seed, p in enumerate(paired)], axis=0))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "interval": (float(low), float(high)), "n": len(paired)}


def as_good(lane: Row, own: str, higher: bool) -> bool:
    """Whether a lane's quality is not shown to be worse than that of edgegen's lane `own`: paired, 95 %."""
    told = lane.get("differences", {}).get(own)
    if told is None or not all(math.isfinite(bound) for bound in told["interval"]):
        return False
    low, high = told["interval"]
    return high >= 0 if higher else low <= 0


def verdict(timing: Row, setting: str) -> dict[str, Any] | None:
    """edgegen's lane of a setting against the fastest other lane of equal or better quality; None: no such lane.

    "ratio": how many times faster edgegen is.
    """
    lanes = timing["lanes"]
    own = next((n for n, lane in lanes.items() if n.startswith(f"{OWN} {setting} @") and "p50_ms" in lane), None)
    if own is None:
        return None
    rivals = {n: lane for n, lane in lanes.items()
              if not n.startswith(OWN + " ") and "p50_ms" in lane and as_good(lane, own, timing["higher"])}  # fmt: skip
    if not rivals:
        return {"own": own, "rival": None}
    rival = min(rivals, key=lambda name: rivals[name]["p50_ms"])
    rounds = (lanes[rival]["round_medians"], lanes[own]["round_medians"])
    return {"own": own, "rival": rival, "rivals": sorted(rivals), "rounds": rounds, "ratio": ratio(*rounds)}


def chosen(timing: Row, setting: str) -> dict[str, Any] | None:
    """The verdict of a setting; where a case has no "best", its default stands for it."""
    return verdict(timing, setting) or (verdict(timing, "default") if setting == "best" else None)


def least(cells: Iterable[Row], names: Iterable[str], figure: str) -> float | None:
    """The least figure of the cells that lie behind these lanes; None: no such cell."""
    behind = {name.split(" @ ")[0] for name in names}
    found = [c[figure] for c in cells if f"{c['peer']} {c['setting']}" in behind and figure in c]
    return min(found, default=None)


def checks(rows: Mapping[tuple[str, ...], Row], setting: str) -> list[tuple[str, str, bool | None]]:
    """(case or "all", what is shown, whether the goal is met; None: it cannot be told)."""
    cells = [row for row in rows.values() if row["kind"] == "cell"]
    found: list[tuple[str, str, bool | None]] = []
    pairs = []
    for timing in (row for row in rows.values() if row["kind"] == "timing"):
        case, told = timing["case"], chosen(timing, setting)
        if told is None or told["rival"] is None:
            found.append((case, "edgegen has no lane" if told is None else "no other lane of equal quality", None))
            continue
        pairs.append(told["rounds"])
        value = told["ratio"]["value"]
        text = f"{interval(told['ratio'], 'x')} as fast as {told['rival']}"
        found.append((case, text, value >= GOALS["speed"]))
        mine = [c for c in cells if c["case"] == case]
        for name, figure in (("time", "seconds"), ("memory", "peak_mb")):
            ours, theirs = least(mine, [told["own"]], figure), least(mine, told["rivals"], figure)
            if ours is not None and theirs:
                times = ours / theirs
                text = f"{times:.2f}x the {name} of the least ({ours:g} and {theirs:g}, at most {GOALS[name]}x)"
                found.append((case, text, times <= GOALS[name]))
    mean = geometric_mean(pairs)
    if mean:
        text = f"geometric mean {interval(mean, 'x')} over {mean['n']} cases (goal {GOALS['mean']}x)"
        found.append(("all", text, mean["value"] >= GOALS["mean"]))
    return found


def interval(figure: Row, unit: str = "", digits: int = 2) -> str:
    """`1.50x (1.40 to 1.60)`."""
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


HEAD = ("| tool | runtime | p50 ms | edgegen is faster by | {figure} | MB | s | peak MB | lines | ended |",
        "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def case_table(case: str, rows: Mapping[tuple[str, ...], Row]) -> str:
    """Every cell of a case, fastest lane first; what failed stays in the table."""
    timing = rows.get((case,), {"lanes": {}, "figure": "quality", "higher": True})
    cells = {f"{r['peer']} {r['setting']}": r for r in rows.values() if r["kind"] == "cell" and r["case"] == case}
    lanes: Mapping[str, Row] = timing["lanes"]
    own = chosen(timing, "best")
    base = lanes[own["own"]]["round_medians"] if own else None
    lines = [f"### {case}", "", HEAD[0].format(figure=timing["figure"]), HEAD[1]]
    for label in sorted(lanes, key=lambda name: lanes[name].get("p50_ms", math.inf)):
        name, runtime = label.split(" @ ")
        lines.append(_lane_line(name, runtime, lanes[label], cells.get(name), base))
    shown = {label.split(" @ ")[0] for label in lanes}
    for name, cell in cells.items():
        if name not in shown:
            ended = cell["exit"] + (f": {cell['failure']}" if cell.get("failure") else "")
            lines.append(f"| {name} | | | | | {_mb(cell)} | {_plain(cell, 'seconds')} | {_plain(cell, 'peak_mb')} | "
                         f"{cell['lines']} | {ended} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _lane_line(name: str, runtime: str, lane: Row, cell: Row | None, base: Sequence[float] | None) -> str:
    timed = "p50_ms" in lane
    p50 = interval({"value": lane["p50_ms"], "interval": lane["interval_ms"]}, digits=3) if timed else ""
    faster = interval(ratio(lane["round_medians"], base), "x") if timed and base else ""
    quality = interval(lane["quality"], digits=3) if "quality" in lane else ""
    ended = f"fails to run: {lane['failure']}" if "failure" in lane else "ok"
    end = cell or {}
    parts = (name, runtime, p50, faster, quality, _mb(end), _plain(end, "seconds"), _plain(end, "peak_mb"),
             _plain(end, "lines"), ended)  # fmt: skip
    return "| " + " | ".join(parts) + " |"


def _mb(cell: Row) -> str:
    return f"{cell['size_bytes'] / 1e6:.2f}" if "size_bytes" in cell else ""


def _plain(cell: Row, name: str) -> str:
    return f"{cell[name]:g}" if name in cell else ""


def markdown(rows: Mapping[tuple[str, ...], Row], machine: Mapping[str, Any], notes: str = "") -> str:
    """The whole page; notes: what was learnt of the figures, written by hand."""
    cases = list(dict.fromkeys(row["case"] for row in rows.values()))
    lines = ["# edgegen and its peers", "",
             "Made by `make bench-peers`; a case that edgegen loses stays. All lanes of a case were timed in one "
             "interleaved run; quality is on images that no tool saw.", "",
             "Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()), ""]  # fmt: skip
    for setting in ("default", "best"):
        lines += [f"## Goals, edgegen's {setting} setting", "", "| case | shown | met |", "|---|---|---|"]
        words = {True: "yes", False: "**no**", None: "cannot be told"}
        lines += [f"| {case} | {text} | {words[met]} |" for case, text, met in checks(rows, setting)] + [""]
    lines += [notes] if notes else []
    versions: dict[str, set[str]] = {}
    for row in rows.values():
        for name, version in row.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    lines += ["## Cases", "", *(case_table(case, rows) for case in cases), "## Versions", ""]
    lines += [", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())), ""]
    return "\n".join(lines)


def plot(rows: Mapping[tuple[str, ...], Row], out: Path) -> None:
    """Latency against quality, a panel a case; matplotlib (the extra `report`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    timings = [row for row in rows.values() if row["kind"] == "timing"]
    if not timings:
        return
    columns = min(3, len(timings))
    height = 4 * -(-len(timings) // columns)  # inches
    figure, axes = pyplot.subplots(height // 4, columns, squeeze=False, figsize=(5 * columns, height))
    for axis in axes.flat[len(timings) :]:
        axis.set_visible(False)
    peers = sorted({label.split(" ")[0] for timing in timings for label, lane in timing["lanes"].items()
                    if "p50_ms" in lane and "quality" in lane})  # fmt: skip
    colours = {peer: pyplot.get_cmap("tab20")(index % 20) for index, peer in enumerate(peers)}
    for axis, timing in zip(axes.flat, timings):
        for label, lane in timing["lanes"].items():
            if "p50_ms" in lane and "quality" in lane:
                peer = label.split(" ")[0]
                axis.scatter(lane["p50_ms"], lane["quality"]["value"], color=colours[peer],
                             marker="*" if peer == OWN else "o", s=120 if peer == OWN else 30,
                             zorder=3 if peer == OWN else 2)  # fmt: skip
        axis.set(title=timing["case"], xlabel="p50 latency, ms", ylabel=timing["figure"], xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    dots = [pyplot.Line2D([], [], color=colours[p], marker="*" if p == OWN else "o", ls="", label=p) for p in peers]
    figure.legend(handles=dots, loc="lower center", ncols=4, fontsize=8)
    legend = 0.3 + 0.2 * -(-len(peers) // 4)  # inches
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.savefig(out)
    pyplot.close(figure)
