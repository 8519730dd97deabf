"""StyleGAN2 to MobileStyleGAN: what `substitute_modconv` saves at published size, counted and measured.

    python benchmarks/stylegan2_mobile.py [--size 1024] [--rounds 15]

Random weights: cost alone. The synthesis network (styles in, image out) before and after the pass, in every float
precision of ONNX Runtime and OpenVINO, timed in turns in one run on this host: best build against best build, and
each against its twin. Goals: 3.5x fewer parameters, 9.5x fewer MACs. Run it on a quiet machine.
Results: results/stylegan2-mobile-SIZE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, files, latency, loading, measuring, onnx_graph, registry, serial, targets
from edgegen.devices import local
from edgegen.passes.substitute_modconv import substitute_modconv
from edgegen.records import ModelOptions
from edgegen.types import Artifact, Job, Measurement, Model, Target

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("onnxruntime", "openvino")


def builds(model: Model, name: str, target: Target, folder: Path) -> dict[str, Artifact]:
    """Float builds of one network by `<name> <runtime> <precision>`; what cannot be built is printed."""
    graph = onnx_graph.to_onnx(model.stage, folder / name / "model.onnx")
    made: dict[str, Artifact] = {}
    for runtime in RUNTIMES:
        for plan in registry.module("runtimes", runtime).plans(target, local.cpu_flags()):
            if plan.quantized:
                continue
            label = f"{name} {runtime} {plan.label}"
            try:
                made[label] = measuring.build_isolated(
                    dataclasses.replace(graph, plan=plan), folder / files.key(label), runtime=runtime,
                    calibration=None, target=target,
                )  # fmt: skip
            except errors.RuntimeFailed as error:
                print(f"{label}: {error}")
    return made


def best(timed: dict[str, Measurement], name: str) -> str:
    """The quickest build of a network."""
    mine = {label: m.value for label, m in timed.items() if label.startswith(f"{name} ") and m.status == "measured"}
    return min(mine, key=lambda label: mine[label])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    target = targets.load("cpu")
    options = ModelOptions(config={"size": args.size, "part": "synthesis"})
    dense = loading.load_model("stylegan2", options=options, latency_only=True)
    result = substitute_modconv(dense, Job(target))
    with tempfile.TemporaryDirectory() as place:
        made = builds(dense, "dense", target, Path(place)) | builds(result.model, "mobile", target, Path(place))
        feed = {dense.stage.inputs[0].name: np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)}
        timed = dict(zip(made, measuring.time_interleaved(list(made.values()), feed, rounds=args.rounds)))
    baseline, quickest = best(timed, "dense"), best(timed, "mobile")
    gains: dict[str, Any] = {"best to best": latency.speedup(timed[quickest], timed[baseline])}
    for label in made:
        if label.startswith("mobile ") and (twin := label.replace("mobile ", "dense ", 1)) in timed:
            gains[label.removeprefix("mobile ")] = latency.speedup(timed[label], timed[twin])
    notes = dict(result.notes)
    content = {
        "size": args.size, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "notes": notes,
        "fewer_params": notes["params_before"] / notes["params_after"],
        "fewer_macs": notes["macs_before"] / notes["macs_after"],
        "latency": {label: serial.to_json(m) for label, m in timed.items()},
        "speedup": {label: serial.to_json(m) for label, m in gains.items()},
        "versions": {label: dict(artifact.versions) for label, artifact in made.items()},
    }  # fmt: skip
    out = ROOT / "benchmarks" / "results" / f"stylegan2-mobile-{args.size}.json"
    with files.whole(out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{content['fewer_params']:.2f}x fewer parameters, {content['fewer_macs']:.2f}x fewer MACs")
    for label, gain in gains.items():
        print(f"{label}: {gain.value:.2f}x {gain.interval} {gain.reason}")


if __name__ == "__main__":
    main()
