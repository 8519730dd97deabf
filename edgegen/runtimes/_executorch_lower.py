"""From a torch program to the bytes of a .pte: rewrites, pt2e quantization, lowering to a delegate.

Jacob et al., 2018, arXiv:1712.05877, as XNNPACK has it: weights INT8 symmetric with a scale for each output channel,
activations INT8 asymmetric. pt2e writes quantize and dequantize operations; no fake-quant module is exported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from edgegen import errors, onnx_qdq, program
from edgegen.runtimes import _executorch_axes, _executorch_names, _executorch_rewrite
from edgegen.types import Graph

DELEGATES = ("xnnpack", "vulkan", "coreml")
_NORMS = frozenset(("instance_norm", "group_norm", "layer_norm"))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A .pte file in memory, with what only the lowering knows.

    layers: debug handle in the file -> layer of the graph. undelegated: (operator, module path) of each operation that
    runs outside the delegate, in the order of the file.
    """

    content: bytes
    layers: Mapping[int, str]
    undelegated: tuple[tuple[str, str], ...]


def lower(graph: Graph, calibration: Path | None, delegate: str, minimum: str = "") -> Lowered:
    """Quantize if the plan says so, and lower.

    Raises:
        errors.ModelError: the program cannot be read.
        errors.DataError: the calibration set is unusable.
        errors.RuntimeFailed: ExecuTorch fails; the message names the operation when it does.
    """
    import torch

    if graph.program is None:
        raise errors.RuntimeFailed("executorch converts from a torch program: give a torch network, not an .onnx file")
    loaded = program.load(graph.program)
    arguments = tuple(
        torch.full(tuple(int(d) for d in spec.shape), 0.5, dtype=getattr(torch, spec.dtype)) for spec in graph.inputs
    )
    with quiet(), torch.no_grad():
        module = loaded.module()
        norms = _normalising(module)
        if delegate == "xnnpack" and _executorch_rewrite.rewrite(module):
            module = torch.export.export(module, arguments).module()
        if graph.plan.precision == "int8" and calibration is not None:
            module = _quantized(module, graph, calibration, norms)
        exported = torch.export.export(module, arguments)
        with _needed_patterns(exported):
            edge = _delegated(exported, delegate, graph.plan.precision, minimum)
        nodes = _all_nodes(edge.exported_program().graph_module)
        named = _executorch_names.layers(nodes, graph.onnx)
        handles = {int(node.meta["debug_handle"]): name for node, name in named.items()}
        finished = edge.to_executorch()
        return Lowered(bytes(finished.buffer), handles, _undelegated(finished.exported_program().graph_module))


def _normalising(module: Any) -> frozenset[str]:
    """Paths of modules that normalise: what they are rewritten to is not quantized (see `openvino`)."""
    nodes = (node for node in module.graph.nodes if _executorch_names.operator(node) in _NORMS)
    return frozenset(_executorch_names.path(node) for node in nodes)


def _quantized(module: Any, graph: Graph, calibration: Path, norms: frozenset[str]) -> Any:
    """pt2e post-training quantization; samples are streamed."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    kept = _kept(module, graph, norms)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    if graph.plan.ranges == "minmax":
        observer = MinMaxObserver.with_args(eps=2**-12)  # XNNPACK's own lower limit of scales
        spec = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = dataclasses.replace(config, input_activation=spec, output_activation=spec)
    quantizer.set_global(config)
    quantizer.set_filter_function(lambda node: node.name not in kept)
    prepared = prepare_pt2e(module, quantizer)
    for feed in onnx_qdq.calibration_feeds(graph.inputs, calibration):
        prepared(*(torch.from_numpy(feed[spec.name]) for spec in graph.inputs))
    return convert_pt2e(prepared)


def _kept(module: Any, graph: Graph, norms: frozenset[str]) -> frozenset[str]:
    """Names of nodes that stay in float: the plan's layers and types, and normalisations."""
    model, plan = onnx.load(graph.onnx), graph.plan
    onnx_qdq.check_layers(model, plan)
    ops = {node.name: node.op_type for node in model.graph.node}
    named = _executorch_names.layers(module.graph.nodes, graph.onnx)
    chosen = {n.name for n, name in named.items() if name in plan.float_layers or ops.get(name) in plan.float_types}
    around = (n for n in module.graph.nodes if n.op == "call_function" and n not in named)
    return frozenset(chosen | {node.name for node in around if _executorch_names.path(node) in norms})


def _delegated(exported: Any, delegate: str, precision: str, minimum: str) -> Any:
    """The edge program with its delegated parts; operations go to XNNPACK one by one where groups would form a cycle.

    ExecuTorch joins what XNNPACK takes into groups and then finds that two of them wait for each other (StyleGAN2).
    """
    from executorch.exir import to_edge_transform_and_lower

    try:
        return to_edge_transform_and_lower(exported, partitioner=[_partitioner(delegate, precision, minimum)])
    except AssertionError as error:
        if delegate != "xnnpack" or "dependency cycles" not in str(error):
            raise
    return to_edge_transform_and_lower(exported, partitioner=[_partitioner(delegate, precision, minimum, single=True)])


def _partitioner(delegate: str, precision: str, minimum: str, single: bool = False) -> Any:
    """What hands operations to a delegate. minimum: the lowest iOS that Core ML must run on, such as "17"; "": any.

    single: XNNPACK gets each operation by itself.

    Raises:
        errors.RuntimeFailed: the delegate's own packages are not installed.
    """
    half = precision == "fp16"
    try:
        if delegate == "vulkan":
            from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

            return VulkanPartitioner({"force_fp16": half})
        if delegate == "coreml":
            return _coreml(half, minimum)
    except ImportError as error:
        raise errors.RuntimeFailed(f"executorch: the {delegate} delegate cannot be used here: {error}") from error
    return _executorch_axes.partitioner(per_op_mode=single)


def _coreml(half: bool, minimum: str) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    oldest = getattr(coremltools.target, f"iOS{minimum.partition('.')[0]}", None) if minimum else None
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    specs = CoreMLBackend.generate_compile_specs(compute_precision=precision, minimum_deployment_target=oldest)
    return CoreMLPartitioner(compile_specs=specs)


def _all_nodes(module: Any) -> list[Any]:
    """Nodes of a lowered program and of its delegated parts, in the order of the program that was lowered."""
    parts = [module, *(part.original_module.graph_module for part in module.children() if hasattr(part, "backend_id"))]
    nodes = [node for part in parts for node in part.graph.nodes if node.meta.get("debug_handle")]
    return sorted(nodes, key=lambda node: int(node.meta["debug_handle"]))


def _undelegated(module: Any) -> tuple[tuple[str, str], ...]:
    found = []
    for node in module.graph.nodes:
        name = _executorch_names.operator(node)
        if name and name not in ("executorch_call_delegate", "getitem", "alloc", "free"):
            found.append((name.removesuffix("_out"), _executorch_names.path(node)))
    return tuple(found)


@contextlib.contextmanager
def _needed_patterns(exported: Any) -> Iterator[None]:
    """Skip patterns that a program cannot hold.

    Lowering to XNNPACK first exports and lowers six small networks, to look for attention and bilinear resizing that
    were taken apart: 5 of the 7 seconds that lowering edsr takes.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    held = {_executorch_names.operator(node) for node in exported.graph.nodes}
    with contextlib.ExitStack() as stack:
        if not any(name.startswith("upsample_bilinear2d") for name in held):
            stack.enter_context(_instead(bilinear_2d, "get_graphs_dict", dict))
            stack.enter_context(_instead(bilinear_2d, "get_graphs", list))
        if not any("softmax" in name or "attention" in name for name in held):
            stack.enter_context(_instead(sdpa, "get_graphs", list))
        yield


@contextlib.contextmanager
def _instead(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's and ExecuTorch's own deprecations and notes of their quantizers; nothing that a caller could mend."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)
        yield
