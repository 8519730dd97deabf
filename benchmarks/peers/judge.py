"""Every artifact of one case: quality on held-out images, then latency of all of them in ONE interleaved run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import bundle, errors, measuring, stats
from edgegen.metrics.psnr import image_psnr
from edgegen.metrics.top1 import answers
from edgegen.types import Artifact, PrecisionPlan, TensorSpec
from peers import environments, launch
from peers.cases import CASES, ROOT

UNQUANTIZED = "unquantized"
TEACHER = f"{UNQUANTIZED} default @ onnxruntime"
MODULE = "peers.lane"


def artifacts(folder: Path, cells: list[Mapping[str, Any]], threads: int) -> tuple[dict[str, Artifact], set[str]]:
    """Label -> what to run, and the labels that only stand in for an artifact that cannot run here.

    Every cell on each runtime that can open it, and the unquantized network on the two general ones.
    """
    told = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    found, twins = {}, set()
    for runtime in ("onnxruntime", "openvino"):
        found[f"{UNQUANTIZED} default @ {runtime}"] = _described(folder / "model.onnx", runtime, told, threads)
    for cell in cells:
        name = f"{cell['peer']} {cell['setting']}"
        if cell["peer"] == environments.OWN:
            made = bundle.artifacts(bundle.read(ROOT / cell["path"]))[0]
            found[f"{name} @ {made.runtime}"] = made
            continue
        runs = launch.literal(launch.HERE / cell["peer"] / "peer.py", "RUNS")
        for runtime in runs:
            found[f"{name} @ {runtime}"] = _described(ROOT / cell["path"], runtime, told, threads)
        if cell["twin"]:
            twins.add(f"{name} @ twin")
            found[f"{name} @ twin"] = _described(ROOT / cell["twin"], "onnxruntime", told, threads)
    return found, twins


def _described(path: Path, runtime: str, told: Mapping[str, Any], threads: int) -> Artifact:
    given = tuple(TensorSpec(name, tuple(shape)) for name, shape in zip(told["inputs"], told["input_shapes"]))
    out = TensorSpec(told["output"], tuple(told["output_shape"]))
    options = {"lane": True, "threads": threads, "delegate": "xnnpack"}
    return Artifact(runtime, path, (path,), PrecisionPlan(), launch.size(path), given, (out,), options)


def measure(
    folder: Path, cells: list[Mapping[str, Any]], *, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """{"figure", "higher", "lanes": {label: quality, latency, differences to each lane of edgegen, or failure}}."""
    told = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    with np.load(folder / "held-inputs.npz", allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    found, twins = artifacts(folder, cells, threads)
    lanes: dict[str, dict[str, Any]] = {label: {} for label in found}
    outputs = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, measuring.Worker] = {}
        for label, artifact in found.items():
            print(f"  {label}", file=sys.stderr, flush=True)
            try:
                worker = stack.enter_context(measuring.Worker(artifact, module=MODULE))
                result = worker.run_many({spec.name: held[spec.name] for spec in artifact.inputs})
                made = result[artifact.outputs[0].name]
                outputs[label] = made.reshape(len(made), *told["output_shape"][1:])
            except (errors.EdgegenError, ValueError) as error:
                lanes[label]["failure"] = environments.one_line(str(error))
            else:
                workers |= {} if label in twins else {label: worker}
        timed = list(workers)
        took = measuring.time_interleaved(
            [workers[label] for label in timed],
            [{spec.name: held[spec.name][:1] for spec in found[label].inputs} for label in timed],
            rounds=rounds, seconds=seconds, module=MODULE,
        )  # fmt: skip
    figure, higher, samples = score(told, held.get("y"), outputs, CASES[told["name"]].trained)
    for label, latency in zip(timed, took):
        if latency.status != "measured":
            lanes[label]["failure"] = environments.one_line(latency.reason)
            continue
        lanes[label] |= {"p50_ms": latency.value, "interval_ms": latency.interval,
                         "round_medians": latency.conditions["round_medians"]}  # fmt: skip
    own = [label for label in samples if label.startswith(environments.OWN + " ")]
    for label, mine in samples.items():
        lanes[label]["quality"] = {"value": float(mine.mean()), "interval": stats.mean_interval(mine), "n": len(mine)}
        lanes[label]["differences"] = {other: difference(mine, samples[other]) for other in own}
    return {"figure": figure, "higher": higher, "rounds": rounds, "threads": threads, "lanes": lanes}


def difference(mine: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Mean of the paired differences of two lanes' per-image figures, with a 95 % interval."""
    apart = mine - other
    return {"value": float(apart.mean()), "interval": stats.mean_interval(apart)}


def score(
    told: Mapping[str, Any], y: np.ndarray | None, outputs: Mapping[str, np.ndarray], trained: bool
) -> tuple[str, bool, dict[str, np.ndarray]]:
    """(figure, whether higher is better, label -> the figure of each image (N,)).

    Top-1 in % with labels; PSNR to the reference, else to the unquantized network's own output; for random weights, and
    for denoisers, whose outputs have no range, the relative output error.
    """
    teacher = outputs[TEACHER].astype(np.float64)
    axes = tuple(range(1, teacher.ndim))
    if not trained or told["denoiser"]:
        norm = np.maximum(np.sqrt((teacher**2).sum(axes)), 1e-12)
        return "relative output error", False, {
            label: np.nan_to_num(np.sqrt(((found - teacher) ** 2).sum(axes)) / norm, nan=np.inf)
            for label, found in outputs.items()
        }  # fmt: skip
    if told["task"] == "classification":
        if y is None:
            raise ValueError(f"{told['name']}: a classifier is judged by labels, and the held-out images have none")
        return "top-1 %", True, {label: 100.0 * (answers(found) == y) for label, found in outputs.items()}
    low, high = told["value_range"]
    reference = y if y is not None and y.shape == teacher.shape else teacher
    name = "PSNR to the teacher dB" if reference is teacher else "PSNR to the reference dB"

    def unit(images: np.ndarray) -> np.ndarray:
        return np.clip((images.astype(np.float64) - low) / (high - low), 0.0, 1.0)

    wanted = unit(reference)
    return name, True, {label: image_psnr(wanted, unit(found)) for label, found in outputs.items()}
