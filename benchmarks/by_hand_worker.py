"""One variant in a process of its own: `run` maps a file of inputs to a file of outputs, `time` answers milliseconds.

Requests and replies are JSON lines on stdin and stdout. Between its turns the parent stops the process (SIGSTOP), so
that no spinning thread of one runtime slows another.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def open_variant(variant: dict[str, Any], stack: contextlib.ExitStack) -> Run:
    """A function from one input (1, ...) to one output; numpy in and out, as a user calls it."""
    threads = int(variant["threads"])
    if "artifact" in variant:
        return _edgegen(variant["artifact"], stack)
    if variant["runtime"] == "onnxruntime":
        return _onnxruntime(variant["path"], threads)
    return _openvino(variant["path"], variant["precision"], threads)


def _edgegen(raw: dict[str, Any], stack: contextlib.ExitStack) -> Run:
    from edgegen import registry, serial
    from edgegen.types import Artifact

    artifact = serial.from_json(Artifact, raw)
    run = stack.enter_context(registry.module("runtimes", artifact.runtime).load(artifact))
    source, target = artifact.inputs[0].name, artifact.outputs[0].name
    return lambda x: run({source: x})[target]


def _onnxruntime(path: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(path: str, precision: str, threads: int) -> Run:
    import openvino

    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if precision in ("fp32", "bf16"):
        config["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True)[0]


def answer(run: Run, request: dict[str, Any]) -> Any:
    """The reply to one request."""
    if request["op"] == "run":
        x = np.load(request["inputs"], mmap_mode="r", allow_pickle=False)
        y = [np.array(run(np.ascontiguousarray(image[None]))[0]) for image in x]
        np.save(request["outputs"], np.stack(y), allow_pickle=False)
        return len(y)
    x = np.ascontiguousarray(np.load(request["inputs"], mmap_mode="r", allow_pickle=False)[:1])
    _timed(run, x, request["seconds"] / 5, 2)  # wakes the threads and the caches after the stop; not kept
    return _timed(run, x, request["seconds"], 3)


def _timed(run: Run, x: np.ndarray, seconds: float, least: int) -> list[float]:
    """Milliseconds of each run, for so many seconds and at least `least` runs."""
    samples: list[float] = []
    while len(samples) < least or sum(samples) < 1000 * seconds:
        started = time.perf_counter_ns()
        run(x)
        samples.append((time.perf_counter_ns() - started) / 1e6)
    return samples


def main() -> None:
    """Serve until stdin closes. Replies go to the real stdout; whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with contextlib.ExitStack() as stack:
        run = open_variant(json.loads(sys.argv[1]), stack)
        for line in sys.stdin:
            replies.write(json.dumps(answer(run, json.loads(line))) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
