"""What each runtime's narrowest precision costs: quality on held-out data, and what the file really holds.

    python benchmarks/precision.py [--samples 2000]

ResNet-56 on CIFAR-10 (../shared/assets; top-1) and edsr (PSNR to the reference, photos of ../shared/assets that nothing
was trained on), in every precision of every runtime that is narrower than 16 bits (ncnn: FP16), beside the float build
of the same runtime. Where a runtime cannot run here, its ONNX twin runs, and the table says so.
Goals: at most 0.5 point and 1 dB below float. Resumable; results/precision.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import data, errors, files, loading, measuring, onnx_graph, program, registry, serial, targets
from edgegen.devices import local
from edgegen.quality import Evaluation
from edgegen.types import Graph, Model, PrecisionPlan, Target

ROOT = Path(__file__).resolve().parents[1]
ASSETS, DATA = ROOT.parent / "shared" / "assets", ROOT / "out" / "data"
RESULTS = ROOT / "benchmarks" / "results"
RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "coreml", "executorch", "litert", "ncnn")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CALIBRATION = 300


def cases() -> dict[str, tuple[Model, Path, Path, str, float]]:
    """Name -> model, calibration data, evaluation data, deciding figure, largest loss allowed in its unit."""
    network = str(ROOT / "benchmarks" / "networks" / "resnet_cifar.py") + ":resnet56"
    resnet = loading.load_model(network, weights=ASSETS / "resnet56-cifar10.th")
    photos = DATA / "photos"
    return {
        "resnet56": (resnet, DATA / "cifar" / "calibration.npz", DATA / "cifar" / "test.npz", "top-1", 0.005),
        "edsr": (loading.load_model("edsr"), photos / "train", photos / "eval", "PSNR to the reference", 1.0),
    }


def narrow(runtime: str, target: Target) -> list[PrecisionPlan]:
    """The plans to judge: INT8 and narrow weights; for ncnn, which has neither, FP16."""
    plans = registry.module("runtimes", runtime).plans(target, local.cpu_flags())
    return [plan for plan in plans if plan.quantized] or [plan for plan in plans if plan.precision == "fp16"]


def wide(runtime: str, target: Target) -> PrecisionPlan:
    """The widest float plan of the runtime."""
    plans = registry.module("runtimes", runtime).plans(target, local.cpu_flags())
    return next(plan for plan in plans if not plan.quantized)


def measured(
    graph: Graph, runtime: str, plan: PrecisionPlan, target: Target, folder: Path, evaluation: Evaluation, figure: str
) -> dict[str, Any]:
    """Quality, shares read back and size of one build; or why there is none."""
    graph = dataclasses.replace(graph, plan=plan)
    try:
        made = measuring.build_isolated(
            graph, folder / files.key(runtime, plan.label), runtime=runtime, calibration=folder, target=target
        )
        with measuring.Worker(made) as worker:
            outputs = folder / "outputs.npy"
            outputs.unlink(missing_ok=True)
            stacked = np.stack([evaluation.data[i].input for i in range(len(evaluation.data))]).astype(np.float32)
            np.save(outputs, worker.run_many({graph.inputs[0].name: stacked})[graph.outputs[0].name])
            seen = worker.inspect()
    except errors.EdgegenError as error:
        return {"plan": plan.label, "failure": " ".join(str(error).split())[:300]}
    found = next(m for m in evaluation.figures(outputs) if m.name == figure)
    module = registry.module("runtimes", runtime)
    where = "here" if module.missing() is None else "its ONNX twin"
    return {
        "plan": plan.label, "value": found.value, "interval": found.interval, "ran": where, "bytes": made.size_bytes,
        "int8_weight_share": seen.int8_weight_share, "int8_macs_share": seen.int8_macs_share,
        "layers": sorted(set(seen.layers.values())), "versions": dict(made.versions),
    }  # fmt: skip


def teacher(graph: Graph, target: Target, folder: Path, dataset: Any) -> Path:
    """FP32 outputs in ONNX Runtime."""
    out = folder / "teacher.npy"
    made = measuring.build_isolated(
        dataclasses.replace(graph, plan=PrecisionPlan()), folder / "teacher", runtime="onnxruntime", calibration=None,
        target=target,
    )  # fmt: skip
    stacked = np.stack([dataset[i].input for i in range(len(dataset))]).astype(np.float32)
    with measuring.Worker(made) as worker:
        np.save(out, worker.run_many({graph.inputs[0].name: stacked})[graph.outputs[0].name])
    return out


def table(results: dict[str, Any]) -> str:
    """Markdown, one row a build."""
    lines = ["| network | runtime | build | figure | to float | INT8 weights | INT8 MACs | size | ran | met |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results.values():
        for entry in row["builds"]:
            if "failure" in entry:
                start = f"| {row['network']} | {row['runtime']} | {entry['plan']} |"
                lines.append(f"{start} {entry['failure']} ||||||  **no** |")
                continue
            lost = row["float"].get("value", math.nan) - entry["value"]
            met = "yes" if lost <= row["allowed"] else "**no**"
            shares = f"{entry['int8_weight_share']:.0%} | {entry['int8_macs_share']:.0%}"
            lines.append(
                f"| {row['network']} | {row['runtime']} | {entry['plan']} | {row['figure']} {entry['value']:.4f} |"
                f" {-lost:+.4f} | {shares} | {entry['bytes'] / 1e6:.2f} MB | {entry['ran']} | {met} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge what is not judged yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args()
    file = RESULTS / "precision.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name, (model, calibration, evaluation, figure, allowed) in cases().items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            graph = onnx_graph.to_onnx(model.stage, folder / "graph.onnx")
            graph = dataclasses.replace(graph, program=program.save(model.stage, folder / "graph.pt2"))
            data.write_calibration(
                data.Dataset(data.open_source(calibration), model), folder, graph.inputs[0].name, CALIBRATION
            )
            dataset = data.Dataset(data.open_source(evaluation), model)
            step = max(1, len(dataset) // options.samples)  # the files are sorted by class
            dataset = dataset.subset(range(0, len(dataset), step))
            base = dataclasses.replace(targets.load("cpu"), threads=2, precisions=PRECISIONS)
            judged = Evaluation(model, dataset, teacher(graph, base, folder, dataset))
            for runtime in RUNTIMES:
                if f"{name} {runtime}" in results:
                    continue
                target = dataclasses.replace(base, runtimes=(runtime,))
                plans = [wide(runtime, target), *narrow(runtime, target)]
                rows = [measured(graph, runtime, plan, target, folder, judged, figure) for plan in plans]
                results[f"{name} {runtime}"] = serial.to_json({
                    "network": name, "runtime": runtime, "figure": figure, "allowed": allowed, "n": len(dataset),
                    "float": rows[0], "builds": rows[1:], "calibration": CALIBRATION,
                    "machine": local.probe(),
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                })  # fmt: skip
                with files.whole(file) as temporary:
                    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
                (RESULTS / "precision.md").write_text(table(results), encoding="utf-8")
                print(table({"": results[f"{name} {runtime}"]}), flush=True)


if __name__ == "__main__":
    main()
