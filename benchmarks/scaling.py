"""How time and memory of edgegen grow: `compress` with parameters and with calibration images, `evaluate` with images.

    python benchmarks/scaling.py [--only parameters calibration evaluate] [--most 10]

    parameters    a synthetic residual network of 1 M to 300 M parameters, 30 calibration images
    calibration   the built-in cifar_resnet, 30 to 3,000 calibration images
    evaluate      a bundle of cifar_resnet on 1,000 to 50,000 images

Wall time and peak memory are of the whole process with its children. The images are made up, so nothing is needed; the
exponent is the slope of log(figure) over log(size), over all sizes and over the two largest (where what does not grow
weighs least). Goals: time at most 1.1; memory of `evaluate` and of calibration at most 0.1. Resumable, a line a point:
benchmarks/results/scaling.jsonl and scaling.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from peers import launch  # noqa: E402

WORK, RESULTS = ROOT / "out" / "scaling", HERE / "results"
SIZES = {
    "parameters": (1e6, 3e6, 10e6, 30e6, 100e6, 300e6),
    "calibration": (30, 100, 300, 1000, 3000),
    "evaluate": (1000, 3000, 10_000, 30_000, 50_000),
}
# Largest exponent of (seconds, peak memory). Weights have to lie in memory; images do not.
GOALS = {"parameters": (1.1, 1.1), "calibration": (1.1, 0.1), "evaluate": (1.1, 0.1)}


def images(count: int, size: int, seed: int = 0) -> Path:
    """An .npz of smooth made-up images, x uint8 (N, size, size, 3) and y int64 (N,)."""
    file = WORK / f"images-{size}-{count}-{seed}.npz"
    if not file.is_file():
        WORK.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((seed, count, size))
        coarse = rng.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8)
        x = coarse.repeat(4, axis=1).repeat(4, axis=2)
        x += rng.integers(0, 8, x.shape, dtype=np.uint8) * (x < 248)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, x=x, y=rng.integers(0, 10, count))
        partial.replace(file)
    return file


def command(kind: str, size: float) -> list[str]:
    """The arguments of edgegen for a point, as a user types them."""
    out = WORK / f"{kind}-{size:g}"
    if kind == "evaluate":
        return ["evaluate", str(bundle()), "--data", str(images(50_000, 32)), "--n", f"{size:.0f}", "--quiet"]
    if kind == "calibration":
        chosen = ["--model", "cifar_resnet", "--data", str(images(int(size), 32)), "--calibration-images",
                  f"{size:.0f}", "--eval-data", str(images(200, 32, 1))]  # fmt: skip
    else:
        from networks import synthetic

        width = synthetic.width_for(size)
        network = HERE / "networks" / "synthetic.py"
        chosen = ["--model", f"{network}:synthetic", "--config", f"width={width}", "--data", str(images(30, 8)),
                  "--eval-data", str(images(32, 8, 1)), "--calibration-images", "30"]  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    return ["compress", *chosen, "--recipe", "post-training", "--target", "cpu", "--out", str(out), "--quiet"]


def bundle() -> Path:
    """The bundle that is evaluated, made once.

    Raises:
        RuntimeError: it cannot be made.
    """
    out = WORK / "bundle"
    if not (out / "manifest.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        made = run(["compress", "--model", "cifar_resnet", "--data", str(images(100, 32)), "--eval-data",
                    str(images(200, 32, 1)), "--recipe", "post-training", "--out", str(out), "--quiet"])  # fmt: skip
        if made["code"]:
            raise RuntimeError(f"no bundle to evaluate: {made['words']}")
    return out


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """One run of edgegen with an empty cache: `launch.measured`, and its last words."""
    cache, log = WORK / "cache", WORK / "log.txt"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["EDGEGEN_CACHE"] = str(cache)
    made = launch.measured([sys.executable, "-P", "-m", "edgegen.cli", *arguments], log)
    shutil.rmtree(cache, ignore_errors=True)
    return {**made, "words": launch.last_words(log)}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent k of the least-squares fit of value = a * size^k.

    Raises:
        ValueError: fewer than two points, or one that is not positive.
    """
    if len(sizes) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent needs two positive points, got {list(sizes)} and {list(values)}")
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 6) + 0.0  # no minus zero


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the points, and the exponents of each kind with its goals."""
    machines = sorted({row["machine"] for row in rows if row.get("machine")})
    lines = ["# How cost grows", "",
             "Made by benchmarks/scaling.py: wall time and peak memory of the whole process.", *machines, "",
             "| kind | size | seconds | peak MB | ended |", "|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        figures = f"{row['seconds']:.1f} | {row['peak_mb']:.0f}"
        lines.append(f"| {row['kind']} | {row['size']:,.0f} | {figures} | {row['ended']} |")
    lines += ["", "| kind | figure | exponent | of the two largest | at most | met |", "|---|---|---|---|---|---|"]
    for kind, goals in GOALS.items():
        done = sorted((row for row in rows if row["kind"] == kind and row["ended"] == "ok"), key=lambda r: r["size"])
        for name, goal in zip(("seconds", "peak_mb"), goals):
            if len(done) < 2:
                lines.append(f"| {kind} | {name} | | | {goal} | cannot be told |")
                continue
            whole, last = (slope([r["size"] for r in part], [r[name] for r in part]) for part in (done, done[-2:]))
            met = "yes" if max(whole, last) <= goal else "**no**"
            lines.append(f"| {kind} | {name} | {whole:.2f} | {last:.2f} | {goal} | {met} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor and its cores."""
    from edgegen.devices import local

    told = local.probe()
    return f"{told.get('cpu_model') or 'processor unknown'}, {told.get('cores')} cores"


def read(file: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """(kind, size) -> its newest line."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {(row["kind"], row["size"]): row for row in map(json.loads, lines)}


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), nargs="*", default=list(SIZES))
    parser.add_argument("--most", type=float, default=math.inf, help="no size above this")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.jsonl")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    done = read(options.output)
    for kind in options.only:
        for size in SIZES[kind]:
            if size > options.most or ((kind, size) in done and not options.again):
                continue
            made = run(command(kind, size))
            ended = "ok" if made["code"] == 0 else f"{launch.ending(made['code'])}: {made['words']}"
            row = {"kind": kind, "size": size, "seconds": round(made["seconds"], 2), "ended": ended,
                   "peak_mb": round(made["peak_bytes"] / 1e6, 1), "load": os.getloadavg(), "machine": machine(),
                   "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip
            done[kind, size] = row
            with options.output.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")
            print(f"{kind} {size:g}: {row['seconds']} s, {row['peak_mb']} MB, {ended}", flush=True)
    options.output.with_suffix(".md").write_text(table(list(done.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
