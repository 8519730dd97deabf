"""ncnn on the CPU, converted by pnnx from ONNX: FP32, and FP16 weights with FP32 arithmetic."""

from __future__ import annotations

import importlib.util
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, files, onnx_files
from edgegen.runtimes import _common, _ncnn_convert, _ncnn_file, _ncnn_prepare, _ncnn_refusals, _outputs
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target, TensorSpec

NAME = "ncnn"
_PLANS = (PrecisionPlan("fp32"), PrecisionPlan("fp16"))
# What a file may differ from its graph, as a share of the output's peak: Winograd convolutions; weights of 11 bits.
# A construct that ncnn computes wrongly is off by tens of percent.
_TOLERANCE = {"fp32": 1e-2, "fp16": 1e-1}

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def missing() -> str | None:
    """Why this machine cannot build or run with ncnn, or None."""
    absent = [name for name in ("ncnn", "pnnx") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'edgegen[ncnn]'" if absent else None


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """FP32, and FP16 as a way to store weights, as far as the target's precisions go."""
    return _common.allowed(_PLANS, target)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operations that pnnx or ncnn do not have or get wrong, and more than one sample a batch; nothing is converted."""
    return _ncnn_refusals.problems(_ncnn_prepare.outline(onnx.load(graph.onnx)), graph)


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.param and model.bin, whole or not at all, as `graph.plan` says.

    The finished network is run once and compared with the graph in ONNX Runtime: a wrong one is not delivered.

    Args:
        graph: float32 ONNX with static shapes and a batch of 1.
        out: folder to make; one that exists is replaced.
        calibration: not needed; its first sample is what the network is checked on, when there is one.
    Raises:
        errors.UsageError: a plan that ncnn does not have.
        errors.RuntimeFailed: pnnx or ncnn fails, leaves an operator unconverted, or computes something else; or the
            precision read back is not the promised one.
    """
    plan = graph.plan
    _common.check_plan(NAME, plan, _PLANS, calibration)
    options = {"threads": _common.threads(target), "fp16_arithmetic": False, "checked_against": "onnxruntime"}
    with files.whole(out) as folder, tempfile.TemporaryDirectory() as scratch:
        folder.mkdir()
        try:
            param, binary = _converted(onnx.load(graph.onnx), Path(scratch))
            _ncnn_convert.name_layers(param, binary, onnx.load(graph.onnx))
            if plan.precision == "fp16":
                _ncnn_file.halve(param, binary)
            for file in (param, binary):
                shutil.copyfile(file, folder / file.name)
            built = _common.artifact(NAME, folder / "model.param", graph, plan, options, ("ncnn", "pnnx"))
            _common.check_promise(built, inspect(built), 0.0)
            with load(built) as run:
                _outputs.check(run, graph, calibration, _TOLERANCE[plan.precision])
        except errors.RuntimeFailed as error:
            raise errors.RuntimeFailed(f"{NAME} {plan.label}: {error}") from error
    return _common.artifact(NAME, out / "model.param", graph, plan, options, ("ncnn", "pnnx"))


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs: numpy in, numpy out, synchronous, FP32 arithmetic. Outputs are copies.

    Raises:
        errors.RuntimeFailed: the file cannot be loaded, or a run fails.
    """
    net = _net(artifact)
    names = [*net.input_names()], [*net.output_names()]
    if [len(side) for side in names] != [len(artifact.inputs), len(artifact.outputs)]:
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: it has inputs {names[0]} and outputs {names[1]}")

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with net.create_extractor() as extractor:
            for name, spec in zip(names[0], artifact.inputs):
                extractor.input(name, _mat(feeds, spec, artifact.label))
            return {
                spec.name: _extracted(extractor, name, spec, artifact.label)
                for name, spec in zip(names[1], artifact.outputs)
            }

    yield run


def inspect(artifact: Artifact) -> Inspection:
    """How each weighted layer stores its weights, read from the .bin file; the arithmetic is FP32 throughout.

    With FP16 weights a layer reads "fp16 weights, fp32". A layer of several weights is told by the widest of them.
    """
    got: dict[str, str] = {}
    total = small = 0
    for weight in _ncnn_file.weights(artifact.path, artifact.path.with_suffix(".bin")):
        if not weight.large:
            continue
        told = weight.storage if weight.storage == "fp32" else f"{weight.storage} weights, fp32"
        got[weight.layer] = "fp32" if got.get(weight.layer) == "fp32" else told
        total += weight.values.nbytes
        small += weight.values.nbytes if weight.storage == "int8" else 0
    return Inspection(got, small / max(1, total), 0.0)


def _converted(model: onnx.ModelProto, scratch: Path) -> tuple[Path, Path]:
    """(model.param, model.bin); a network in which pnnx loses sight of the batch is converted with an axis less."""
    for most in (4, 3):
        onnx_files.write(_ncnn_prepare.prepare(model, most), scratch / "model.onnx")
        made = _ncnn_convert.convert(scratch / "model.onnx", scratch)
        if all(layer.kind != "Tensor.reshape" for layer in _ncnn_convert.unknown_layers(made[0])):
            break
    _ncnn_convert.check_layers(made[0])
    return made


def _net(artifact: Artifact) -> Any:
    """A loaded network. FP16 and BF16 arithmetic are off, so that a file gives the same numbers on every processor."""
    import ncnn

    net = ncnn.Net()
    options = net.opt
    options.num_threads, options.use_vulkan_compute = int(artifact.options["threads"]), False
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
        setattr(options, option, False)
    try:
        _ncnn_file.weights(artifact.path, artifact.path.with_suffix(".bin"))  # ncnn itself crashes on damaged files
    except errors.RuntimeFailed as error:
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {error}") from error
    for load_file, file in ((net.load_param, artifact.path), (net.load_model, artifact.path.with_suffix(".bin"))):
        if load_file(str(file)) != 0:
            raise errors.RuntimeFailed(f"{artifact.label}: cannot load: ncnn refuses {file.name}")
    return net


def _mat(feeds: Mapping[str, np.ndarray], spec: TensorSpec, label: str) -> Any:
    import ncnn

    given = feeds.get(spec.name)
    if given is None or given.shape != tuple(spec.shape):
        got = "none" if given is None else given.shape
        raise errors.RuntimeFailed(f"{label}: input {spec.name!r} must have shape {spec.shape}, got {got}")
    return ncnn.Mat(np.ascontiguousarray(given[0], dtype=np.float32)).clone()


def _extracted(extractor: Any, name: str, spec: TensorSpec, label: str) -> np.ndarray:
    """An output with its batch axis back."""
    code, mat = extractor.extract(name)
    if code != 0:
        raise errors.RuntimeFailed(f"{label}: ncnn fails with {code} on output {spec.name!r}")
    found, shape = np.array(mat), _outputs.fixed(spec)
    if found.size != math.prod(shape):
        raise errors.RuntimeFailed(f"{label}: output {spec.name!r} has shape {found.shape}, expected {spec.shape}")
    return found.reshape(shape)
