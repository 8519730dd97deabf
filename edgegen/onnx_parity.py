"""Does an ONNX file answer as the network it came from? Compared on real inputs, output by output."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, onnx_files
from edgegen.types import Graph, Stage

_Runner = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Parity:
    """Largest absolute difference between two outputs, and the same divided by the largest expected magnitude."""

    max_abs: float
    max_rel: float


def parity(
    stage: Stage,
    graph: Graph,
    feeds: Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    *,
    atol: float = 1e-4,
    rtol: float = 1e-3,
) -> Parity:
    """Run torch and the ONNX file (ONNX Runtime) on the same inputs and compare all outputs.

    Args:
        stage: the module, or for an .onnx model the file that the graph was made from.
        feeds: real inputs, one or several mappings from input name to an array of the input's shape (batch included).
        atol, rtol: a difference may be at most atol + rtol * (largest magnitude of that expected output). The defaults
            are for FP32 files: sums in another order, and nothing else.
    Raises:
        errors.RuntimeFailed: a larger difference, a value that is not finite, or another shape.
    """
    run, expect = _session(graph.onnx), _reference(stage)
    worst = Parity(0.0, 0.0)
    for number, feed in enumerate([feeds] if isinstance(feeds, Mapping) else feeds):
        for spec, wanted, got in zip(graph.outputs, expect(feed), run(feed)):
            found = _difference(wanted, got)
            if not found.max_abs <= atol + rtol * float(np.abs(wanted).max(initial=0)):
                raise errors.RuntimeFailed(
                    f"{stage.name}: output {spec.name!r} of the ONNX file differs from the model by "
                    f"{found.max_abs:.3g} ({found.max_rel:.2%} of its peak) on input {number}; allowed {atol:g} + "
                    f"{rtol:g} of the peak"
                )
            worst = Parity(max(worst.max_abs, found.max_abs), max(worst.max_rel, found.max_rel))
    return worst


def _difference(wanted: np.ndarray, got: np.ndarray) -> Parity:
    if wanted.shape != got.shape or not (np.isfinite(wanted).all() and np.isfinite(got).all()):
        return Parity(math.inf, math.inf)
    gap = float(np.abs(wanted.astype(np.float64) - got).max(initial=0))
    peak = float(np.abs(wanted).max(initial=0))
    return Parity(gap, gap / peak if peak else (0.0 if gap == 0 else math.inf))


def _session(path: Path) -> _Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # below errors it tells about its own optimizer
    failures: tuple[type[Exception], ...] = (*onnx_files.runtime_errors(), ValueError)

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(None, dict(feed))
        except failures as error:
            raise errors.RuntimeFailed(f"{path}: ONNX Runtime: {first_line(error)}") from error

    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise errors.RuntimeFailed(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error
    return run


def _reference(stage: Stage) -> _Runner:
    if stage.module is None:
        return _session(Path(str(stage.onnx)))
    import torch

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        device = next((p.device for p in stage.module.parameters()), torch.device("cpu"))
        with evaluating(stage.module), torch.no_grad():
            out = stage.module(*(torch.from_numpy(np.ascontiguousarray(feed[s.name])).to(device) for s in stage.inputs))
        values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else (out,)
        return [value.cpu().numpy() for value in values]

    return run


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode again outside. Programs from torch.export have no mode to set."""
    modes = [(part, part.training) for part in module.modules()]
    if any(training for _, training in modes):
        try:
            module.eval()
        except NotImplementedError:  # a loaded .pt2: its mode was fixed when it was made, only the flags are wrong
            for part, _ in modes:
                part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def first_line(error: BaseException) -> str:
    """Type and first line of an exception's cause, without terminal colours."""
    cause = error.__cause__ or error
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip()
    return f"{type(cause).__name__}: {text.splitlines()[0] if text else ''}"
