"""From a torch program to a .tflite file: litert-torch converts, ai-edge-quantizer quantizes, both without a word."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, onnx_qdq, program
from edgegen.runtimes import _litert_file
from edgegen.types import Graph, Problem

# The converter ends at these, or the interpreter refuses what it made of them (litert-torch 0.10, ai-edge-litert 2.3).
_REFUSED = {
    "max_unpool2d": "enlarge with nn.Upsample, or PixelShuffle",
    "max_unpool3d": "enlarge with nn.Upsample",
    "col2im": "blocks that do not overlap are a reshape and a permute; others a ConvTranspose2d with fixed weights",
    "topk": "choose outside of the network",
    "sort": "sort outside of the network",
    "argsort": "sort outside of the network",
    "nonzero": "the output's shape depends on values: use torch.where with three arguments",
    "_fft_r2c": "transform outside of the network, or use a convolution with fixed weights",
    "_fft_c2c": "transform outside of the network, or use a convolution with fixed weights",
    "_fft_c2r": "transform outside of the network, or use a convolution with fixed weights",
    "adaptive_max_pool2d": "choose an output size that divides the input's",
    "_upsample_bilinear2d_aa": "resize before the network, or by a factor that gives exactly the output size",
    "_upsample_bicubic2d_aa": "resize before the network, or by a factor that gives exactly the output size",
}
_ANY = "write it with convolutions, matrix products and elementwise functions"


@dataclass(frozen=True)
class Converted:
    """A float32 .tflite file, the layout of each input and output, and its tensors' layers (ONNX names)."""

    content: bytes
    layouts: tuple[str, ...]
    layers: Mapping[str, str]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error: the converter's C++ writes there, below Python's warnings and logs."""
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    level = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        stack.callback(logging.disable, level)
        kept, sink = os.dup(2), stack.enter_context(tempfile.TemporaryFile())
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def problems(graph: Graph) -> list[Problem]:
    """What of the program has no way into a .tflite file, after the rewrites that edgegen knows."""
    if graph.program is None:
        return [Problem("graph", "", "needs the torch program: give the model as a torch network, not as .onnx")]
    with quiet():
        from edgegen.runtimes import _litert_program

        source = program.load(graph.program)
        found = list(_litert_program.refused(source.graph, _REFUSED))
        if not found:
            ready, _ = _decomposed(source, graph)
            found = list(_litert_program.refused(ready.graph, _REFUSED))
            found += list(_unlowered(ready))
    return [Problem(op, layer, _REFUSED.get(op, _ANY)) for op, layer in dict.fromkeys(found)]


def _unlowered(ready: Any) -> Iterator[tuple[str, str]]:
    from litert_torch import fx_infra
    from litert_torch.backend import lowerings

    from edgegen.runtimes import _litert_program

    lowest = fx_infra.safe_run_decompositions(ready, fx_infra.decomp.pre_lower_decomp(), can_skip=False)
    for node in lowest.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema") and lowerings.lookup(node.target) is None:
            yield _litert_program.operation(node), _litert_program.layer(node)


def _decomposed(source: Any, graph: Graph) -> tuple[Any, tuple[str, ...]]:
    """The rewritten program in the operations that the converter lowers."""
    from litert_torch import fx_infra
    from litert_torch._convert import core

    from edgegen.runtimes import _litert_program

    ready, layouts = _litert_program.prepare(source, graph)
    ready = fx_infra.graph_utils.reset_from_node_meta(ready)
    ready = fx_infra.safe_run_decompositions(ready, fx_infra.decomp.pre_convert_decomp(), can_skip=False)
    return core._run_convert_passes(ready), layouts


def convert(graph: Graph) -> Converted:
    """The graph's program as a float32 .tflite file; images lie channels-last in it.

    Raises:
        errors.RuntimeFailed: the converter fails.
    """
    if graph.program is None:
        raise errors.RuntimeFailed(f"litert: {graph.stage} has no torch program")
    with quiet():
        import torch
        from litert_torch._convert import litert_converter, signature

        try:
            ready, layouts = _decomposed(program.load(graph.program), graph)
            named = signature.Signature("serving_default", torch.nn.Identity(), ready.example_inputs[0], {})
            content = litert_converter.exported_programs_to_flatbuffer([ready], [named]).to_bytes()
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
            raise errors.RuntimeFailed(f"litert: cannot convert {graph.stage}: {first_line(error)}") from error
    return Converted(bytes(content), layouts, _litert_file.layers(bytes(content), weighted(graph)))


def weighted(graph: Graph) -> dict[str, str]:
    """Layers with MACs of the ONNX graph: name -> operation type."""
    import onnx

    from edgegen import onnx_cost

    return {layer.name: layer.op for layer in onnx_cost.cost(onnx.load(graph.onnx)).layers}


def first_line(error: Exception) -> str:
    """The telling line, without the paths of the converter's own files."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\S*/site-packages/\S*?: ", "", line)[:300]


# ------------------------------------------------------------------------------------------------------- quantize


def half(source: Converted) -> bytes:
    """Weights stored as FP16, arithmetic as the device does it.

    Raises:
        errors.RuntimeFailed: a weight is too large for FP16.
    """
    for tensor in _litert_file.weights(source.content):
        if float(np.abs(tensor.data).max(initial=0)) > np.finfo(np.float16).max:
            raise errors.RuntimeFailed(f"litert fp16: weights of {tensor.name} exceed {np.finfo(np.float16).max:.0f}")
    with quiet():
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
    with quiet():
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
        errors.RuntimeFailed: the plan leaves nothing to quantize.
    """
    kinds = weighted(graph)
    kept = {name for name, kind in kinds.items() if name in graph.plan.float_layers or kind in graph.plan.float_types}
    chosen = _litert_file.quantizable(source.content, source.layers, kept)
    if not chosen:
        raise errors.RuntimeFailed(f"litert: cannot build {graph.plan.label}: the plan leaves no layer to quantize")
    ranges = _ranges(source, graph, calibration, threads)
    with quiet():
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
    interpreter = open_interpreter(source.content, threads, keep_all=True)
    wanted = _litert_file.activations(source.content)
    for feed in onnx_qdq.calibration_feeds(graph.inputs, calibration):
        invoke(interpreter, [feed[spec.name] for spec in graph.inputs], source.layouts)
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
    return {name: {"min": np.float32(low[name] * scale), "max": np.float32(high[name] * scale)} for name in low}


# ------------------------------------------------------------------------------------------------------------ run


def open_interpreter(content: bytes | Path, threads: int, *, keep_all: bool = False) -> Any:
    """An interpreter on the CPU with XNNPACK.

    Raises:
        ValueError, RuntimeError: the file is damaged, or holds an operation that the interpreter does not know.
    """
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        given = {"model_path": str(content)} if isinstance(content, Path) else {"model_content": content}
        interpreter = Interpreter(**given, num_threads=threads, experimental_preserve_all_tensors=keep_all)
        interpreter.allocate_tensors()
    return interpreter


def invoke(interpreter: Any, values: Sequence[np.ndarray], layouts: Sequence[str]) -> list[np.ndarray]:
    """Run on arrays in the graph's layout; outputs are copies in the graph's layout.

    Raises:
        ValueError, RuntimeError: shapes or types do not fit.
    """
    (name,) = interpreter.get_signature_list()
    details = interpreter._get_full_signature_list()[name]
    for index, (value, layout) in enumerate(zip(values, layouts)):
        turned = value.transpose(0, 2, 3, 1) if layout == "NHWC" and value.ndim == 4 else value
        interpreter.set_tensor(details["inputs"][f"args_{index}"], np.ascontiguousarray(turned))
    interpreter.invoke()
    found = []
    for index, layout in enumerate(layouts[len(values) :]):
        value = interpreter.get_tensor(details["outputs"][f"output_{index}"])
        found.append(np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if layout == "NHWC" else value)
    return found


def reference(graph: Graph, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the torch program says to the same arrays."""
    import torch

    with quiet(), torch.no_grad():
        found = program.load(graph.program).module()(*[torch.from_numpy(value) for value in values])
    return [value.numpy() for value in (found if isinstance(found, tuple | list) else (found,))]
