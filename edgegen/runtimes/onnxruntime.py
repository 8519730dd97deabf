"""ONNX Runtime on the CPU: FP32, FP16, INT8 by Q/DQ with unsigned (u8s8) or symmetric signed (s8s8) activations, INT8
with weights stored in 4 bits, and FP32 with the weights of matrix products in INT8 or INT4."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgegen import errors, files, onnx_cost, onnx_exact, onnx_files, onnx_fp16, onnx_qdq
from edgegen.runtimes import _common, _weights_only
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target

NAME = "onnxruntime"
_INT8 = (PrecisionPlan("int8", "u8s8"), PrecisionPlan("int8", "s8s8"))
_PLANS = (PrecisionPlan("fp32"), PrecisionPlan("fp16"), *_INT8)
_FP16_FLAGS = frozenset(("asimdhp", "fphp"))  # Arm's FP16 arithmetic; on x86 its FP16 files run in FP32, between casts
_FOUR_BITS = tuple(dataclasses.replace(plan, weights="int4") for plan in _INT8)
_NARROW = (PrecisionPlan("fp32", weights="int8"), PrecisionPlan("fp32", weights="int4"))
_KNOWN = (*_PLANS, *_FOUR_BITS, *_NARROW)
_BITS: dict[int, int] = {onnx.TensorProto.INT8: 8, onnx.TensorProto.INT4: 4}  # of stored integer weights
_INT8_KERNELS = frozenset(("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"))

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def missing() -> str | None:
    """Why this machine cannot build or run with ONNX Runtime, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'edgegen[onnxruntime]'"
    return _rivals()


@cache
def _rivals() -> str | None:
    """Two distributions that install the module overwrite each other; what they compute together is nobody's."""
    there = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))
    if len(there) < 2:
        return None
    return f"{' and '.join(there)} both install the module onnxruntime; keep one: pip uninstall {' '.join(there[:-1])}"


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """FP32, FP16 and the two INT8 formats, as far as the target's precisions go.

    FP16 on this host only where its processor computes in it: elsewhere such a file is half as large, and slower.
    """
    idle = target.is_host and not cpu_flags & _FP16_FLAGS
    offered = (plan for plan in _common.allowed(_PLANS, target) if not (idle and plan.precision == "fp16"))
    return _common.exact_sums(offered, target, cpu_flags)


def weights_only(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """Plans that narrow weights alone: built when a recipe asks for them, as they need matrix products to be of use."""
    return _common.allowed(_NARROW, target)


def int8_from_int4(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """INT8 plans whose weights are stored in 4 bits; built when a recipe asks for them, as they lose more quality."""
    return _common.exact_sums(_common.allowed(_FOUR_BITS, target), target, cpu_flags)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operations without a CPU kernel, one problem at a time: ONNX Runtime names only the first it meets."""
    try:
        _session(graph.onnx, _options(1), PrecisionPlan())
    except onnx_files.runtime_errors() as error:
        text = str(error).splitlines()[0]
        op = re.search(r"([\w.:]+)\(-?\d+\)", text)
        layer = re.search(r"node(?: with name |:)'([^']*)'", text)
        rewrite = f"rewrite it with standard ONNX operations ({text})"
        return [Problem(op.group(1) if op else "graph", layer.group(1) if layer else "", rewrite)]
    return []


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.onnx in it, whole or not at all, as `graph.plan` says.

    Args:
        graph: float32 ONNX with static shapes.
        out: folder to make; one that exists is replaced.
        calibration: folder with one `<input name>.npy` an input, first axis the samples; only INT8 needs it.
    Raises:
        errors.UsageError: a plan that ONNX Runtime does not have, an unknown layer, no calibration data.
        errors.DataError: unusable calibration data.
        errors.RuntimeFailed: ONNX Runtime fails, or the precision read back is not the promised one.
    """
    plan, count = graph.plan, _common.threads(target)
    _common.check_plan(NAME, plan, (*_KNOWN, *map(_common.seven_bits, _KNOWN)), calibration)
    settings = {"threads": count, "execution": "sequential", "graph_optimization": "all"}
    if plan.precision == "int8":
        settings["disabled_optimizers"] = list(onnx_exact.DISABLED)
    promised = 0.0
    with files.whole(out) as folder:
        folder.mkdir()
        try:
            if plan.precision == "int8" and calibration is not None:
                onnx_qdq.insert_qdq(graph, folder / "model.onnx", calibration=calibration, plan=plan, threads=count)
                # Signed activations are for other engines (TensorRT, Arm): on x86 ONNX Runtime runs many such layers
                # in float, and forced to integers (session.qdqisint8allowed) takes twice as long. Told, not refused.
                promised = _promised(graph, plan) if plan.format.startswith("u8") else 0.0
            elif plan.precision == "fp16":
                onnx_fp16.to_fp16(graph, folder / "model.onnx", calibration=calibration)
            elif plan.weights:
                source = onnx.load(graph.onnx)
                onnx_qdq.check_layers(source, plan)
                onnx_files.write(_weights_only.compress(source, plan), folder / "model.onnx")
            else:
                onnx_files.write(onnx.load(graph.onnx), folder / "model.onnx")
            built = _common.artifact(NAME, folder / "model.onnx", graph, plan, settings, ("onnxruntime",))
            _common.check_promise(built, inspect(built), promised)
        except onnx_files.runtime_errors() as error:
            raise errors.RuntimeFailed(f"{NAME} {plan.label}: {str(error).splitlines()[0]}") from error
    return _common.artifact(NAME, out / "model.onnx", graph, plan, built.options, ("onnxruntime",))


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs: numpy in, numpy out, synchronous, sequential execution, all optimisations.

    Raises:
        errors.RuntimeFailed: the file cannot be loaded, or a run fails.
    """
    failures: tuple[type[Exception], ...] = (*onnx_files.runtime_errors(), ValueError)
    try:
        session = _session(artifact.path, _options(int(artifact.options["threads"])), artifact.plan)
    except failures as error:
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {str(error).splitlines()[0]}") from error
    names = [spec.name for spec in artifact.outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, feeds)))
        except failures as error:
            raise errors.RuntimeFailed(f"{artifact.label}: {str(error).splitlines()[0]}") from error

    yield run


def inspect(artifact: Artifact) -> Inspection:
    """Precision of each weighted layer in the graph that ONNX Runtime makes of the file, which is what it executes.

    A layer counts as INT8 when an integer kernel runs it, not already when Q/DQ nodes surround it; the share of
    weights is of the file. Where a kernel takes FP32 in place of the FP16 of the file, the layer reads "fp16 weights,
    fp32".
    """
    model = onnx.load(artifact.path)
    if artifact.plan.weights and artifact.plan.precision != "int8":
        return _weights_only.inspect(model)
    with tempfile.TemporaryDirectory() as folder:
        options = _options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(artifact.path, options, artifact.plan)
        executed = onnx.load(Path(folder) / "optimized.onnx").graph
    integer = {_plain(node.name) for node in executed.node if node.op_type in _INT8_KERNELS}
    total = onnx_cost.cost(model)
    macs = sum(layer.macs for layer in total.layers if layer.name in integer)
    consts = onnx_cost.constants(model)
    sizes = {layer.weight: _bytes(consts[layer.weight]) for layer in total.layers if layer.weight}
    stored = sum(size for name, size in sizes.items() if consts[name].data_type in _BITS)
    halves = {tensor.name for tensor in executed.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    native = {_plain(node.name) for node in executed.node if not halves.isdisjoint(node.input)}
    layers = {layer.name: "int8" if layer.name in integer else "fp32" for layer in total.layers}
    for layer in total.layers:
        kind = consts[layer.weight].data_type if layer.weight else 0
        if kind == onnx.TensorProto.INT4:
            layers[layer.name] += " (weights int4)"
        elif kind == onnx.TensorProto.FLOAT16:
            layers[layer.name] = "fp16" if layer.name in native else "fp16 weights, fp32"
    return Inspection(layers, stored / max(1, sum(sizes.values())), macs / max(1, total.macs))


def _plain(name: str) -> str:
    """The name that the file gives a node; ONNX Runtime numbers what it copies."""
    return re.sub(r"_token_\d+$", "", name)


def _bytes(tensor: onnx.TensorProto) -> float:
    """What a constant takes in the file."""
    width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return math.prod(tensor.dims) * _BITS.get(tensor.data_type, width) / 8


def layer_times(artifact: Artifact, feeds: Mapping[str, np.ndarray], iterations: int) -> list[dict[str, Any]]:
    """Milliseconds of each kernel in each run, as ONNX Runtime's profiler tells them; see openvino.layer_times."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options(int(artifact.options["threads"]))
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = _session(artifact.path, options, artifact.plan)
        for _ in range(iterations + 3):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name = _plain(name.removesuffix("_kernel_time"))
        row = {"name": name, "op": event["args"]["op_name"], "kernel": event["args"].get("provider", ""), "ms": []}
        found.setdefault(name, row)["ms"].append(event["dur"] / 1e3)
    return [{**row, "ms": row["ms"][3:]} for row in found.values()]  # the first ones warm up


def _promised(graph: Graph, plan: PrecisionPlan) -> float:
    """Share of the graph's MACs that the plan puts in INT8."""
    model = onnx.load(graph.onnx)
    chosen, total = set(onnx_qdq.quantized_nodes(model, plan)), onnx_cost.cost(model)
    return sum(layer.macs for layer in total.layers if layer.name in chosen) / max(1, total.macs)


def _options(count: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = count, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # below errors it tells about its own optimizer
    return options


def _session(path: Path, options: Any, plan: PrecisionPlan) -> Any:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    disabled = list(onnx_exact.DISABLED) if plan.precision == "int8" else []
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
