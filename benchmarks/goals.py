"""The goals of the main job, each by the command a user would type, with its figures from the bundle's own report.

    python benchmarks/goals.py [--only NAME ...] [--again]

Needs ../shared/assets and the data of benchmarks/prepare_data.py. Results: benchmarks/results/goals.json and goals.md,
one entry a goal, written as each one ends; finished goals are skipped on the next call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path("..") / "shared" / "assets"
DATA = Path("out") / "data"
NETWORKS = Path("benchmarks") / "networks"
RECIPES = Path("benchmarks") / "recipes"
RESULTS = ROOT / "benchmarks" / "results"
Check = Callable[[dict[str, Any]], list[tuple[str, bool]]]


@dataclass(frozen=True)
class Goal:
    """name of the bundle, arguments of `edgegen compress`, and what its report must show: (text, holds)."""

    name: str
    arguments: tuple[str, ...]
    check: Check


def gain(report: dict[str, Any]) -> float:
    """How many times faster than the best unquantized build; 1 when that build itself was chosen."""
    ratio = report["result"]["ratio"]
    return 1.0 / ratio["value"] if ratio else 1.0


def smaller(report: dict[str, Any]) -> float:
    """How many times smaller than the FP16 (BF16) build of the original."""
    half = [c["size_bytes"] for c in report["candidates"] if c["label"].startswith("original: openvino bf16")]
    return (half[0] if half else report["baseline"]["size_bytes"]) / report["result"]["size_bytes"]


def figure(report: dict[str, Any], row: str, name: str) -> float:
    """A quality figure of the baseline or of the result."""
    return next(q["value"] for q in report[row]["quality"] if q["name"] == name)


def generator(least_gain: float, least_smaller: float, drop: float, name: str = "PSNR to the reference") -> Check:
    """Faster, smaller, and within `drop` of the original in a quality figure."""

    def check(report: dict[str, Any]) -> list[tuple[str, bool]]:
        lost = figure(report, "baseline", name) - figure(report, "result", name)
        return [
            (f"{gain(report):.2f}x faster (goal {least_gain}x)", gain(report) >= least_gain),
            (f"{smaller(report):.2f}x smaller than FP16 (goal {least_smaller}x)", smaller(report) >= least_smaller),
            (f"{name}: {lost:.3f} lost (at most {drop})", lost <= drop),
        ]

    return check


def styled(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """2.2x faster at 25.6 dB to the teacher."""
    psnr = figure(report, "result", "PSNR to the teacher")
    return [
        (f"{gain(report):.2f}x faster (goal 2.2x)", gain(report) >= 2.2),
        (f"{psnr:.2f} dB to the teacher (goal 25.6)", psnr >= 25.6),
    ]


def classifier(least_gain: float, points: float) -> Check:
    """Faster, within so many points of top-1."""

    def check(report: dict[str, Any]) -> list[tuple[str, bool]]:
        lost = 100 * (figure(report, "baseline", "top-1") - figure(report, "result", "top-1"))
        return [
            (f"{gain(report):.2f}x faster (goal {least_gain}x)", gain(report) >= least_gain),
            (f"{lost:.2f} points lost (at most {points})", lost <= points),
        ]

    return check


def not_slower(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """At most 1.03 times the best unquantized build, the whole interval stated."""
    ratio = report["result"]["ratio"]
    value = ratio["value"] if ratio else 1.0
    return [(f"latency ratio {value:.3f} {ratio['interval'] if ratio else ''} (at most 1.03)", value <= 1.03)]


def finished(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """A bundle was written; `verify` is run on every one."""
    return [(report["headline"], True)]


def user(network: str, factory: str, weights: str, data: str, eval_data: str, *more: str) -> tuple[str, ...]:
    """Arguments for a network that a user brings as file.py:factory."""
    found = ("--model", f"{NETWORKS / network}.py:{factory}", "--weights", str(ASSETS / weights))
    return (*found, "--data", str(DATA / data), "--eval-data", str(DATA / eval_data), *more)


POST = ("--recipe", "post-training")
CIFAR = ("cifar/calibration.npz", "cifar/test.npz", *POST, "--calibration-images", "300", "--samples", "2000")
GOALS = (
    Goal("edsr", ("--model", "edsr"), generator(2.0, 4.0, 0.5)),
    Goal("edsr-100-photos", ("--model", "edsr", "--eval-data", str(DATA / "photos/eval")), generator(2.0, 4.0, 0.5)),
    Goal("edsr-drop-0", ("--model", "edsr", "--max-quality-drop", "0"), finished),
    Goal("dcgan", ("--model", "dcgan"), finished),
    Goal("cifar_resnet", ("--model", "cifar_resnet", "--data", str(DATA / "cifar/train.npz"),
                          "--eval-data", str(DATA / "cifar/test.npz")), finished),
    Goal("edsr-jetson", ("--model", "edsr", "--target", "jetson"), finished),
    Goal("resnet20", user("resnet_cifar", "resnet20", "resnet20-cifar10.th", *CIFAR), classifier(1.0, 0.5)),
    Goal("resnet56", user("resnet_cifar", "resnet56", "resnet56-cifar10.th", *CIFAR), classifier(1.0, 0.5)),
    Goal("mobilenet_v2",
         user("mobilenet_v2", "mobilenet_v2", "mobilenet_v2-imagenet.safetensors", "imagenet/eval.npz",
              "imagenet/train.npz", *POST, "--max-quality-drop", "1"), classifier(1.1, 1.0)),
    Goal("efficientformer_l1", ("--model", "timm:efficientformer_l1", "--latency-only"), not_slower),
    Goal("deit_tiny", ("--model", "timm:deit_tiny_patch16_224", "--latency-only"), not_slower),
    Goal("taef2-decoder",
         user("taef2", "decoder", "taef2-decoder.pth", "taef2/train.npz", "taef2/eval.npz",
              "--recipe", str(RECIPES / "taef2-four-bits.toml"), "--max-quality-drop", "0.5"),
         generator(2.0, 4.0, 0.5)),
    Goal("style-mosaic",
         user("style", "style", "style-mosaic.safetensors", "photos/train", "photos/eval",
              "--recipe", str(RECIPES / "style.toml"), "--min-psnr", "25.6"), styled),
)  # fmt: skip


def run(goal: Goal) -> dict[str, Any]:
    """Run one goal in a process of its own; wall time, peak memory of the process, figures, and `verify`."""
    out = ROOT / "out" / "goals" / goal.name
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "edgegen.cli", "compress", *goal.arguments, "--out", str(out.relative_to(ROOT))]
    if "--target" not in goal.arguments:
        command += ["--target", "cpu"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    found: dict[str, Any] = {
        "command": " ".join(["edgegen", *command[3:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "exit": done.returncode,
    }
    if done.returncode != 0:
        return {**found, "message": done.stderr[-600:], "checks": [["ran to its end", False]]}
    verified = subprocess.run(
        [sys.executable, "-m", "edgegen.cli", "verify", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    checks = [*goal.check(report), ("the bundle verifies", verified.returncode == 0)]
    keep = ("headline", "baseline", "result", "candidates", "steps", "machine", "versions", "data", "seed")
    return {**found, "checks": [list(c) for c in checks], "report": {name: report[name] for name in keep}}


def table(results: dict[str, Any]) -> str:
    """All goals as a Markdown table."""
    lines = ["| goal | seconds | shown | met |", "|---|---|---|---|"]
    for name, found in results.items():
        text = "; ".join(text for text, _ in found["checks"])
        met = "yes" if all(holds for _, holds in found["checks"]) else "**no**"
        lines.append(f"| {name} | {found['seconds']} | {text} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[goal.name for goal in GOALS])
    parser.add_argument("--again", action="store_true", help="run finished goals as well")
    options = parser.parse_args()
    file = RESULTS / "goals.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for goal in GOALS:
        if (options.only and goal.name not in options.only) or (goal.name in results and not options.again):
            continue
        print(f"{goal.name} ...", flush=True)
        results[goal.name] = run(goal)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        temporary.replace(file)
        (RESULTS / "goals.md").write_text(table(results), encoding="utf-8")
        print(table({goal.name: results[goal.name]}), flush=True)


if __name__ == "__main__":
    main()
