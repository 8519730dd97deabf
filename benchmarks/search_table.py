"""Measure every candidate of a small recipe space once, so that searches can be compared without measuring again.

    python benchmarks/search_table.py [--only 300] [--threads 0]

Network: the built-in cifar_resnet, data: out/data/cifar (benchmarks/prepare_data.py), runtime: ONNX Runtime on this
host. 336 tuples of choices are 332 different recipes. Each is applied, trained to the end, built, timed beside the
original in one interleaved run, and scored on the selection part of the data: `edgegen search` does the same, but stops
some early. Killed and called again, it goes on (out/search-table). Writes results/search-table.json.

The machine must be quiet: `--only N` measures N more and ends. `benchmarks/search_replay.py` compares searches on it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import conditions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "search-table.json"
GENES: list[dict[str, Any]] = [
    {"name": "blocks", "pass": "prune_blocks", "option": "ratio", "choices": [0.0, 0.25, 0.5, 0.75], "off": 0.0},
    {"name": "channels", "pass": "prune_channels", "option": "ratio", "off": 0.0,
     "choices": [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75]},
    {"name": "rank", "pass": "factorize_svd", "option": "ratio", "choices": [0.0, 0.5], "off": 0.0},
    {"name": "training", "pass": "distill", "option": "steps", "choices": [0, 25, 75], "off": 0},
    {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
]  # fmt: skip
SPACE = {
    "schema": 1, "order": ["prune_blocks", "prune_channels", "factorize_svd", "distill", "quantize"],
    "options": {"distill": {"batch": 32}}, "genes": GENES,
}  # fmt: skip
TARGET = '''description = "this host with ONNX Runtime alone"
runtimes = ["onnxruntime"]
is_host = true
precisions = ["fp32", "int8"]
[channel_multiple]
default = 8
[sources]
channel_multiple = "ONNX Runtime on AVX2 takes blocks of 8 channels"
'''


def candidates(space: Any, layers: Any) -> dict[str, dict[str, int]]:
    """Key of the recipe -> choices: each recipe once, in an order that says nothing."""
    from edgegen.search import spaces

    names = [gene.name for gene in space.genes]
    found: dict[str, dict[str, int]] = {}
    for places in spaces.everything(space):
        choices = dict(zip(names, places, strict=True))
        found.setdefault(spaces.candidate_key(spaces.to_recipe(space, choices, layers)), choices)
    keys = sorted(found)
    random.Random(0).shuffle(keys)
    return {key: found[key] for key in keys}


def known(file: Path) -> list[dict[str, Any]]:
    """The rows that were written; a line that was cut off is dropped."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def row(key: str, choices: dict[str, int], figures: Any, seconds: float) -> dict[str, Any]:
    """One line of the table. drop in points of top-1."""
    told = {"latency_ms": figures.latency_ms, "ratio": figures.ratio, "drop": figures.drop,
            "size_bytes": figures.size_bytes, "build": figures.build, "failure": figures.failure}  # fmt: skip
    return {"key": key, "choices": choices, **told, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, default=0, help="measure so many more, then end (0: all)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "data" / "cifar")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "search-table")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["EDGEGEN_CACHE"] = str(options.work / "cache")  # training is kept there, for float and INT8 alike

    from edgegen.request import Request
    from edgegen.search import measured, spaces
    from edgegen.types import Budget

    (options.work / "target.toml").write_text(TARGET, encoding="utf-8")
    request = Request(
        model="cifar_resnet", target=str(options.work / "target.toml"), data=options.data / "train.npz",
        eval_data=options.data / "test.npz", threads=options.threads, recipe="post-training",
        out=options.work / "run",
    )  # fmt: skip
    bench = measured.open_bench(request)
    try:
        space, left = spaces.fitted(spaces.parse(SPACE, "table"), bench.layers)
        file = options.work / "rows.jsonl"
        rows, wanted = known(file), candidates(space, bench.layers)
        done = {entry["key"] for entry in rows}
        objective = measured.objective(bench, space, Budget(), lambda: ())  # nothing is stopped early
        missing = [key for key in wanted if key not in done]
        for number, key in enumerate(missing[: options.only or None], 1):
            began = time.perf_counter()
            rows.append(row(key, wanted[key], objective(wanted[key]), time.perf_counter() - began))
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(rows[-1]) + "\n")
            told = rows[-1]["failure"] or f"{rows[-1]['ratio']:.3f} of the latency, drop {rows[-1]['drop']:.2f}"
            print(f"{number}/{len(missing)}  {rows[-1]['seconds']:6.1f} s  {told}  {wanted[key]}", flush=True)
        baseline = bench.baseline.latency
        write(options.out, rows, len(wanted), left, baseline.value if baseline is not None else None)
    finally:
        shutil.rmtree(bench.run.folder, ignore_errors=True)


def write(out: Path, rows: list[dict[str, Any]], wanted: int, left: dict[str, str], baseline_ms: float | None) -> None:
    """The table as it is so far."""
    from edgegen import files

    files.write_json(out, {
        **conditions.conditions(), "model": "cifar_resnet", "runtime": "onnxruntime", "baseline_ms": baseline_ms,
        "space": SPACE, "left": left, "candidates": wanted, "measured": len(rows),
        "seconds": round(sum(entry["seconds"] for entry in rows), 1), "rows": sorted(rows, key=lambda r: r["key"]),
    })  # fmt: skip
    print(f"{out}: {len(rows)} of {wanted} candidates")


if __name__ == "__main__":
    main()
