"""Plots of the layers and of a calibration, as inline SVG: efficiency gap, waterline, curve.

On the Efficiency of Convolutional Neural Networks (Lavin, 2024, arXiv:2404.03617): a layer is a box as wide as its MACs
and as high as the share of the peak that it reached, so what is empty above the boxes is time that was lost; layers
whose MACs a byte lie below the device's own (the waterline) wait for memory, however good the kernel.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from edgegen.report import text

Layer = dict[str, Any]
WIDTH, LEFT, RIGHT, TOP, HEIGHT, FOOT = 880, 58, 14, 22, 190, 24


def rate(layer: Layer) -> float | None:
    """MACs a second that a layer reached; None where its time or its work is not known."""
    return layer["macs"] / (layer["ms"] / 1e3) if layer["ms"] and layer["macs"] else None


def intensity(layer: Layer) -> float | None:
    """MACs for each byte read or written; None where either is not known."""
    return layer["macs"] / layer["bytes"] if layer["macs"] and layer["bytes"] else None


def reached(layers: list[Layer], roof: dict[str, Any]) -> tuple[list[float | None], str]:
    """Share of the peak that each layer reached, and what the peak is.

    The peak is the target's own where it states one for the precision obtained, else the fastest layer here.
    """
    rates = [rate(layer) for layer in layers]
    stated = [roof["peak_macs_per_s"].get(layer["obtained"].rpartition(" ")[2]) for layer in layers]
    known = [peak for peak, value in zip(stated, rates, strict=True) if value is not None]
    if known and all(known):
        return [
            value / peak if value and peak else None for value, peak in zip(rates, stated, strict=True)
        ], "of the peak that the device's maker states"
    best = max((value for value in rates if value is not None), default=0.0)
    if not best:
        return [None] * len(layers), ""
    named = f"of the fastest layer here ({text.count(round(best))}MAC/s); the target states no peak"
    return [value / best if value is not None else None for value in rates], named


def gap(layers: list[Layer], roof: dict[str, Any]) -> str:
    """The efficiency gap: boxes as wide as MACs, as high as the share of the peak; '' without times."""
    shares, named = reached(layers, roof)
    boxes = [(layer, share) for layer, share in zip(layers, shares, strict=True) if share is not None]
    if not boxes:
        return ""
    total = sum(layer["macs"] for layer, _ in boxes)
    highest = max(1.0, max(share for _, share in boxes))
    body, x = [], float(LEFT)
    for layer, share in boxes:
        width = (WIDTH - LEFT - RIGHT) * layer["macs"] / total
        height = HEIGHT * share / highest
        said = f"{layer['name']}: {share * 100:.0f}%, {text.count(layer['macs'])} MACs in {text.number(layer['ms'])} ms"
        body.append(
            f'<rect class="box result" x="{x:.2f}" y="{TOP + HEIGHT - height:.2f}" width="{max(width, 0.4):.2f}" '
            f'height="{max(height, 0.4):.2f}"><title>{escape(said)}</title></rect>'
        )
        x += width
    levels = [(share, f"{share * 100:.0f}%") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    body += [_level(TOP + HEIGHT * (1 - share / highest), label) for share, label in levels]
    caption = f"share {named} (height), MACs of the layer (width), in the order of the network"
    return _frame("efficiency gap", body, caption)


def waterline(layers: list[Layer], roof: dict[str, Any]) -> str:
    """MACs a byte of each layer on a logarithmic axis, with the device's own where it is stated; '' if unknown."""
    known = [(layer, value) for layer in layers if (value := intensity(layer)) is not None]
    if not known:
        return ""
    lines = [
        (peak / roof["bytes_per_s"], name)
        for name, peak in roof["peak_macs_per_s"].items()
        if roof["bytes_per_s"] and any(layer["obtained"].endswith(name) for layer, _ in known)
    ]
    values = [value for _, value in known] + [value for value, _ in lines]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - math.log10(value)) / (high - low)

    step = (WIDTH - LEFT - RIGHT) / len(known)
    body = []
    for index, (layer, value) in enumerate(known):
        below = any(layer["obtained"].endswith(name) and value < line for line, name in lines)
        said = f"{layer['name']}: {text.number(value)} MACs a byte"
        body.append(
            f'<circle class="{"base" if below else "result"}" cx="{LEFT + (index + 0.5) * step:.1f}" '
            f'cy="{y(value):.1f}" r="3.5"><title>{escape(said)}</title></circle>'
        )
    body += [_level(y(10.0**power), text.number(10.0**power, 1)) for power in range(low, high + 1)]
    for line, name in lines:
        body.append(
            f'<line class="water" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(line):.1f}" y2="{y(line):.1f}"/>'
            f'<text class="name" x="{WIDTH - RIGHT}" y="{y(line) - 4:.1f}" text-anchor="end">'
            f"{escape(name)}: {text.number(line)} MACs a byte</text>"
        )
    said = "" if lines else "; the target states no peak and bandwidth, so there is no waterline"
    return _frame("waterline", body, f"MACs for each byte moved (height), a dot a layer, in order{said}")


def curve(points: list[dict[str, Any]]) -> str:
    """Quality over the number of calibration images, with intervals; '' with fewer than two measured points."""
    known = [(p["images"], p["quality"]) for p in points if p["quality"]["value"] is not None]
    if len(known) < 2:
        return ""
    ends = [end for _, q in known for end in (q["interval"] or (q["value"], q["value"]))]
    low, high = min(ends), max(ends)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    first, last = math.log(known[0][0]), math.log(known[-1][0])

    def place(images: int, value: float) -> tuple[float, float]:
        across = (math.log(images) - first) / max(last - first, 1e-9)
        return LEFT + 20 + (WIDTH - LEFT - RIGHT - 40) * across, TOP + HEIGHT * (high - value) / (high - low)

    spots = [place(images, q["value"]) for images, q in known]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    body = [f'<polyline class="curve result" points="{line}"/>']
    for (images, q), (x, y) in zip(known, spots, strict=True):
        if q["interval"]:
            top, bottom = place(images, q["interval"][1])[1], place(images, q["interval"][0])[1]
            body.append(f'<line class="result" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        body.append(f'<circle class="result" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        body.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{images}</text>')
    q = known[0][1]
    factor, unit = (100.0, "%") if q["unit"] == "share" else (1.0, q["unit"])
    levels = ((share, factor * (high - (high - low) * share)) for share in (0.0, 0.5, 1.0))
    body += [_level(TOP + HEIGHT * share, text.number(value, 4)) for share, value in levels]
    unit = f" ({unit})" if unit else ""
    return _frame("calibration curve", body, f"{q['name']}{unit} over calibration images, 95% intervals")


def _level(y: float, label: str) -> str:
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _frame(label: str, body: list[str], words: str) -> str:
    """The picture, and below it what its axes are: in the page's own letters, which a phone does not shrink."""
    size = f"0 0 {WIDTH} {TOP + HEIGHT + FOOT}"
    drawn = f'<svg viewBox="{size}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
    return f'<div class="plot" tabindex="0">{drawn}</div><p class="sub">{escape(words)}</p>'
