"""LiteRT (TensorFlow Lite) for Android: a .tflite file with FP32, FP16 or INT8 weights, or INT8 throughout."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, files
from edgegen.runtimes import _common
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Preprocessing, Problem, Target

PROJECT = "android"
NAME = "litert"
NEEDS_PROGRAM = True
_PLANS = (
    PrecisionPlan("fp32"),
    PrecisionPlan("fp16"),
    PrecisionPlan("fp32", weights="int8"),
    PrecisionPlan("int8", ranges="mean"),
    PrecisionPlan("int8", ranges="minmax"),
)
_PACKAGES = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")
_CLOSE = 1e-3  # largest difference to torch of a float conversion, as a fraction of the output's peak: sums in FP32

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def missing() -> str | None:
    """Why this machine cannot run .tflite files, or None."""
    return _absent("ai_edge_litert")


def project(
    artifact: Artifact,
    model_name: str,
    preprocessing: Preprocessing,
    task: str,
    value_range: tuple[float, float] | None,
) -> dict[str, str]:
    """The Android project that goes into a bundle: file name -> text."""
    from edgegen.runtimes import _litert_kotlin

    return _litert_kotlin.files(artifact, model_name, preprocessing, task, value_range)


def cannot_build() -> str | None:
    """Why this machine cannot build .tflite files, or None."""
    return _absent("litert_torch", "ai_edge_litert", "ai_edge_quantizer")


def _absent(*packages: str) -> str | None:
    absent = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'edgegen[litert]'" if absent else None


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """What can be built, as far as the target's precisions go; weights of INT8 need a target with INT8."""
    offered = _common.allowed(_PLANS, target)
    return tuple(plan for plan in offered if not plan.weights or plan.weights in target.precisions)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operations without a way into a .tflite file, after edgegen's rewrites (see `_litert_cures`)."""
    from edgegen.runtimes import _litert_convert

    return _litert_convert.problems(graph)


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.tflite in it, whole or not at all, as `graph.plan` says.

    The float conversion is run and compared with the torch program before anything is made of it. Images are
    channels-last in the file (`options["layout"]`); `load` takes and gives them as the graph does.

    Args:
        graph: with a torch program.
        out: folder to make; one that exists is replaced.
        calibration: folder with one `<input name>.npy` an input, first axis the samples; only INT8 needs it.
    Raises:
        errors.UsageError: a plan that LiteRT does not have, an unknown layer, no calibration data.
        errors.DataError: unusable calibration data.
        errors.RuntimeFailed: the conversion fails or is wrong, or the precision read back is not the promised one.
    """
    from edgegen.runtimes import _litert_convert, _litert_file, _litert_gpu, _litert_quantize

    plan, count = graph.plan, _common.threads(target)
    _common.check_plan(NAME, plan, _PLANS, calibration)
    if (plan.weights, plan.precision) not in {(p.weights, p.precision) for p in _PLANS}:
        labels = ", ".join(p.label for p in _PLANS)
        raise errors.UsageError(f"{NAME} cannot build {plan.label}; it can build: {labels}")
    if plan.precision == "int8" and calibration is not None:
        _litert_quantize.check_inputs(graph, calibration)
    source = _litert_convert.convert(graph)
    _check_numbers(graph, source, count)
    content = source.content
    if plan.precision == "int8" and calibration is not None:
        content = _litert_quantize.static(source, graph, calibration, count)
    elif plan.weights:
        content = _litert_quantize.weights_only(source)
    elif plan.precision == "fp16":
        content = _litert_quantize.half(source)
    ops = _litert_file.read(content)
    options = {
        "threads": count,
        "delegate": "xnnpack",
        "layout": dict(zip([spec.name for spec in (*graph.inputs, *graph.outputs)], source.layouts)),
        "transposes": _litert_file.transposes(ops),
        "gpu_delegate": _litert_gpu.eligibility(ops),
        "layers": dict(source.layers),
    }
    with files.whole(out) as folder:
        folder.mkdir()
        (folder / "model.tflite").write_bytes(content)
        built = _describe(folder / "model.tflite", graph, options)
        _check_promise(built, _litert_quantize.promised(source, graph) if plan.precision == "int8" else 0.0)
        with load(built):
            pass
    return _describe(out / "model.tflite", graph, options)


def _describe(path: Path, graph: Graph, options: Mapping[str, Any]) -> Artifact:
    made = _common.artifact(NAME, path, graph, graph.plan, options, _PACKAGES)
    return dataclasses.replace(made, versions={**made.versions, NAME: made.versions["ai-edge-litert"]})


def _check_promise(built: Artifact, promised: float) -> None:
    found = inspect(built)
    if built.plan.weights == "int8" and built.plan.precision != "int8":
        if found.int8_weight_share == 0:
            raise errors.RuntimeFailed(f"{built.label}: promised int8 weights, the file has none")
        return
    _common.check_promise(built, found, promised)


def _check_numbers(graph: Graph, source: Any, count: int) -> None:
    """The converted network against the torch program on one random input.

    Raises:
        errors.RuntimeFailed: another shape, or further apart than FP32 explains.
    """
    from edgegen.runtimes import _litert_convert, _litert_run

    random = np.random.default_rng(0)
    values = [random.random([int(d) for d in spec.shape]).astype(spec.dtype) for spec in graph.inputs]
    try:
        got = _litert_run.invoke(
            _litert_run.open_interpreter(source.content, count), values, source.layouts
        )
    except (ValueError, RuntimeError) as error:
        raise errors.RuntimeFailed(
            f"{NAME}: the converted {graph.stage} does not run: {_litert_run.first_line(error)}"
        ) from error
    wanted = _litert_convert.reference(graph, values)
    for spec, right, found in zip(graph.outputs, wanted, got, strict=True):
        if problem := difference(right, found):
            raise errors.RuntimeFailed(f"{NAME}: the converted {graph.stage} is wrong at {spec.name!r}: {problem}")


def difference(wanted: np.ndarray, got: np.ndarray) -> str:
    """In words how `got` is not what torch said; empty: it is, to FP32's rounding."""
    if wanted.shape != got.shape:
        return f"shape {got.shape} instead of {wanted.shape}"
    peak = float(np.abs(wanted).max(initial=0)) or 1.0
    apart = float(np.abs(wanted - got).max(initial=0)) / peak
    return "" if apart <= _CLOSE else f"differs from torch by {apart:.2g} of the peak"


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs: numpy in, numpy out, synchronous, on the CPU with XNNPACK. Outputs are copies.

    Raises:
        errors.RuntimeFailed: the file cannot be loaded, or a run fails.
    """
    from edgegen.runtimes import _litert_run

    try:
        interpreter = _litert_run.open_interpreter(artifact.path, int(artifact.options["threads"]))
    except (ValueError, RuntimeError) as error:
        raise errors.RuntimeFailed(
            f"{artifact.label}: cannot load: {_litert_run.first_line(error)}"
        ) from error
    layout = artifact.options["layout"]
    layouts = [layout[spec.name] for spec in (*artifact.inputs, *artifact.outputs)]
    names = [spec.name for spec in artifact.outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = [feeds[spec.name] for spec in artifact.inputs]
            return dict(zip(names, _litert_run.invoke(interpreter, values, layouts)))
        except (ValueError, RuntimeError, KeyError) as error:
            raise errors.RuntimeFailed(f"{artifact.label}: {_litert_run.first_line(error)}") from error

    yield run


def inspect(artifact: Artifact) -> Inspection:
    """Precision of each weighted layer, and shares of weight bytes and MACs, from the tensor types in the file."""
    from edgegen.runtimes import _litert_file

    found, layer_of = _litert_file.precisions(artifact.path), artifact.options["layers"]
    layers = {layer_of[name]: precision for name, precision in found.precisions.items() if name in layer_of}
    return Inspection(layers, found.int8_weight_share, found.int8_macs_share)
