"""OpenVINO on the CPU: FP32, BF16 (where the processor has it), FP16 weights, and INT8 by NNCF."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from edgegen import errors, files, onnx_cost, onnx_files, onnx_qdq
from edgegen.runtimes import _common, _ir, _ov_narrow
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target

NAME = "openvino"
_BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
_PLANS = (
    PrecisionPlan("fp32"),
    PrecisionPlan("bf16"),
    PrecisionPlan("fp16"),
    PrecisionPlan("int8", rest="bf16", ranges="mean"),
    PrecisionPlan("int8", rest="bf16", ranges="minmax"),
    PrecisionPlan("int8", rest="fp32", ranges="mean"),
    PrecisionPlan("int8", rest="fp32", ranges="minmax"),
)
_FOUR_BITS = tuple(dataclasses.replace(plan, weights="int4") for plan in _PLANS if plan.precision == "int8")
_NARROW = tuple(
    PrecisionPlan(precision, weights=weights) for precision in ("bf16", "fp32") for weights in ("int8", "int4")
)
_KNOWN = (*_PLANS, *_FOUR_BITS, *_NARROW)
_GROUP = 32  # weights of a row that share an INT4 scale
# NNCF would quantize what goes into a normalisation. One scale for all channels is coarse there, and the normalisation
# then enlarges the error of the quiet channels. style-mosaic, to its own FP32 output: 23.7 dB with it, 31.6 dB without,
# and 32.3 dB when sums of normalised tensors are left alone too, which no INT8 convolution could absorb anyway; the
# build without these is the faster one as well (0.40 of BF16 against 0.61).
_NORMALISATION, _SUMS = "MVN", "Add"
# With these NNCF's own advice is asymmetric activations ("mixed"); after ReLU symmetric ones lose nothing.
_TWO_SIDED = frozenset(
    ("Sigmoid", "HardSigmoid", "HardSwish", "Erf", "Gelu", "LeakyRelu", "PRelu", "Elu", "Selu", "Mish")
)

_STORED = {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def missing() -> str | None:
    """Why this machine cannot build or run with OpenVINO, or None."""
    absent = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'edgegen[openvino]'" if absent else None


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """What can be built, as far as the target's precisions go.

    BF16 only where the processor computes in it, and there as the rest of INT8 builds too: FP32 was never the faster.
    """
    return _common.exact_sums(_offered(_PLANS, target, cpu_flags), target, cpu_flags)


def int8_from_int4(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """INT8 plans whose weights are stored in 4 bits; built when a recipe asks for them, as they lose more quality."""
    return _common.exact_sums(_offered(_FOUR_BITS, target, cpu_flags), target, cpu_flags)


def _offered(plans: Iterable[PrecisionPlan], target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    native = bool(_BF16_FLAGS & cpu_flags)
    avoided = ("int8", "fp32") if native else ("int8", "bf16")
    offered = (p for p in plans if (p.precision, p.rest) != avoided and (native or p.precision != "bf16"))
    return _common.allowed(offered, target)


def weights_only(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """Plans that narrow weights alone; BF16 arithmetic where the processor has it, else FP32."""
    arithmetic = "bf16" if _BF16_FLAGS & cpu_flags and "bf16" in target.precisions else "fp32"
    return _common.allowed((plan for plan in _NARROW if plan.precision == arithmetic), target)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operations that OpenVINO cannot convert, or that its CPU plugin does not run."""
    try:
        model = _ir.convert(graph.onnx)
    except _errors("") as error:
        ops = re.findall(r"No conversion rule found for operations: ([^\n]*)", str(error)) or ["graph"]
        return [Problem(op.strip(), "", "rewrite it with standard ONNX operations") for op in ops[0].split(",")]
    able = _ir.core().query_model(model, "CPU")
    return [
        Problem(op.get_type_name(), op.get_friendly_name(), "rewrite it with standard ONNX operations")
        for op in model.get_ordered_ops()
        if op.get_friendly_name() not in able and op.get_type_name() not in ("Parameter", "Constant", "Result")
    ]


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.xml and model.bin, whole or not at all, as `graph.plan` says.

    An INT8 build with learned ranges and weights in 4 bits is a Q/DQ model.onnx, which OpenVINO reads as well.

    BF16 and FP16 plans store FP16 weights; what FP16 does not hold stays FP32. INT8 stores INT8 weights.

    Args:
        graph: float32 ONNX with static shapes.
        out: folder to make; one that exists is replaced.
        calibration: folder with one `<input name>.npy` an input, first axis the samples; only INT8 needs it.
    Raises:
        errors.UsageError: a plan that OpenVINO does not have, an unknown layer, no calibration data.
        errors.DataError: unusable calibration data.
        errors.RuntimeFailed: OpenVINO or NNCF fails, or the precision read back is not the promised one.
    """
    plan = graph.plan
    _common.check_plan(NAME, plan, (*_KNOWN, *map(_common.seven_bits, _KNOWN)), calibration)
    small = "bf16" in (plan.precision, plan.rest if plan.precision == "int8" else "") or plan.precision == "fp16"
    options = {"threads": _common.threads(target), "performance_hint": "LATENCY", "inference_precision": _hint(plan)}
    packages = ("openvino", "nncf") if plan.quantized else ("openvino",)
    with files.whole(out) as folder:
        folder.mkdir()
        try:
            promised, file = 0.0, folder / "model.xml"
            if plan.precision == "int8" and calibration is not None:
                source = onnx.load(graph.onnx)
                promised = _promised(source, plan)
                if plan.scales and plan.weights:  # not in OpenVINO's own format: a fifth of it would be XML (taef2)
                    file = folder / "model.onnx"
                    _insert_qdq(graph, file, plan, calibration)
                else:
                    _ir.save(_integer(source, graph, plan, calibration, folder), file, graph.onnx, halve=small)
            else:
                model = _ir.convert(graph.onnx)
                model = _narrowed(model, onnx.load(graph.onnx), plan) if plan.weights else model
                _ir.save(model, file, graph.onnx, halve=small)
            built = _common.artifact(NAME, file, graph, plan, options, packages)
            _common.check_promise(built, inspect(built), promised)
        except _errors("int8" if plan.quantized else "") as error:
            raise errors.RuntimeFailed(f"{NAME} {plan.label}: {_line(error)}") from error
    return _common.artifact(NAME, out / file.name, graph, plan, options, packages)


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs: numpy in, numpy out, synchronous, latency hint. Outputs are copies.

    Raises:
        errors.RuntimeFailed: the file cannot be compiled, or a run fails.
    """
    try:
        compiled = _compiled(artifact)
        request = compiled.create_infer_request()
        ports = {spec.name: compiled.output(spec.name) for spec in artifact.outputs}
    except RuntimeError as error:
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {_line(error)}") from error

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = request.infer(feeds, share_inputs=True, share_outputs=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise errors.RuntimeFailed(f"{artifact.label}: {_line(error)}") from error
        return {name: found[port] for name, port in ports.items()}

    yield run


def inspect(artifact: Artifact) -> Inspection:
    """Precision that each weighted layer executes in, read from the compiled model; weights are those of the file.

    With FP16 weights and FP32 arithmetic a layer reads "fp16 weights, fp32".
    """
    layers = _ir.weighted_layers(_ir.read(artifact.path))
    executed = _ir.executed(_compiled(artifact))
    got = {}
    for layer in layers:
        precision = next((executed[name] for name in (layer.name, *layer.aliases) if name in executed), "unknown")
        halved = layer.weight_type == "f16" and precision == "fp32"
        got[layer.name] = f"fp16 weights, {precision}" if halved else precision
        if artifact.plan.weights and _STORED.get(layer.weight_type, precision) != precision:
            got[layer.name] = f"{precision} (weights {_STORED[layer.weight_type]})"
    total, stored = sum(layer.macs for layer in layers), sum(layer.weight_bytes for layer in layers)
    macs = sum(layer.macs for layer in layers if got[layer.name].startswith("int8"))
    small = sum(layer.weight_bytes for layer in layers if layer.weight_type in _STORED)
    return Inspection(got, small / max(1, stored), macs / max(1, total))


def layer_times(artifact: Artifact, feeds: Mapping[str, np.ndarray], iterations: int) -> list[dict[str, Any]]:
    """Milliseconds of each kernel in each run, as OpenVINO counts them: {"name", "op", "kernel", "ms": samples}.

    `name` is the first weighted layer that went into the kernel, else the kernel's own. Counting itself costs time, so
    the sum is no latency.
    """
    compiled = _compiled(artifact, {"PERF_COUNT": True})
    weighted: dict[str, str] = {}
    for layer in _ir.weighted_layers(_ir.read(artifact.path)):
        weighted |= dict.fromkeys((layer.name, *layer.aliases), layer.name)
    made_of = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        names = operation.get_rt_info()["originalLayersNames"].astype(str).split(",")
        made_of[operation.get_friendly_name()] = next((weighted[name] for name in names if name in weighted), "")
    request = compiled.create_infer_request()
    found: dict[str, dict[str, Any]] = {}
    for turn in range(iterations + 3):
        request.infer(feeds)
        for told in request.get_profiling_info() if turn >= 3 else ():  # the first ones warm up
            if told.status == told.Status.EXECUTED:
                name = made_of.get(told.node_name) or told.node_name
                row = {"name": name, "op": told.node_type, "kernel": told.exec_type, "ms": []}
                found.setdefault(told.node_name, row)["ms"].append(told.real_time.total_seconds() * 1e3)
    return list(found.values())


def _hint(plan: PrecisionPlan) -> str:
    """What is not quantized runs in this; FP16 is only a way to store weights on a CPU."""
    rest = plan.rest if plan.precision == "int8" else plan.precision
    return "bf16" if rest == "bf16" else "f32"


def _promised(source: onnx.ModelProto, plan: PrecisionPlan) -> float:
    """Share of MACs in layers with constant weights that the plan does not keep in float."""
    layers = onnx_cost.cost(source).layers
    total = sum(layer.macs for layer in layers)
    kept = (*plan.float_layers, *(layer.name for layer in layers if layer.op in plan.float_types))
    return sum(layer.macs for layer in layers if layer.weight and layer.name not in kept) / max(1, total)


def _narrowed(model: Any, source: onnx.ModelProto, plan: PrecisionPlan) -> Any:
    """NNCF's weight compression: INT8 symmetric by row (convolutions too), or INT4 in groups (matrix products alone).

    NNCF leaves INT4 layers whose depth the group does not divide in INT8, and all convolutions.
    """
    onnx_qdq.check_layers(source, plan)
    nodes = {node.name for node in source.graph.node if node.op_type in plan.float_types} | set(plan.float_layers)
    with _ir.quiet():
        import nncf

        mode = nncf.CompressWeightsMode.INT4_SYM if plan.weights == "int4" else nncf.CompressWeightsMode.INT8_SYM
        more: dict[str, Any] = {"group_size": _GROUP, "all_layers": True} if plan.weights == "int4" else {}
        ignored = nncf.IgnoredScope(names=_ir.operations(model, nodes), validate=False)
        return nncf.compress_weights(model, mode=mode, ignored_scope=ignored, **more)


def _integer(source: onnx.ModelProto, graph: Graph, plan: PrecisionPlan, calibration: Path, folder: Path) -> Any:
    """The INT8 model: by learned ranges of the plan, else NNCF's."""
    file = folder / "source.onnx"
    try:
        if plan.scales:
            _insert_qdq(graph, file, plan, calibration)
            return _ir.keep_reduced(_ir.convert(file))
        if not plan.weights:
            model = _quantized(_ir.convert(graph.onnx), source, graph, plan, calibration)
            if plan.format == "u8s7":
                _ov_narrow.store(model, _ov_narrow.seven_bits(source, plan), "i8")
            return model
        four_bits = _ov_narrow.snap(source, plan)
        onnx_files.write(source, file)
        model = _quantized(_ir.convert(file), source, graph, plan, calibration)
    finally:
        file.unlink(missing_ok=True)
    _ov_narrow.store(model, four_bits)
    return model


def _insert_qdq(graph: Graph, out: Path, plan: PrecisionPlan, calibration: Path) -> None:
    """Learned ranges as standard Q/DQ in an ONNX file, which OpenVINO reads."""
    chosen = dataclasses.replace(plan, format=plan.format or "u8s8")
    onnx_qdq.insert_qdq(graph, out, calibration=calibration, plan=chosen, placement="openvino")


def _quantized(model: Any, source: onnx.ModelProto, graph: Graph, plan: PrecisionPlan, calibration: Path) -> Any:
    """NNCF's post-training INT8 with fast bias correction; samples are streamed."""
    onnx_qdq.check_layers(source, plan)
    kinds = {node.op_type for node in source.graph.node}
    nodes = {node.name for node in source.graph.node if node.op_type in plan.float_types} | set(plan.float_layers)
    with _ir.quiet():
        import nncf

        transformer = "Softmax" in kinds
        estimator = nncf.quantization.range_estimator.RangeEstimatorParametersSet
        ranges = estimator.MINMAX if plan.ranges == "minmax" else None  # None: the mean of each sample's extremes
        return nncf.quantize(
            _ir.keep_reduced(model),
            nncf.Dataset(_Samples(graph, calibration)),
            subset_size=max(1, sum(1 for _ in onnx_qdq.calibration_feeds(graph.inputs, calibration))),
            preset=nncf.QuantizationPreset.MIXED if kinds & _TWO_SIDED and not transformer else None,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(
                names=_ir.operations(model, nodes),
                types=[_NORMALISATION, _SUMS] if "InstanceNormalization" in kinds else [_NORMALISATION],
                validate=False,
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=ranges,
                overflow_fix=nncf.OverflowFix.ENABLE if plan.format == "u8s7" else None,
            ),
        )


class _Samples:
    """Calibration inputs that can be walked through more than once, as NNCF does."""

    def __init__(self, graph: Graph, calibration: Path):
        self.graph, self.calibration = graph, calibration

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return onnx_qdq.calibration_feeds(self.graph.inputs, self.calibration)


def _compiled(artifact: Artifact, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
    options = artifact.options
    config = {
        "PERFORMANCE_HINT": options["performance_hint"],
        "INFERENCE_NUM_THREADS": int(options["threads"]),
        # side by side: each process would bind its threads to the same first cores
        **({"ENABLE_CPU_PINNING": False} if "streams" in options else {}),
        "INFERENCE_PRECISION_HINT": options["inference_precision"],
        **more,
    }
    model = _ir.read(artifact.path) if artifact.path.suffix == ".onnx" else str(artifact.path)
    return _ir.core().compile_model(model, "CPU", config)


def _errors(precision: str) -> tuple[type[Exception], ...]:
    """What OpenVINO raises, and NNCF (for INT8 alone: its import takes seconds); they have no common base."""
    _ir.openvino()
    modules = [importlib.import_module("openvino.frontend")]
    if precision == "int8":
        with _ir.quiet():
            modules.append(importlib.import_module("nncf.errors"))
    found = (value for module in modules for value in vars(module).values())
    return (RuntimeError, *(v for v in found if isinstance(v, type) and issubclass(v, Exception)))


def _line(error: Exception) -> str:
    """The telling line of OpenVINO's many: the last that is not empty."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
