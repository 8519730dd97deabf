"""Does a built file answer as the graph it was built from? One input through both, before the file is delivered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx

from edgegen import errors, onnx_qdq
from edgegen.types import Graph, TensorSpec

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def check(run: Run, graph: Graph, calibration: Path | None, tolerance: float) -> None:
    """One real input (the first of the calibration set) or a random one through the file and the graph.

    Args:
        run: the loaded file.
        tolerance: largest difference allowed, as a share of the output's peak.
    Raises:
        errors.RuntimeFailed: the outputs differ by more, or are not finite where the graph's are.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # below errors it tells about its own optimizer
    session = onnxruntime.InferenceSession(str(graph.onnx), settings, providers=["CPUExecutionProvider"])
    feed = next(onnx_qdq.calibration_feeds(graph.inputs, calibration)) if calibration else random_feed(graph)
    names = [spec.name for spec in graph.outputs]
    got = run(feed)
    for name, wanted in zip(names, session.run(names, feed)):
        gap = float(np.abs(wanted - got[name]).max() / max(float(np.abs(wanted).max()), 1e-12))
        if np.isfinite(wanted).all() and not gap <= tolerance:
            kinds = sorted({node.op_type for node in onnx.load(graph.onnx, load_external_data=False).graph.node})
            raise errors.RuntimeFailed(
                f"output {name!r} is off by {gap:.0%} of its peak: one of these is computed wrongly: {', '.join(kinds)}"
            )


def random_feed(graph: Graph) -> dict[str, np.ndarray]:
    """One input: uniform over the value range where there is one, else normal."""
    rng, feed = np.random.default_rng(0), {}
    for spec in graph.inputs:
        low, high = spec.value_range or (0.0, 0.0)
        values = rng.uniform(low, high, fixed(spec)) if spec.value_range else rng.standard_normal(fixed(spec))
        feed[spec.name] = values.astype(spec.dtype)
    return feed


def fixed(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a spec whose dimensions are all numbers."""
    return tuple(int(size) for size in spec.shape)
