"""The steps of a Core ML build: convert, compare, compress, save, read back, write the twin."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, onnx_qdq
from edgegen.runtimes import _common, _coreml_convert, _coreml_layers, _coreml_read, _coreml_twin, _coreml_weights
from edgegen.runtimes._coreml_files import PACKAGE, TWIN_FILE, digest
from edgegen.types import Artifact, Graph, PrecisionPlan, Target

# Largest difference between the converted program and the ONNX graph on one sample, as a fraction of the output's
# peak: both compute in FP32, so what differs is FP16 rounding of the weights (2^-11 of each) through the layers.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
FP16_MAX = 65504.0


def build(graph: Graph, folder: Path, *, calibration: Path | None, target: Target) -> dict[str, Any]:
    """Write model.mlpackage and twin.onnx into `folder`; the artifact's options."""
    plan, os = graph.plan, _coreml_convert.minimum_os(target)
    image = _coreml_convert.pixel_plan(graph)
    source = _coreml_convert.exported(graph)
    layers = _coreml_layers.layer_names(source)
    _coreml_layers.kept_operations(graph, source)
    model = float_model(graph, os)
    with tempfile.TemporaryDirectory() as scratch, _coreml_convert.quiet():
        sample = _sample_folder(graph, calibration, Path(scratch))
        twin = _save(model, graph, image, Path(scratch) if plan.quantized else folder, layers)
        peak = check_numbers(graph, twin, sample)
        if plan.precision == "int8" and calibration is not None:
            seen = recorded(graph, twin, calibration)
            model = _coreml_weights.with_integer_activations(model, plan, seen, layers)
        if plan.quantized:
            model = _coreml_weights.narrowed(model, plan, os, layers)
            twin = _save(model, graph, image, folder, layers)
        error = difference(graph, twin, sample)
        found = _coreml_read.contents(folder / PACKAGE)
    promise(graph, found, plan)
    return {
        "minimum_os": f"iOS {os}",
        "input": image or {"kind": "tensor"},
        "read_back": {
            "specification_version": found.specification,
            "operators": dict(sorted(found.operators.items())),
            "bytes_by_type": dict(sorted(found.bytes.items())),
        },
        "largest_activation": peak,
        "difference_to_float": error,
    }


def float_model(graph: Graph, os: int) -> Any:
    """The converted model before any compression; the last one is kept, since `supports` comes just before `build`."""
    plan = graph.plan
    if plan.precision == "fp16":
        bare = PrecisionPlan("fp16", float_layers=plan.float_layers, float_types=plan.float_types)
    else:
        bare = PrecisionPlan("fp16" if plan.precision == "int8" else plan.precision)
    if graph.program is None:
        raise errors.UsageError(f"{graph.stage}: Core ML needs the torch program: give the model as a torch network")
    return _converted(dataclasses.replace(graph, plan=bare), os, graph.program.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _converted(graph: Graph, os: int, _changed: int) -> Any:
    return _coreml_convert.convert(graph, os, _coreml_convert.pixel_plan(graph))


def _save(model: Any, graph: Graph, image: Mapping[str, Any] | None, folder: Path, layers: Mapping[str, str]) -> Path:
    """Save the package, read it back, write its twin beside it; path of the twin."""
    package = folder / PACKAGE
    _coreml_convert.save(model, package, layers)
    _, read = _coreml_read.read_program(package)
    made = _coreml_twin.translate(read, graph.inputs, graph.outputs, image["pixels"] if image else None)
    _coreml_twin.write(made, folder / TWIN_FILE, digest(package))
    return folder / TWIN_FILE


def promise(graph: Graph, found: _coreml_read.Contents, plan: PrecisionPlan) -> None:
    """Refuse what is not stored or computed as the plan says.

    Raises:
        errors.RuntimeFailed: names the first layer that differs, or the share obtained; Unsupported: no layer for INT8.
    """
    _coreml_read.check(found, plan, f"coreml {plan.label}")
    if plan.precision == "int8":
        able = [layer for layer in found.layers if layer.kind in _coreml_weights.INTEGER_LAYERS and layer.elements]
        wanted = [layer for layer in able if not _coreml_read.is_kept(layer.name, plan)]
        if not wanted:
            raise errors.Unsupported(
                f"coreml {plan.label}: {graph.stage} has no layer to compute in int8: Core ML quantizes activations "
                "of convolutions and linear layers only; build fp16 with int8 weights"
            )
        share = sum(x.macs for x in wanted) / max(1, sum(x.macs for x in found.layers))
        label = Artifact("coreml", Path(PACKAGE), (), plan, 0, graph.inputs, graph.outputs)
        _common.check_promise(label, found.inspection, share)


# -------------------------------------------------------------------------------------------------------- numbers


def _sample_folder(graph: Graph, calibration: Path | None, scratch: Path) -> Path:
    """A folder with one sample an input: the first of the calibration set, else seeded random values in range."""
    folder, rng = scratch / "sample", np.random.default_rng(0)
    folder.mkdir()
    if calibration is not None:
        feed = next(onnx_qdq.calibration_feeds(graph.inputs, calibration))
    else:
        shapes = {spec.name: tuple(int(d) for d in spec.shape) for spec in graph.inputs}
        feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for spec in graph.inputs:
            if spec.value_range is not None:
                feed[spec.name] = rng.uniform(*spec.value_range, shapes[spec.name]).astype(np.float32)
    for name, value in feed.items():
        np.save(folder / f"{name}.npy", value, allow_pickle=False)
    return folder


def difference(graph: Graph, twin: Path, sample: Path) -> float:
    """Largest difference of the twin's outputs to the ONNX graph's on a sample, as a fraction of each output's peak.

    Raises:
        errors.RuntimeFailed: an output is not finite.
    """
    feed = {spec.name: np.load(sample / f"{spec.name}.npy", allow_pickle=False) for spec in graph.inputs}
    names = [spec.name for spec in graph.outputs]
    worst = 0.0
    for name, wanted, got in zip(names, _run(graph.onnx, feed, names), _run(twin, feed, names)):
        if not np.isfinite(got).all():
            raise errors.RuntimeFailed(f"coreml {graph.plan.label}: output {name!r} is not finite on a sample")
        peak = float(np.abs(wanted).max()) or 1.0
        worst = max(worst, float(np.abs(wanted - got).max()) / peak)
    return worst


def check_numbers(graph: Graph, twin: Path, sample: Path) -> float:
    """Compare the float conversion with the ONNX graph on a sample; the largest activation seen.

    Raises:
        errors.RuntimeFailed: other numbers, or an activation that FP16 cannot hold (named).
    """
    precision = "fp32" if graph.plan.precision == "fp32" else "fp16"
    error = difference(graph, twin, sample)
    if error > TOLERANCE[precision]:
        raise errors.RuntimeFailed(
            f"coreml: the converted program differs from {graph.stage} by {error:.1%} of the output's peak (allowed "
            f"{TOLERANCE[precision]:.1%}): coremltools converts this network wrongly; export it for another runtime"
        )
    seen = ranges(graph, twin, sample)
    peak, name = max((max(abs(low), abs(high)), name) for name, (low, high) in seen.items())
    if precision == "fp16" and peak > FP16_MAX and not graph.plan.float_layers:
        raise errors.RuntimeFailed(
            f"coreml {graph.plan.label}: {name} reaches {peak:.3g}, FP16 ends at {FP16_MAX:g}; "
            "keep its layer in float, or build fp32"
        )
    return float(peak)


def ranges(graph: Graph, twin: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every float tensor that the program computes, over a calibration folder."""
    model = onnx.shape_inference.infer_shapes(onnx.load(twin))
    infos = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    names = [v.name for v in infos if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    return onnx_qdq.ranges(dataclasses.replace(graph, onnx=twin), folder, names)


def recorded(graph: Graph, twin: Path, calibration: Path) -> dict[str, tuple[float, float]]:
    """The ranges that W8A8 is made from; inputs and outputs of a concatenation share one, as coremltools has it."""
    found = ranges(graph, twin, calibration)
    for node in onnx.load(twin).graph.node:
        if node.op_type == "Concat":
            group = [name for name in (*node.input, *node.output) if name in found]
            low, high = min(found[n][0] for n in group), max(found[n][1] for n in group)
            found |= dict.fromkeys(group, (low, high))
    return found


def _run(file: Path, feed: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, dict(feed)))
