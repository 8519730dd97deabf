"""What each repair of an INT8 network brings: quality on held-out data of builds with it, each beside plain INT8.

    python benchmarks/quantization.py [--limit 2000] [--only resnet56] [--steps 300]

ResNet-56 on CIFAR-10 and edsr (PSNR to the reference) with the data of `precision.py`, mobilenet_v1_025 on the photos
of ImageNet's classes (`prepare_data.py`; ReLU6, so that there is nothing to equalize). Ways: float, plain INT8,
equalized, bias-corrected, AdaRound, all three, allocated (half of the noise power of plain INT8 bought back by float
layers), and trained with rounding. Each is built in ONNX Runtime (u8s8) and OpenVINO; figures with bootstrap intervals,
and the signal to noise ratio to the float network. Resumable by network, way and runtime; results/quantization.json and
.md. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import precision as shared

from edgegen import data, errors, files, loading, measuring, onnx_graph, registry, targets
from edgegen.devices import local
from edgegen.passes.correct_bias import correct_bias
from edgegen.passes.equalize import equalize
from edgegen.passes.quantize import quantize
from edgegen.passes.quantize_aware import quantize_aware
from edgegen.passes.round_adaptively import round_adaptively
from edgegen.quality import Evaluation
from edgegen.runtimes import _common
from edgegen.types import Job, Model, PrecisionPlan, Target

PLANS = {
    "onnxruntime": PrecisionPlan("int8", "u8s8"),
    "openvino": PrecisionPlan("int8", rest="fp32", ranges="minmax"),
}
Way = Callable[[Model, Job, int], Model]


def _repaired(model: Model, job: Job, steps: int) -> Model:
    """Equalization, AdaRound, then bias correction on what is left: that order is the one of the papers."""
    return _bias(_round(equalize(model, job).model, job, steps), job, steps)


def _bias(model: Model, job: Job, steps: int) -> Model:
    return correct_bias(model, job, samples=32).model


def _round(model: Model, job: Job, steps: int) -> Model:
    return round_adaptively(model, job, samples=32, steps=steps).model


def _allocated(model: Model, job: Job, steps: int) -> Model:
    whole = quantize(model, job, sensitivity="output", samples=8).notes["int8_sqnr_db"]
    return quantize(model, job, budget=f"quality:{whole + 3:.2f}", samples=8).model


def _trained(model: Model, job: Job, steps: int) -> Model:
    labelled = model.task == "classification" and job.data[0].label is not None
    return quantize_aware(model, job, steps=steps, lr=2e-5, labels=0.1 if labelled else 0.0).model


WAYS: dict[str, Way] = {
    "float": lambda model, job, steps: model,
    "plain INT8": lambda model, job, steps: model,
    "equalized": lambda model, job, steps: equalize(model, job).model,
    "bias-corrected": _bias,
    "AdaRound": _round,
    "equalized, AdaRound, bias": _repaired,
    "allocated (+3 dB)": _allocated,
    "trained": _trained,
}


def cases() -> dict[str, tuple[Model, Path, Path, str]]:
    """Name -> model, data to learn from, data to judge on, deciding figure; those whose files are here."""
    found = {name: case[:4] for name, case in shared.cases().items()}
    weights = shared.ASSETS / "mobilenet_v1_025-imagenet.safetensors"
    photos = shared.DATA / "imagenet"
    if weights.is_file() and (photos / "eval.npz").is_file():
        network = f"{shared.ROOT / 'benchmarks' / 'networks' / 'mobilenet_v1.py'}:mobilenet_v1_025"
        model = loading.load_model(network, weights=weights)
        found["mobilenet_v1_025"] = (model, photos / "train.npz", photos / "eval.npz", "top-1")
    return found


def measured(
    model: Model, runtime: str, plan: PrecisionPlan, target: Target, calibration: Any, evaluation: Any, figure: str,
    teacher: np.ndarray | None,
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """One build: its figure with interval, size and precision read back; and its outputs."""
    with tempfile.TemporaryDirectory(prefix="edgegen-") as name:
        folder = Path(name)
        data.write_calibration(calibration, folder, model.stage.inputs[0].name, len(calibration))
        graph = onnx_graph.to_onnx(model.stage, folder / "float.onnx")
        graph = dataclasses.replace(graph, plan=plan, preprocessing=model.preprocessing)
        made = measuring.build_isolated(
            graph, folder / "build", runtime=runtime, calibration=folder if plan.quantized else None, target=target
        )
        stacked = np.stack([evaluation[i].input for i in range(len(evaluation))]).astype(np.float32)
        with measuring.Worker(made) as worker:
            outputs = worker.run_many({graph.inputs[0].name: stacked})[graph.outputs[0].name]
            seen = worker.inspect()
        for part, values in (("outputs", outputs), ("teacher", outputs if teacher is None else teacher)):
            np.save(folder / f"{part}.npy", values)
        judged = Evaluation(model, evaluation, folder / "teacher.npy", 0, None, None, None)
        found = next(m for m in judged.figures(folder / "outputs.npy") if m.name == figure)
    row = {"value": found.value, "interval": found.interval, "unit": found.unit, "bytes": made.size_bytes,
           "int8_macs_share": seen.int8_macs_share, "float_layers": len(plan.float_layers),
           "learned_ranges": len(plan.scales)}  # fmt: skip
    return row, outputs


def run(name: str, limit: int, steps: int, images: int, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Every way of one network that is not in the results yet."""
    model, learn, judge, figure = cases()[name]
    target = dataclasses.replace(targets.load("cpu"), threads=1)
    learned = data.Dataset(data.open_source(learn), model, seed=0)
    held_out = data.Dataset(data.open_source(judge), model, seed=0).select(limit, seed=0)
    calibration = learned.select(images, seed=0)
    job = Job(target, data=learned.select(2000, seed=0), teacher=model, threads=1)
    here = [runtime for runtime in PLANS if registry.module("runtimes", runtime).missing() is None]
    plans = {r: _common.exact_sums([PLANS[r]], target, local.cpu_flags())[0] for r in here}
    teacher = measured(model, "onnxruntime", PrecisionPlan(), target, calibration, held_out, figure, None)[1]
    for way, prepare in WAYS.items():
        missing = [r for r in here if files.key(name, way, r, limit, steps, images) not in results]
        if not missing:
            continue
        begin, failure = time.monotonic(), ""
        try:
            prepared = prepare(model, job, steps)
        except (errors.EdgegenError, ValueError) as error:
            failure = " ".join(str(error).split())[:300]
        seconds = time.monotonic() - begin
        for runtime in missing:
            row: dict[str, Any] = {
                "network": name, "way": way, "runtime": runtime, "figure": figure, "n": len(held_out),
                "seconds_of_the_pass": round(seconds, 1), "steps": steps,
            }  # fmt: skip
            if failure:
                row["failure"] = failure
            else:
                wanted = prepared.plan
                plan = PrecisionPlan() if way == "float" else dataclasses.replace(
                    plans[runtime], float_layers=wanted.float_layers, scales=wanted.scales)
                try:
                    found, outputs = measured(prepared, runtime, plan, target, calibration, held_out, figure, teacher)
                    power = max(1e-30, float(np.square(teacher).sum()))
                    noise = max(1e-20, float(np.square(outputs - teacher).sum()) / power)
                    row |= {**found, "sqnr_db": -10 * float(np.log10(noise))}
                except errors.EdgegenError as error:
                    row["failure"] = " ".join(str(error).split())[:300]
            results[files.key(name, way, runtime, limit, steps, images)] = row
            save()
            print(json.dumps(row), flush=True)


def table(results: dict[str, Any]) -> str:
    """Markdown, one row a build."""
    lines = [
        "# INT8, and what repairs it", "",
        f"`benchmarks/quantization.py`, {datetime.date.today().isoformat()}. n: held-out samples; SQNR to the float"
        " network's outputs; interval: 95 %.", "",
        "| network | way | runtime | figure | value | interval | SQNR dB | INT8 MACs | n | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results.values():
        if "failure" in row:
            told = f"failed: {row['failure']} | | | "
        else:
            between = "to".join(f" {end:.4g} " for end in row["interval"]) if row["interval"] else ""
            told = f"{row['value']:.4g} {row['unit']} | {between} | {row['sqnr_db']:.1f} | {row['int8_macs_share']:.0%}"
        lines.append(f"| {row['network']} | {row['way']} | {row['runtime']} | {row['figure']} | {told} | {row['n']} |"
                     f" {row['seconds_of_the_pass']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, run what is missing, write both files after every build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=2000, help="held-out samples")
    parser.add_argument("--steps", type=int, default=300, help="of AdaRound a layer, and of training")
    parser.add_argument("--calibration", type=int, default=shared.CALIBRATION, help="images that ranges are from")
    parser.add_argument("--only", default="", help="one network")
    parser.add_argument("--out", type=Path, default=shared.RESULTS / "quantization.json")
    given = parser.parse_args()
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}

    def save() -> None:
        texts = {given.out: json.dumps(results, indent=1) + "\n", given.out.with_suffix(".md"): table(results)}
        for file, text in texts.items():
            with files.whole(file) as temporary:
                temporary.write_text(text, encoding="utf-8")

    for name in [given.only] if given.only else cases():
        run(name, given.limit, given.steps, given.calibration, results, save)


if __name__ == "__main__":
    main()
