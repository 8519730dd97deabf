"""Core ML packages (.mlpackage) from the torch program: FP16, FP32, weights as INT8 or palettes, W8A8. Runs on Macs.

Elsewhere it is built, read back from disk, and its numbers are those of its twin: the saved program, translated
operation by operation and run in ONNX Runtime (`_coreml_twin`). Timings are a Mac's, an iPhone's or an iPad's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, files
from edgegen.runtimes import _common
from edgegen.runtimes._coreml_files import PACKAGE, TWIN_FILE, digest, digest_of
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Preprocessing, Problem, Target

NAME, TWIN, NEEDS_PROGRAM = "coreml", "onnxruntime", True
PROJECT = "ios"
_PLANS = (
    PrecisionPlan("fp16"),
    PrecisionPlan("fp32"),
    PrecisionPlan("fp16", weights="int8"),
    PrecisionPlan("fp16", weights="palette6"),
    PrecisionPlan("fp16", weights="palette4"),
    PrecisionPlan("int8", rest="fp16"),
)
_INTEGER_SINCE = 17  # quantize and dequantize came with iOS 17

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def project(
    artifact: Artifact,
    model_name: str,
    preprocessing: Preprocessing,
    task: str,
    value_range: tuple[float, float] | None,
) -> dict[str, str]:
    """The Swift package that goes into a bundle: file name -> text."""
    from edgegen.runtimes import _coreml_swift

    return _coreml_swift.files(artifact, model_name, preprocessing, task, value_range)


def cannot_build() -> str | None:
    """Why no package can be made on this machine, or None; a Mac is not needed for that."""
    absent = [name for name in ("coremltools", "torch", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'edgegen[coreml,onnxruntime]'" if absent else None


def missing() -> str | None:
    """Why packages cannot be run on this machine, or None."""
    if sys.platform != "darwin":
        return "Core ML runs on macOS only; built here, numerics checked on its ONNX twin in ONNX Runtime"
    return cannot_build()


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """What the target's precisions and its oldest system allow; W8A8 needs iOS 17 or macOS 14."""
    from edgegen.runtimes._coreml_convert import minimum_os

    old = minimum_os(target) < _INTEGER_SINCE
    return _common.allowed((p for p in _PLANS if not (old and p.precision == "int8")), target)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operations that coremltools cannot convert, or whose numbers cannot be checked here; found by converting.

    What is converted is kept for the `build` that follows.
    """
    from edgegen.runtimes import _coreml_support

    return _coreml_support.problems(graph, target)


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.mlpackage and its twin.onnx, whole or not at all, as `graph.plan` says.

    The package takes an image (0..255, normalised inside) where the graph has `preprocessing` and one image input of
    1 or 3 channels, else tensors. It is read back from disk, and the numbers of the float conversion are compared with
    the ONNX graph's on a calibration sample (a seeded random input where there is none). `size_bytes` is the package's.

    Args:
        graph: with its torch program.
        out: folder to make; one that exists is replaced.
        calibration: folder with one `<input name>.npy` an input; only INT8 (W8A8) needs it.
    Raises:
        errors.UsageError: a plan that Core ML does not have, no torch program, an unknown layer, no calibration data.
        errors.DataError: unusable calibration data.
        errors.RuntimeFailed: the conversion fails or gives other numbers, FP16 overflows, a promise is not kept.
    """
    from edgegen.runtimes import _coreml_build

    plan = graph.plan
    _common.check_plan(NAME, plan, _PLANS, calibration)
    if plan.weights not in {p.weights for p in _PLANS} or (plan.weights and plan.precision != "fp16"):
        raise errors.UsageError(f"coreml cannot build {plan.label}; it can: {', '.join(p.label for p in _PLANS)}")
    if plan not in plans(dataclasses.replace(target, precisions=(plan.precision, plan.rest)), frozenset()):
        _check_age(plan, target)
    with files.whole(out) as folder:
        folder.mkdir()
        options = _coreml_build.build(graph, folder, calibration=calibration, target=target)
        options |= {"threads": _common.threads(target), "twin": TWIN, "package_sha256": digest(folder / PACKAGE)}
    return _artifact(graph, out, options)


def _check_age(plan: PrecisionPlan, target: Target) -> None:
    from edgegen.runtimes._coreml_convert import minimum_os

    if plan.precision == "int8" and (age := minimum_os(target)) < _INTEGER_SINCE:
        raise errors.UsageError(f"coreml {plan.label} needs iOS 17 or macOS 14, {target.name} is iOS {age}")


def _artifact(graph: Graph, out: Path, options: Mapping[str, Any]) -> Artifact:
    """The finished build; the twin belongs to its files, but not to what goes onto the device."""
    made = _common.artifact(NAME, out / PACKAGE, graph, graph.plan, options, ("coremltools", "torch"))
    size = sum(file.stat().st_size for file in made.files if file.name != TWIN_FILE)
    return dataclasses.replace(made, size_bytes=size)


def twin(artifact: Artifact) -> Artifact:
    """The package's program and stored weights as an ONNX Runtime artifact; no Core ML timing."""
    file = artifact.path.parent / TWIN_FILE
    options = {"threads": artifact.options.get("threads", 1)}
    return dataclasses.replace(artifact, runtime=TWIN, path=file, files=(file,), options=options)


@contextlib.contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs; feeds are network inputs, also where the package takes an image.

    On a Mac Core ML runs it on all compute units (pixels are rounded to 8 bits, as an image's are). Elsewhere the twin
    runs, after a check that it was made from this very package; its latency says nothing about a device.

    Raises:
        errors.RuntimeFailed: the package or its twin cannot be loaded, or do not belong together, or a run fails.
    """
    if missing() is None:
        from edgegen.runtimes import _coreml_mac

        with _coreml_mac.load(artifact, "ALL") as run:
            yield run
        return
    from edgegen.runtimes import onnxruntime

    if not (artifact.path / "Manifest.json").is_file():
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {artifact.path.name} is not a Core ML package")
    if digest_of(artifact.path.parent / TWIN_FILE) != digest(artifact.path):
        said = f"{TWIN_FILE} was not made from this {artifact.path.name}; one of them changed"
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {said}")
    with onnxruntime.load(twin(artifact)) as run:
        yield run


def inspect(artifact: Artifact) -> Inspection:
    """Arithmetic and weight storage of each layer, read from the saved package, such as "fp16 (weights palette4)".

    Raises:
        errors.RuntimeFailed: the package is damaged. MissingExtra: coremltools is not installed.
    """
    if importlib.util.find_spec("coremltools") is None:
        raise errors.MissingExtra("coremltools", "to read a Core ML package", "coreml")
    from edgegen.runtimes import _coreml_convert, _coreml_read

    with _coreml_convert.quiet():
        return _coreml_read.contents(artifact.path).inspection


def compute_units(
    artifact: Artifact, feeds: Mapping[str, np.ndarray], *, iterations: int = 50
) -> dict[str, dict[str, Any]]:
    """On a Mac: run on every compute unit; unit -> {"outputs", "load_ms", "first_ms", "samples_ms"} or {"failed"}.

    Raises:
        errors.TargetUnavailable: this is no Mac.
    """
    if (reason := missing()) is not None:
        raise errors.TargetUnavailable(reason)
    from edgegen.runtimes import _coreml_mac

    return {unit: _coreml_mac.measure(artifact, unit, feeds, iterations) for unit in _coreml_mac.UNITS}


def placement(graph: Graph) -> dict[str, Any]:
    """Where Core ML would probably run the graph, by published rules: a prediction, labelled so, never a fact."""
    from edgegen.runtimes import _coreml_placement

    return _coreml_placement.predict(graph)
