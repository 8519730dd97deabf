"""The table and the picture of benchmarks/diffusion.py: `python benchmarks/diffusion_table.py
results/diffusion-MODEL.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files


def write(file: Path) -> None:
    """Write the table and the picture beside the figures."""
    found = json.loads(file.read_text(encoding="utf-8"))
    files.write_text(file.with_suffix(".md"), table(found))
    plot(found, file.with_suffix(".svg"))


def table(found: dict[str, Any]) -> str:
    """Every point with its time an image, and how many times faster than the teacher at its own settings."""
    settings, points, times = found["settings"], found["points"], found.get("times", {})
    own = window_of(points)
    lines = [f"# Runs of the network, quality and time: {settings['model']}", "",
             f"`python benchmarks/diffusion.py`: KID x 1000 to real images, lower is better, N = {settings['count']}, "
             "95% interval; PSNR to the teacher's images of the same latents; milliseconds of one image with "
             f"{settings['threads']} threads, of the network's runs alone, all networks timed in turns."]  # fmt: skip
    if own:
        low, high = (1000 * end for end in points[own]["kid_interval"])
        lines += ["", f"The window is the 95% interval of {own!r}, {low:.1f} to {high:.1f}. Faster is against that, "
                  f"and against {fewest(points)!r}: the teacher's fewest runs that are not above the window."]
    heads = ("network", "build", "sampler", "steps", "runs (partial)", "KID x 1000", "window", "PSNR", "ms an image",
             "faster", "than fewest")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rivals = [spent_on(key, points[key], times) for key in (own, fewest(points))] if own else []
    for key, point in sorted(points.items(), key=_order):
        name, build, sampler, steps, cache = key.split(" | ")
        runs = f"{point['nfe']}" + (f" ({point['partial']})" if point["partial"] else "")
        low, high = (1000 * end for end in point["kid_interval"])
        spent = spent_on(key, point, times)
        spent_ms = "" if spent is None else f"{np.median(spent):.1f}"
        faster = ["" if spent is None or rival is None else f"{np.median(rival / spent):.2f}" for rival in rivals]
        lines.append(
            f"| {name} | {build} | {sampler}{'' if cache == 'cache 1' else f', {cache}'} | {steps} | {runs} | "
            f"{1000 * point['kid']:.1f} ({low:.1f} to {high:.1f}) | {place(point, points[own]) if own else ''} | "
            f"{point['psnr_to_teacher']:.1f} | {spent_ms} | {' | '.join(faster)} |"
        )
    return "\n".join(lines) + "\n"


def _order(entry: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
    """The teacher before the student, what belongs to one line together, most steps first."""
    name, build, sampler, steps, cache = entry[0].split(" | ")
    return name == "student", build, sampler, cache, -int(steps)


def window_of(points: dict[str, Any]) -> str:
    """The teacher's point with the most runs of a float build, by DDIM: its published way."""
    own = [key for key in points if key.startswith("teacher | ") and "fp32 | ddim" in key and key.endswith("cache 1")]
    return max(own, key=lambda key: points[key]["nfe"], default="")


def fewest(points: dict[str, Any]) -> str:
    """The teacher's point with the fewest runs, of the window's build and nothing cached, that is not above it."""
    own = window_of(points)
    fit = [key for key in points if key.split(" | ")[:2] == own.split(" | ")[:2] and key.endswith("cache 1")
           and place(points[key], points[own]) != "above"]  # fmt: skip
    return min(fit, key=lambda key: points[key]["nfe"], default="")


def place(point: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Inside, above (worse) or below (too near to the real images: suspicious) the teacher's window."""
    mine, (low, high) = point["kid"], teacher["kid_interval"]
    return "above" if mine > high else "below" if mine < low else "inside"


def spent_on(key: str, point: dict[str, Any], times: dict[str, Any]) -> np.ndarray | None:
    """Milliseconds of an image, one for each round; None where the networks were not timed."""
    name, build, _, _, cache = key.split(" | ")
    kind = "whole" if cache == "cache 1" else "cached"
    parts = [(point["nfe"] - point["partial"], "full"), (point["partial"], "partial")]
    places = [(calls, times.get(f"{name} | {build} | {kind} {part}")) for calls, part in parts if calls]
    if any(one is None for _, one in places):
        return None
    return sum(calls * np.array(one["round_medians"]) for calls, one in places)


def plot(found: dict[str, Any], out: Path) -> None:
    """Runs of the network against KID, a line for each network, build, sampler and caching; the window as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines: dict[str, list[dict[str, Any]]] = {}
    for key, point in found["points"].items():
        name, build, sampler, _, cache = key.split(" | ")
        lines.setdefault(f"{name}, {build}, {sampler}{'' if cache == 'cache 1' else f', {cache}'}", []).append(point)
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for label, points in lines.items():
        points.sort(key=lambda point: point["nfe"])
        axis.errorbar([point["nfe"] - point["partial"] / 2 for point in points], [1000 * p["kid"] for p in points],
                      [[1000 * abs(p["kid"] - p["kid_interval"][end]) for p in points] for end in (0, 1)],
                      marker="*" if label.startswith("student") else "o", ms=10 if label.startswith("student") else 5,
                      ls="--" if "int8" in label else "-", capsize=2, label=label)  # fmt: skip
    if own := window_of(found["points"]):
        axis.axhspan(*(1000 * end for end in found["points"][own]["kid_interval"]), alpha=0.15, label="the window")
    axis.set(xlabel="runs of the network (a partial one counted half)", ylabel="KID x 1000 to real images",
             xscale="log", yscale="log", title=f"{found['settings']['model']}, N = {found['settings']['count']}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(ticker.FormatStrFormatter("%g"))
        side.set_minor_formatter(ticker.NullFormatter())
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    write(parser.parse_args().file)
