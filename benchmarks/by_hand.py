"""What a user gets by hand, and what edgegen made, measured side by side in ONE interleaved run.

    python benchmarks/by_hand.py --network resnet56 --network style-mosaic [--bundle out/resnet56-cpu ...]

Every network: ONNX Runtime static INT8 (U8S8 and S8S8), NNCF INT8 on OpenVINO, FP32 of both, BF16 OpenVINO, all from
the same calibration images, and the artifacts of edgegen bundles. Each variant has a process of its own, stopped
between its turns; the rounds go ABAB in an order shuffled per round; ratios are paired by round. Needs the data of
benchmarks/prepare_data.py and ../shared/assets.

Results: benchmarks/results/<output name>.json, written as each network ends; finished networks are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import conditions
import numpy as np
from by_hand_builds import BASELINE, VARIANTS, build, export
from by_hand_networks import NETWORKS, quality
from prepare_data import ASSETS

HERE = Path(__file__).resolve().parent
TEACHER = "onnxruntime fp32"  # a float32 execution of the network itself
RESAMPLES = 2000


class Process:
    """A variant's worker, stopped except while it answers."""

    def __init__(self, variant: dict[str, Any]):
        command = [sys.executable, str(HERE / "by_hand_worker.py"), json.dumps(variant)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._child.stdin is None or self._child.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self._in, self._out = self._child.stdin, self._child.stdout

    def ask(self, **request: Any) -> Any:
        """The reply to one request.

        Raises:
            RuntimeError: the worker died; its own message is on stderr.
        """
        self._child.send_signal(signal.SIGCONT)
        try:
            self._in.write(json.dumps(request) + "\n")
            self._in.flush()
            line = self._out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker died with exit code {self._child.wait()}")
        self._child.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()


def from_bundle(folder: Path) -> dict[str, Any]:
    """The variant of an edgegen bundle: its artifact with absolute paths, loaded through edgegen's own runtime."""
    from edgegen import bundle, serial

    artifact = bundle.artifacts(bundle.read(folder))[0]
    return {"artifact": serial.to_json(artifact), "size_bytes": artifact.size_bytes}


def variants(name: str, calibration: np.ndarray, folder: Path, bundles: list[Path]) -> dict[str, dict[str, Any]]:
    """Label -> what the worker takes, or {"failed": reason}: a build that fails is a row of the table, not the end."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx = folder / "model.onnx"
    export(NETWORKS[name].make(ASSETS), calibration[:1], onnx)
    found: dict[str, dict[str, Any]] = {}
    for label in VARIANTS:
        print(f"{name}: building {label}", file=sys.stderr)
        try:
            found[label] = build(label, onnx, calibration, folder / label.replace(" ", "-"))
        except (RuntimeError, ValueError, TypeError) as error:
            found[label] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return found | {f"edgegen {bundle.name}": from_bundle(bundle) for bundle in bundles}


def take_turns(
    processes: dict[str, Process], inputs: Path, rounds: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Milliseconds, variant -> round -> samples. The first turn of each is warm-up and is not kept."""
    samples: dict[str, list[list[float]]] = {label: [] for label in processes}
    order = random.Random(0)
    for number in range(rounds + 1):
        for label in order.sample(list(processes), len(processes)):
            reply = processes[label].ask(op="time", inputs=str(inputs), seconds=seconds)
            if number:
                samples[label].append(reply)
    return samples


def ratio(above: list[list[float]], below: list[list[float]]) -> dict[str, float]:
    """Median over rounds of the ratio of the two medians of a round, with a 95 % bootstrap interval over rounds."""
    paired = np.array([np.median(a) / np.median(b) for a, b in zip(above, below)])
    drawn = np.median(paired[np.random.default_rng(0).integers(0, len(paired), (RESAMPLES, len(paired)))], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(np.median(paired)), "low": float(low), "high": float(high)}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All variants of one network: quality on held-out data, latency, ratio to the BF16 OpenVINO build, size."""
    network = NETWORKS[name]
    inputs = network.inputs(options.data, ASSETS, options.calibration or network.calibration, options.images)
    built = variants(name, inputs.calibration, options.work / name, options.bundle)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.save(scratch / "inputs.npy", inputs.evaluation)
        processes, outputs = {}, {}
        for label, variant in built.items():
            if "failed" in variant:
                continue
            process = Process({**variant, "threads": options.threads})
            stack.callback(process.close)
            try:
                process.ask(op="run", inputs=str(scratch / "inputs.npy"), outputs=str(scratch / "outputs.npy"))
            except RuntimeError as error:
                variant["failed"] = str(error)
                continue
            processes[label], outputs[label] = process, np.load(scratch / "outputs.npy", allow_pickle=False)
        samples = take_turns(processes, scratch / "inputs.npy", options.rounds, options.seconds)
    return {
        "calibration_images": len(inputs.calibration),
        "evaluation_images": len(inputs.evaluation),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "threads": options.threads,
        "load_after": os.getloadavg(),
        "variants": {
            label: {**variant, "quality": quality(name, inputs, outputs[label], outputs[TEACHER]),
                    "ratio": ratio(samples[label], samples[BASELINE]), "samples_ms": samples[label]}
            if label in processes else variant
            for label, variant in built.items()
        },
    }  # fmt: skip


def table(name: str, result: dict[str, Any]) -> str:
    """One network as a Markdown table."""
    lines = [
        f"### {name}: {result['calibration_images']} calibration images, {result['evaluation_images']} others for "
        f"quality, {result['rounds']} rounds, {result['threads']} threads, ratio to {BASELINE}",
        "",
        "| variant | p50 ms | p90 ms | ratio (95 %) | quality | MB |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in result["variants"].items():
        if "failed" in row:
            lines.append(f"| {label} | failed: {row['failed']} | | | | |")
            continue
        flat, r = np.concatenate(row["samples_ms"]), row["ratio"]
        figures = ", ".join(f"{key} {value:.2f}" for key, value in row["quality"].items())
        lines.append(
            f"| {label} | {np.median(flat):.2f} | {np.percentile(flat, 90):.2f} | {r['value']:.3f} "
            f"({r['low']:.3f}..{r['high']:.3f}) | {figures} | {row['size_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), action="append", required=True)
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="edgegen bundle of the one --network")
    parser.add_argument("--data", type=Path, default=HERE.parent / "out" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "out" / "by-hand", help="where builds are put")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "by-hand.json")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.3, help="timed runs of a variant in a round take so long")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many evaluation images")
    parser.add_argument("--calibration", type=int, default=0, help="calibration images; 0: the network's own number")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--again", action="store_true", help="measure finished networks again")
    options = parser.parse_args()
    if options.bundle and len(options.network) != 1:
        parser.error("--bundle belongs to one network: give exactly one --network")
    return options


def main() -> None:
    """Measure what is not done yet, and print everything asked for."""
    options = parse()
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.network:
        if name not in results or options.again:
            results[name] = {**conditions.conditions(), **measure(name, options)}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            partial = options.output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
            partial.replace(options.output)
        print(table(name, results[name]))


if __name__ == "__main__":
    main()
