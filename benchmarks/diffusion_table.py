"""The table of benchmarks/diffusion.py: `python benchmarks/diffusion_table.py results/diffusion-MODEL.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files


def write(file: Path) -> None:
    """Write the table beside the figures."""
    files.write_text(file.with_suffix(".md"), table(json.loads(file.read_text(encoding="utf-8"))))


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
        lines += ["", f"The window is the 95% interval of {own!r}, {low:.1f} to {high:.1f}; faster is against that."]
    heads = ("network", "build", "sampler", "steps", "runs (partial)", "KID x 1000", "window", "PSNR", "ms an image",
             "faster")  # fmt: skip
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    first = spent_on(own, points[own], times) if own else None
    for key, point in points.items():
        name, build, sampler, steps, cache = key.split(" | ")
        runs = f"{point['nfe']}" + (f" ({point['partial']})" if point["partial"] else "")
        low, high = (1000 * end for end in point["kid_interval"])
        spent = spent_on(key, point, times)
        faster = f"{np.median(first / spent):.2f}" if spent is not None and first is not None else ""
        lines.append(
            f"| {name} | {build} | {sampler}{'' if cache == 'cache 1' else f', {cache}'} | {steps} | {runs} | "
            f"{1000 * point['kid']:.1f} ({low:.1f} to {high:.1f}) | {place(point, points[own]) if own else ''} | "
            f"{point['psnr_to_teacher']:.1f} | {'' if spent is None else f'{np.median(spent):.1f}'} | {faster} |"
        )
    return "\n".join(lines) + "\n"


def window_of(points: dict[str, Any]) -> str:
    """The teacher's point with the most runs of a float build, by DDIM: its published way."""
    own = [key for key in points if key.startswith("teacher | ") and "fp32 | ddim" in key and key.endswith("cache 1")]
    return max(own, key=lambda key: points[key]["nfe"], default="")


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    write(parser.parse_args().file)
