"""From a float .tflite file to narrower ones, by ai-edge-quantizer with edgegen's calibration set, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, onnx_qdq
from edgegen.runtimes import _litert_file, _litert_run
from edgegen.runtimes._litert_convert import Converted, weighted
from edgegen.types import Graph


def half(source: Converted) -> bytes:
    """Weights stored as FP16, arithmetic as the device does it.

    Raises:
        errors.RuntimeFailed: a weight is too large for FP16.
    """
    for tensor in _litert_file.weights(source.content):
        if float(np.abs(tensor.data).max(initial=0)) > float(np.finfo(np.float16).max):
            raise errors.RuntimeFailed(f"litert fp16: weights of {tensor.name} exceed {np.finfo(np.float16).max:.0f}")
    with _litert_run.quiet():
        from ai_edge_quantizer import qtyping, quantizer

        settings = qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        tool = quantizer.Quantizer(bytearray(source.content))
        for kind in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE"):
            tool.update_quantization_recipe(".*", qtyping.TFLOperationName(kind), settings, "float_casting")
        return bytes(tool.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


def weights_only(source: Converted) -> bytes:
    """Weights stored as INT8 with a scale for each output channel, arithmetic in float."""
    with _litert_run.quiet():
        from ai_edge_quantizer import qtyping, quantizer

        tool = quantizer.Quantizer(bytearray(source.content))
        for kind in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE"):
            tool.add_weight_only_config(".*", qtyping.TFLOperationName(kind), 8)
        _keep_float(tool, [re.escape(_litert_file.FLOAT)])
        return bytes(tool.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


def static(source: Converted, graph: Graph, calibration: Path, threads: int) -> bytes:
    """Weights and activations INT8; inputs and outputs stay float.

    Raises:
        errors.DataError: unusable calibration data.
        errors.Unsupported: the plan leaves nothing to quantize.
    """
    kinds = weighted(graph)
    kept = {name for name, kind in kinds.items() if name in graph.plan.float_layers or kind in graph.plan.float_types}
    chosen = _litert_file.quantizable(source.content, source.layers, kept)
    if not chosen:
        raise errors.Unsupported(f"litert: cannot build {graph.plan.label}: the plan leaves no layer to quantize")
    ranges = _ranges(source, graph, calibration, threads)
    with _litert_run.quiet():
        from ai_edge_quantizer import qtyping, quantizer

        tool = quantizer.Quantizer(bytearray(source.content))
        for kind in sorted({kind for _, kind in chosen}):
            tool.add_static_config(".*", qtyping.TFLOperationName(kind), 8, 8)
        names = {name for name, _ in chosen}
        _keep_float(tool, [f"^{re.escape(s)};?$" for s in _litert_file.scopes(source.content) if s not in names])
        found = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        return bytes(found.quantized_model)


def promised(source: Converted, graph: Graph) -> float:
    """Share of MACs in layers that the plan puts in INT8."""
    plan, kinds = graph.plan, weighted(graph)
    found = _litert_file.precisions(source.content)
    chosen = [
        name
        for name, layer in source.layers.items()
        if layer not in plan.float_layers and kinds.get(layer) not in plan.float_types
    ]
    return sum(found.macs[name] for name in chosen) / max(1, sum(found.macs.values()))


def check_inputs(graph: Graph, calibration: Path) -> None:
    """Refuse what cannot be used before the conversion, which takes seconds.

    Raises:
        errors.UsageError, errors.DataError: an unknown layer; unusable calibration data.
    """
    import onnx

    onnx_qdq.check_layers(onnx.load(graph.onnx, load_external_data=False), graph.plan)
    next(onnx_qdq.calibration_feeds(graph.inputs, calibration))


def _keep_float(tool: Any, patterns: Iterable[str]) -> None:
    from ai_edge_quantizer import algorithm_manager, qtyping

    none, every = algorithm_manager.AlgorithmName.NO_QUANTIZE, qtyping.TFLOperationName.ALL_SUPPORTED
    for pattern in patterns:
        tool.update_quantization_recipe(pattern, every, algorithm_key=none)


def _ranges(source: Converted, graph: Graph, calibration: Path, threads: int) -> dict[str, dict[str, np.ndarray]]:
    """Smallest and largest value of every activation, one sample in memory at a time.

    `ranges` of the plan: "minmax" over all samples, "mean" of each sample's extremes. (ai-edge-quantizer's own
    calibration takes a moving average and holds the whole set in memory.)
    """
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    count, mean = 0, graph.plan.ranges == "mean"
    interpreter = _litert_run.open_interpreter(source.content, threads, keep_all=True)
    wanted = _litert_file.activations(source.content)
    for feed in onnx_qdq.calibration_feeds(graph.inputs, calibration):
        _litert_run.invoke(interpreter, [feed[spec.name] for spec in graph.inputs], source.layouts)
        count += 1
        for index, name in wanted:
            value = interpreter.get_tensor(index)
            least, most = float(value.min()), float(value.max())
            if not np.isfinite((least, most)).all():
                raise errors.RuntimeFailed(f"{graph.stage}: tensor {name!r} is not finite on a calibration sample")
            if mean:
                low[name], high[name] = low.get(name, 0.0) + least, high.get(name, 0.0) + most
            else:
                low[name], high[name] = min(low.get(name, np.inf), least), max(high.get(name, -np.inf), most)
    scale = 1 / count if mean else 1.0
    ends = (("min", low), ("max", high))
    return {name: {end: np.asarray(found[name] * scale, np.float32) for end, found in ends} for name in low}
