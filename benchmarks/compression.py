"""What compression must show, by the command a user would type: gain, MACs, size, quality, and which pass brought what.

    python benchmarks/compression.py [--only NAME ...] [--again] [--budget-minutes 60] [--steps-scale 0.01]

Each row is one `edgegen compress` with a recipe of benchmarks/recipes, against the network's best unquantized build of
any runtime here, timed in turns with it. Needs ../shared/assets and the data of benchmarks/prepare_data.py. Results:
benchmarks/results/compression.json (raw samples of the latencies, machine, versions, date) and compression.md, written
as each row ends. Finished rows are skipped on the next call, and a row that was cut off (Ctrl-C, or its minutes were
up) goes on with its finished passes and training steps. With --steps-scale training is cut short: that shows that a
row runs, and its figures go to out/compression/trial.json alone. StyleGAN2 to MobileStyleGAN has a script of its own,
stylegan2_mobile.py.

Ablation, from the candidates of the row's own report: the changed structure in float (as it is, and with its graph
rewritten exactly), the original in INT8 (rewritten where that helps), and all of it; the share of a part is the
logarithm of its gain by that of the whole, and the share of each structural pass inside the structure goes by the
logarithm of its own gain, timed before the training, or where one was not timed, of the MACs that each took off.
`--table` makes the page again from the finished rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import goals

ROOT = goals.ROOT
OUT = Path("out") / "compression"
FEATURES = ("--features", f"mobilenet_v1_025:{goals.ASSETS / 'mobilenet_v1_025-imagenet.safetensors'}")
ANY = {"--min-psnr": "1", "--max-quality-drop": "99"}  # budgets that every build keeps
KEEP = ("headline", "baseline", "result", "candidates", "steps", "machine", "versions", "data", "seed", "budget",
        "stamps", "date", "duration_s")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """name of recipe and bundle; arguments of `edgegen compress`; what the report must show.

    gain: times faster than the best unquantized build. macs, smaller: times fewer MACs, and a file times smaller than
    the best unquantized build; 0: no goal. perceptual: the perceptual distance to the teacher may not be larger than
    that of the original in INT8 by NNCF, which a run of its own makes.
    """

    name: str
    arguments: tuple[str, ...]
    gain: float
    macs: float = 0.0
    smaller: float = 0.0
    recipe: str = ""
    perceptual: bool = False

    @property
    def file(self) -> Path:
        """The committed recipe."""
        return goals.RECIPES / f"{self.recipe or self.name}.toml"


CIFAR = ("cifar/train-all.npz", "cifar/test.npz", "--calibration-images", "300", "--samples", "4000")
STYLE = ("style", "style", "style-mosaic.safetensors", "photos/train", "photos/eval", *FEATURES)
RESNET = ("resnet_cifar", "resnet56", "resnet56-cifar10.th", *CIFAR, "--thorough", "--max-quality-drop")
ROWS = (
    Row("resnet56-3x", goals.user(*RESNET, "0.5"), 3.0, smaller=8.0),
    Row("resnet56-5x", goals.user(*RESNET, "1.5"), 5.0),
    Row("edsr-4x", ("--model", "edsr", "--data", str(goals.DATA / "photos/train"), "--eval-data",
                    str(goals.DATA / "photos/eval"), "--max-quality-drop", "0.5"), 4.0, macs=10.0),
    Row("style-3x", goals.user(*STYLE, "--min-psnr", "25.6"), 3.0),
    Row("style-6x", goals.user(*STYLE, "--min-psnr", "22"), 6.0, macs=10.0, perceptual=True),
    Row("rlfn-2x", ("--model", f"{goals.NETWORKS / 'rlfn'}.py:rlfn", "--weights", str(goals.ASSETS / "rlfn-x4.pth"),
                    "--data", str(goals.DATA / "tiles/train"), "--eval-data", str(goals.ASSETS / "kodak24"),
                    "--max-quality-drop", "0.3"), 2.0),
    Row("taef2-3x", goals.user("taef2", "decoder", "taef2-decoder.pth", "taef2/train.npz", "taef2/eval.npz",
                               "--max-quality-drop", "0.5"), 3.0, recipe="taef2", perceptual=True),
    Row("vit-2x", ("--model", "vit", "--data", str(goals.DATA / "cifar/train-all.npz"), "--eval-data",
                   str(goals.DATA / "cifar/test.npz"), "--max-quality-drop", "0.5"), 2.0),
    Row("vit-mnist-2x", ("--model", f"{goals.NETWORKS / 'vit_mnist'}.py:vit_mnist", "--weights",
                         str(goals.DATA / "mnist/vit.safetensors"), "--data", str(goals.DATA / "mnist/train.npz"),
                         "--eval-data", str(goals.DATA / "mnist/test.npz"), "--calibration-images", "300",
                         "--samples", "10000", "--max-quality-drop", "0.5"), 2.0),
    Row("denoiser-kv-trained", ("--model", "dit", "--config", "size=32,patch=1", "--weights",
                                str(goals.DATA / "dit.safetensors"), "--data", str(goals.DATA / "cifar/train-all.npz"),
                                "--eval-data", str(goals.DATA / "cifar/test.npz"), "--steps", "20", "--samples", "256"),
        1.5),
    Row("denoiser-kv", ("--model", "dit", "--config", "size=64,patch=2", "--latency-only"), 1.5),
)  # fmt: skip


def scaled(text: str, scale: float) -> str:
    """A recipe with every number of training steps multiplied, at least 2."""
    return re.sub(r"\b(recover_steps|joint_steps|steps) = (\d+)",
                  lambda m: f"{m[1]} = {max(2, round(int(m[2]) * scale))}" if int(m[2]) else m[0], text)


def run(row: Row, scale: float, seconds: float) -> dict[str, Any]:
    """Run one row in a process of its own; figures and ablation, or why there are none. "unfinished": it goes on."""
    name = row.name if scale == 1 else f"{row.name}-x{scale:g}"
    out = ROOT / OUT / name
    recipe = row.file
    if scale != 1:
        recipe = OUT / f"{name}.toml"
        (ROOT / recipe).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / recipe).write_text(scaled((ROOT / row.file).read_text(encoding="utf-8"), scale), encoding="utf-8")
    command = compress(row, recipe, OUT / name)
    started = time.monotonic()
    code, message = _bounded(command, seconds)
    found: dict[str, Any] = {
        "command": " ".join(["edgegen", *command[3:]]), "date": _now(), "seconds": round(time.monotonic() - started, 1),
        "exit": code, "steps_scale": scale, "goal": {"gain": row.gain, "macs": row.macs, "smaller": row.smaller},
    }  # fmt: skip
    if code is None:
        return {**found, "unfinished": True, "message": f"its {seconds / 60:.1f} minutes were up; call again"}
    if code != 0:
        return {**found, "message": message[-800:], "checks": [[f"ran to its end: {message.strip()[-200:]}", False]]}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    told = {key: report[key] for key in KEEP}
    shown = checks(row, report)
    if row.perceptual:
        shown.append(against_int8(row, report, seconds - (time.monotonic() - started)))
    return {**found, "checks": shown, "ablation": ablation(report), "report": told}


def compress(row: Row, recipe: Path, out: Path) -> list[str]:
    """The command of a row with a recipe."""
    return [sys.executable, "-m", "edgegen.cli", "compress", *row.arguments, "--recipe", str(recipe), "--target", "cpu",
            "--out", str(out), "--resume", "--quiet"]  # fmt: skip


def against_int8(row: Row, report: dict[str, Any], seconds: float) -> tuple[str, bool]:
    """The perceptual distance of the row beside that of the original in INT8, which is made and judged now."""
    out = OUT / f"{row.name}-int8"
    loose = dataclasses.replace(row, arguments=(*row.arguments[:-1], ANY[row.arguments[-2]]))
    code, message = _bounded(compress(loose, goals.RECIPES / "int8.toml", out), seconds)
    if code != 0:
        return f"perceptual distance of the original in INT8: {message.strip()[-200:] or 'its minutes were up'}", False
    other = json.loads((ROOT / out / "report.json").read_text(encoding="utf-8"))
    ours, theirs = (perceptual(told) for told in (report, other))
    label = other["result"]["label"]
    return f"perceptual distance {ours:.4g} (goal {theirs:.4g}: {label})", "int8" in label and ours <= theirs


def perceptual(report: dict[str, Any]) -> float:
    """The perceptual distance to the teacher of a report's result."""
    return float(next(q["value"] for q in report["result"]["quality"] if q["name"].startswith("perceptual distance")))


def _bounded(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit code or None when the time was up, the end of what it said). It ends with this, and keeps its work."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        try:
            message = process.communicate(timeout=seconds)[1]
            return process.returncode, message
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            os.killpg(process.pid, signal.SIGTERM)  # a background shell's children ignore SIGINT
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(stopped, KeyboardInterrupt):
                raise
            return None, ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def checks(row: Row, report: dict[str, Any]) -> list[tuple[str, bool]]:
    """(figure beside its goal, whether it holds); the quality budget is held by every bundle, or there is none."""
    gain, base, end = goals.gain(report), report["baseline"], report["result"]
    found = [(f"{gain:.2f}x faster than {base['label']} (goal {row.gain:g}x)", gain >= row.gain)]
    for name, key, goal in (("fewer MACs", "macs", row.macs), ("smaller file", "size_bytes", row.smaller)):
        times = base[key] / end[key]
        found.append((f"{times:.1f}x {name}" + (f" (goal {goal:g}x)" if goal else ""), times >= goal))
    told = ", ".join(f"{q['name']} {q['value']:.4g} (was {w['value']:.4g})"
                     for q, w in zip(end["quality"], base["quality"], strict=False)
                     if q["value"] is not None and w["value"] is not None)  # fmt: skip
    return [*found, (f"quality: {told or 'not measured'}; budget {report['budget']['quality drop']}", True)]


def ablation(report: dict[str, Any]) -> dict[str, Any]:
    """What each part brought: gains of the steps on the way, and shares of the logarithm of the whole gain (0..1)."""
    own = report["result"]["label"].partition(":")[0]
    best: dict[tuple[str, bool], float] = {}
    for candidate in report["candidates"]:
        if candidate["ratio"] is None or not candidate["ratio"]["value"]:
            continue
        network, _, built = candidate["label"].partition(": ")
        key = (network, "int8" in built)
        best[key] = max(best.get(key, 0.0), 1 / candidate["ratio"]["value"])
    plain, eight = own.removesuffix(", rewritten"), "int8" in report["result"]["label"]
    whole = best.get((own, eight), goals.gain(report))  # of the run of the others
    structure = best.get((plain, False), 1.0)
    rewritten = max(structure, best.get((own, False), 0.0))
    alone = max(best.get((name, True), 0.0) for name in ("original", "original, rewritten"))
    found: dict[str, Any] = {
        "original, float": 1.0, "original, INT8": alone or None, "structure, float": structure,
        "structure rewritten, float": rewritten, "all": whole,
        "undone": {s["name"]: s["reason"] for s in report["steps"] if s["status"] == "undone"},
    }  # fmt: skip
    if whole > 1:
        parts = {"rewritten graph": rewritten / structure if rewritten > structure else 1.0,
                 "INT8": whole / rewritten if eight else 1.0}  # fmt: skip
        shares = {name: math.log(gain) / math.log(whole) for name, gain in parts.items() if gain != 1.0}
        found["shares"] = {**by_pass(report["steps"], 1 - sum(shares.values())), **shares}
    return found


def by_pass(steps: list[dict[str, Any]], part: float) -> dict[str, float]:
    """The structure's share of the gain, divided among its passes by the logarithm of what each brought."""
    taken: dict[str, tuple[float, float]] = {}
    for number, step in enumerate(steps, 1):
        told = step["figures"]
        here = step["status"] in ("kept", "forced", "needs recovery")
        if here and told.get("macs_before") and told.get("macs_after"):
            timed = told["gain"] / told["gain_before"] if told.get("gain") and told.get("gain_before") else 0.0
            taken[f"{number} {step['name']}"] = (timed, told["macs_before"] / told["macs_after"])
    which = 0 if all(timed for timed, _ in taken.values()) else 1
    logs = {name: math.log(found[which]) for name, found in taken.items() if found[which] > 1}
    total = sum(logs.values())
    return {name: part * value / total for name, value in logs.items()} if total else {"structure": part}


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown: goals, then the ablation."""
    lines = ["| row | date | minutes | processor | shown | met |", "|" + 6 * "---|"]
    for name, found in results.items():
        told = found.get("checks", [])
        text = "; ".join(text for text, _ in told) or found.get("message", "")
        met = "yes" if told and all(holds for _, holds in told) else "**no**"
        when = f"{found['date']} | {found['seconds'] / 60:.1f}"
        lines.append(f"| {name} | {when} | {_processor(found)} | {text} | {met} |")
    lines += ["", "| row | INT8 alone | structure alone | rewritten | all | shares of the gain | undone |",
              "|" + 7 * "---|"]  # fmt: skip
    for name, found in results.items():
        if part := found.get("ablation"):
            alone = f"{part['original, INT8']:.2f}x" if part["original, INT8"] else "-"
            shares = ", ".join(f"{key} {value:.0%}" for key, value in part.get("shares", {}).items()) or "-"
            undone = "; ".join(f"{key}: {why}" for key, why in part["undone"].items()) or "-"
            gains = (part["structure, float"], part["structure rewritten, float"], part["all"])
            lines.append(f"| {name} | {alone} | {' | '.join(f'{g:.2f}x' for g in gains)} | {shares} | {undone} |")
    lines += ["", "Ratios of processors with other instructions are not comparable: BF16 makes the unquantized build"
              " faster, VNNI the INT8 build."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _processor(found: dict[str, Any]) -> str:
    """The processor of a row and its instructions; where those were not recorded, what its builds say of them."""
    if not (report := found.get("report")):
        return ""
    machine = report["machine"]
    named = "BF16; no more was recorded" if any("bf16" in c["label"] for c in report["candidates"]) else "not recorded"
    known = machine.get("instructions", named)
    return f"{machine.get('cpu_model', 'unknown')}, {machine.get('cores', '?')} cores: {known}"


def save(results: dict[str, Any], file: Path) -> None:
    """JSON and Markdown, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(results, indent=1)), (file.with_suffix(".md"), table(results))):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def main() -> None:
    """Run what is not done yet."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[row.name for row in ROWS])
    parser.add_argument("--again", action="store_true", help="run finished rows as well, in place of their bundles")
    parser.add_argument("--table", action="store_true", help="only make the page again")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="for all rows of this call together")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="cut training short: a trial, not a result")
    asked = parser.parse_args()
    if not 0 < asked.steps_scale <= 1:
        parser.error(f"--steps-scale must lie in (0, 1], got {asked.steps_scale:g}")
    file = goals.RESULTS / "compression.json" if asked.steps_scale == 1 else ROOT / OUT / "trial.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    end = time.monotonic() + 60 * asked.budget_minutes
    if asked.table:
        for found in results.values():
            if "report" in found:
                found["ablation"] = ablation(found["report"])
        save(results, file)
        return
    for row in ROWS:
        done = row.name in results and not results[row.name].get("unfinished")
        if (asked.only and row.name not in asked.only) or (done and not asked.again) or time.monotonic() > end:
            continue
        if done:
            shutil.rmtree(ROOT / OUT / row.name, ignore_errors=True)
        print(f"{row.name} ...", flush=True)
        left = end - time.monotonic()
        results[row.name] = run(row, asked.steps_scale, left if math.isfinite(left) else 7 * 86400.0)
        save(results, file)
        print(table({row.name: results[row.name]}), flush=True)


if __name__ == "__main__":
    main()
