"""INT8 on a processor without VNNI: weights of 8 bits, whose sums it cuts off, beside weights of 7 bits.

    python benchmarks/seven_bits.py [--samples 100] [--rounds 15]

Networks of ../shared/assets and edsr (data: benchmarks/prepare_data.py), in ONNX Runtime and OpenVINO: signal to noise
of the outputs on held-out data to the FP32 network, agreement of the classes, and latency as a share of FP32's in the
same runtime, all builds of a network in one interleaved run. On a processor with VNNI both are exact; it refuses there.
The machine must be quiet. Resumable by network; results/seven-bits.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conditions
import numpy as np
import precision

from edgegen import data, files, latency, loading, measuring, onnx_exact, onnx_graph, targets
from edgegen.runtimes import _common
from edgegen.types import Model, PrecisionPlan

ASSETS, DATA, RESULT = precision.ASSETS, precision.DATA, precision.RESULTS / "seven-bits.json"
NETWORKS = precision.ROOT / "benchmarks" / "networks"
PLANS = {"onnxruntime": PrecisionPlan("int8", "u8s8"), "openvino": PrecisionPlan("int8", ranges="mean")}
BUILDS = {runtime: {"8 bits": plan, "7 bits": _common.seven_bits(plan)} for runtime, plan in PLANS.items()}
CALIBRATION = 64


def cases() -> Iterator[tuple[str, Model, Path, Path]]:
    """Name, model, data to calibrate on, data to judge on."""
    cifar, photos, imagenet = (DATA / name for name in ("cifar", "photos", "imagenet"))
    for name, file, weights, calibration, judged in (
        ("resnet20", "resnet_cifar", "resnet20-cifar10.th", cifar / "calibration.npz", cifar / "test.npz"),
        ("resnet56", "resnet_cifar", "resnet56-cifar10.th", cifar / "calibration.npz", cifar / "test.npz"),
        ("mobilenet_v1_025", "mobilenet_v1", "mobilenet_v1_025-imagenet.safetensors", imagenet / "train.npz",
         imagenet / "eval.npz"),
        ("mobilenet_v2", "mobilenet_v2", "mobilenet_v2-imagenet.safetensors", imagenet / "train.npz",
         imagenet / "eval.npz"),
        ("style", "style", "style-mosaic.safetensors", photos / "train", photos / "eval"),
    ):  # fmt: skip
        yield name, loading.load_model(f"{NETWORKS / file}.py:{name}", weights=ASSETS / weights), calibration, judged
    yield "edsr", loading.load_model("edsr"), photos / "train", photos / "eval"


def measured(model: Model, calibration: Path, judged: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    target = dataclasses.replace(targets.load("cpu"), threads=2)
    with tempfile.TemporaryDirectory(prefix="edgegen-") as name:
        folder = Path(name)
        graph = dataclasses.replace(
            onnx_graph.to_onnx(model.stage, folder / "float.onnx"), preprocessing=model.preprocessing
        )
        chosen = data.Dataset(data.open_source(calibration), model, seed=0)
        data.write_calibration(chosen, folder, graph.inputs[0].name, CALIBRATION)
        held_out = data.Dataset(data.open_source(judged), model, seed=0).select(options.samples, seed=0)
        inputs = np.stack([held_out[i].input for i in range(len(held_out))]).astype(np.float32)
        built = [
            (runtime, kind, measuring.build_isolated(
                dataclasses.replace(graph, plan=plan), folder / f"{runtime}-{kind}", runtime=runtime,
                calibration=folder if plan.quantized else None, target=target))
            for runtime, kinds in BUILDS.items() for kind, plan in {"FP32": PrecisionPlan(), **kinds}.items()
        ]  # fmt: skip
        feeds = {graph.inputs[0].name: inputs[:1]}
        times = measuring.time_interleaved([artifact for *_, artifact in built], feeds, rounds=options.rounds)
        base = {runtime: time for (runtime, kind, _), time in zip(built, times, strict=True) if kind == "FP32"}
        rows, exact = [], None
        for (runtime, kind, artifact), time in zip(built, times, strict=True):
            with measuring.Worker(artifact) as worker:
                outputs = worker.run_many({graph.inputs[0].name: inputs})[graph.outputs[0].name].astype(np.float64)
            exact = outputs if exact is None else exact
            noise = max(1e-20, float(np.square(outputs - exact).sum() / np.square(exact).sum()))
            share = latency.ratio(time, base[runtime])
            rows.append({
                "runtime": runtime, "weights": kind, "sqnr_db": -10 * float(np.log10(noise)), "n": len(held_out),
                "agreement": float(np.mean(outputs.argmax(1) == exact.argmax(1))) if outputs.ndim == 2 else None,
                "share": share.value, "interval": share.interval, "samples_ms": time.samples,
            })  # fmt: skip
        return rows


def table(results: dict[str, Any]) -> str:
    """Markdown, one row a build."""
    lines = ["# INT8 without VNNI", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), "",
             "| network | runtime | weights | signal to noise, dB | same class | latency, share of FP32 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in results.items():
        for row in (row for row in found["rows"] if row["weights"] != "FP32"):
            same = "" if row["agreement"] is None else f"{row['agreement']:.3f}"
            low, high = row["interval"]
            lines.append(f"| {name} | {row['runtime']} | {row['weights']} | {row['sqnr_db']:.1f} | {same} |"
                         f" {row['share']:.2f} ({low:.2f} to {high:.2f}) |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the networks that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not onnx_exact.saturates():
        sys.exit("this processor does not cut off INT8 sums: there is nothing to compare")
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name, model, calibration, judged in cases():
        if name in results:
            continue
        results[name] = {**conditions.conditions(), "rows": measured(model, calibration, judged, options)}
        conditions.write_json(RESULT, results)
        files.write_text(RESULT.with_suffix(".md"), table(results))
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
