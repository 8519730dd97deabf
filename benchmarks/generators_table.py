"""The table of benchmarks/generators.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

RUNTIMES = ("onnxruntime", "openvino", "ncnn", "executorch", "litert", "tensorrt", "coreml")
HALF = ("coreml", "tensorrt")  # nothing wider where they run
TEXT = (
    "Each built-in generator in a small size, made smaller by the passes named (10 steps of distillation follow), and "
    "built for every runtime. Weights are random where none are shipped: a cell says that the file was built, runs, "
    "and computes what torch does, and nothing about quality. Per cell: FP32 (FP16 for TensorRT and Core ML, run in "
    "their twins here) / INT8 with its noise as a share of the signal; - not offered, an empty cell not run yet. "
    "Made by `python benchmarks/generators.py`, which goes on where it was stopped."
)


def places_of(runtime: str) -> tuple[str, str]:
    """The two cells of a runtime."""
    return f"{runtime} {'fp16' if runtime in HALF else 'fp32'}", f"{runtime} int8"


def table(made: dict[str, dict[str, Any]], order: Iterable[str]) -> str:
    """A row a generator, and every cell that is not ok."""
    names = [name for name in order if name in made]
    lines = [
        "# Generators", "",
        TEXT, "",
        f"| generator | weights | passes | MACs (M) | parameters (k) | {' | '.join(RUNTIMES)} |",
        "|---|---|---|---|---|" + "---|" * len(RUNTIMES),
    ]  # fmt: skip
    for name in names:
        row = made[name]
        if "passes" not in row:
            lines.append(f"| {name} | | {row.get('failed', '')} | | |" + " |" * len(RUNTIMES))
            continue
        told = ", ".join(f"{one['pass']} ({one['changed']})" for one in row["passes"][:-1])
        macs = f"{row['macs_before'] / 1e6:.1f} to {row['macs_after'] / 1e6:.1f}"
        params = f"{row['params_before'] / 1e3:.0f} to {row['params_after'] / 1e3:.0f}"
        found = [" / ".join(shown(row["cells"], place) for place in places_of(runtime)) for runtime in RUNTIMES]
        lines.append(f"| {name} | {row['weights']} | {told} | {macs} | {params} | {' | '.join(found)} |")
    lines += ["", "| generator | runtime | status | why, and the cure |", "|---|---|---|---|"]
    for name in names:
        for place, cell in made[name].get("cells", {}).items():
            if cell["status"] in ("ok", "not offered"):
                continue
            told = [f"{p['op']} ({p['layer']}): {p['rewrite']}" for p in cell.get("problems", [])[:2]]
            why = cell.get("why") or "; ".join(told) or f"difference {cell.get('difference')}"
            lines.append(f"| {name} | {place} | {cell['status']} | {why.replace('|', '/')[:400]} |")
    return "\n".join(lines) + "\n"


def shown(cells_: dict[str, Any], place: str) -> str:
    """One cell in a word."""
    cell = cells_.get(place)
    if cell is None:
        return ""
    if cell["status"] == "ok":
        return f"ok {cell['difference']:.1%}" if place.endswith("int8") else "ok"
    return "-" if cell["status"] == "not offered" else cell["status"]
