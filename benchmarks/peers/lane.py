"""A runtime module for `edgegen.measuring`: opens an artifact as its maker's documentation does, on so many threads.

edgegen's own artifacts are opened by edgegen's own runtimes, as its bundles say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgegen import registry
from edgegen.types import Artifact

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs."""
    if "lane" not in artifact.options or artifact.runtime == "executorch":
        with registry.module("runtimes", artifact.runtime).load(artifact) as run:
            yield run
        return
    opened = {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert}[artifact.runtime](artifact)
    source, target = artifact.inputs[0].name, artifact.outputs[0].name
    yield lambda feeds: {target: opened(feeds[source])}


def _onnxruntime(artifact: Artifact) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(artifact.options["threads"])
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(artifact: Artifact) -> Callable[[np.ndarray], Any]:
    """OpenVINO's own choice of precision: BF16 for what is not quantized, where the processor has it."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": int(artifact.options["threads"])}
    request = openvino.Core().compile_model(str(artifact.path), "CPU", config).create_infer_request()
    return lambda x: np.array(request.infer([x], share_inputs=True)[0])


def _litert(artifact: Artifact) -> Callable[[np.ndarray], Any]:
    from edgegen.runtimes import _litert_run

    interpreter = _litert_run.open_interpreter(artifact.path, int(artifact.options["threads"]))
    given, found = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], encode(x, given["dtype"], *given["quantization"]))
        interpreter.invoke()
        return decode(interpreter.get_tensor(found["index"]), *found["quantization"])

    return run


def encode(x: np.ndarray, dtype: Any, scale: float, zero: int) -> np.ndarray:
    """Float32 as a file with integer inputs takes it: what its user has to do, so it is timed too."""
    if not np.issubdtype(dtype, np.integer):
        return x
    limits = np.iinfo(dtype)
    return np.clip(np.rint(x / scale) + zero, limits.min, limits.max).astype(dtype)


def decode(y: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """The float32 values of an integer output; a float output as it is."""
    if not np.issubdtype(y.dtype, np.integer):
        return y
    return np.float32(scale) * (y.astype(np.float32) - zero)
