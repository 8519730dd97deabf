"""A runtime module for `edgegen.measuring`: opens an artifact as its maker's documentation does, on so many threads.

edgegen's own artifacts are opened by edgegen's own runtimes, as its bundles say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    names, target = [spec.name for spec in artifact.inputs], artifact.outputs[0].name
    yield lambda feeds: {target: opened([feeds[name] for name in names])}


def matched(wanted: Sequence[str], found: Sequence[str]) -> list[str]:
    """The names of a file's inputs in the order of the network's: by name, else by place, as converters rename.

    Raises:
        ValueError: not the same number.
    """
    if len(wanted) != len(found):
        raise ValueError(f"the network has the inputs {list(wanted)}, the file {list(found)}")
    return list(wanted if set(wanted) == set(found) else found)


Opened = Callable[[Sequence[np.ndarray]], Any]


def _onnxruntime(artifact: Artifact) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(artifact.options["threads"])
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    names = matched([spec.name for spec in artifact.inputs], [found.name for found in session.get_inputs()])
    return lambda given: session.run(None, dict(zip(names, given)))[0]


def _openvino(artifact: Artifact) -> Opened:
    """OpenVINO's own choice of precision: BF16 for what is not quantized, where the processor has it."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": int(artifact.options["threads"])}
    compiled = openvino.Core().compile_model(str(artifact.path), "CPU", config)
    names = matched([spec.name for spec in artifact.inputs], [found.any_name for found in compiled.inputs])
    request = compiled.create_infer_request()
    return lambda given: np.array(request.infer(dict(zip(names, given)), share_inputs=True)[0])


def _litert(artifact: Artifact) -> Opened:
    from edgegen.runtimes import _litert_run

    interpreter = _litert_run.open_interpreter(artifact.path, int(artifact.options["threads"]))
    # serving_default_args_0:0, serving_default_args_1:0: the details have an order of their own
    inputs = sorted(interpreter.get_input_details(), key=lambda detail: detail["name"])
    found = interpreter.get_output_details()[0]
    matched([spec.name for spec in artifact.inputs], [detail["name"] for detail in inputs])

    def run(given: Sequence[np.ndarray]) -> np.ndarray:
        for detail, x in zip(inputs, given):
            interpreter.set_tensor(detail["index"], encode(x, detail["dtype"], *detail["quantization"]))
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
