"""Weights of a Core ML program stored narrower, and 8-bit activations from recorded ranges."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgegen.runtimes._coreml_layers import WEIGHTED, layer_of
from edgegen.runtimes._coreml_read import THRESHOLD, weight_of
from edgegen.types import PrecisionPlan

BITS = {"palette6": 6, "palette4": 4}
GROUP = 16  # channels that share a table, from iOS 18 on; before, one table serves a whole tensor
_GROUPS_SINCE = 18
INTEGER_LAYERS = ("conv", "linear")
_ACTIVATIONS = (*INTEGER_LAYERS, "add", "avg_pool", "max_pool")  # around which coremltools puts Q/DQ
_ONNX_TYPES = {
    "Conv": ("conv",), "ConvTranspose": ("conv_transpose",), "Gemm": ("linear",), "MatMul": ("linear", "matmul"),
    "Add": ("add",), "AveragePool": ("avg_pool",), "GlobalAveragePool": ("avg_pool",), "MaxPool": ("max_pool",),
}  # fmt: skip


def narrowed(model: Any, plan: PrecisionPlan, os: int, layers: Mapping[str, str]) -> Any:
    """The model with the weights of its layers stored as the plan says; kept layers stay as they are.

    Palettes: one table a tensor; from iOS 18 on one for each 16 output channels, which is closer to the weights.
    """
    import coremltools.optimize.coreml as cto

    kind = plan.weights or "int8"
    configs: dict[str, Any] = {}
    for op in loaded(model).functions["main"].operations:
        if op.op_type not in WEIGHTED or not is_chosen(op, plan, layers):
            continue
        weight = weight_of(op)
        if weight is None or weight.val is None or weight.val.size < least(plan):
            continue
        if kind == "int8":
            configs[weight.op.name] = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        else:
            configs[weight.op.name] = _palette(cto, BITS[kind], op, weight, os)
    config = cto.OptimizationConfig(global_config=None, op_name_configs=configs)
    return cto.linear_quantize_weights(model, config) if kind == "int8" else cto.palettize_weights(model, config)


def _palette(cto: Any, bits: int, op: Any, weight: Any, os: int) -> Any:
    options: dict[str, Any] = {"mode": "custom", "lut_function": functools.partial(table, bits), "weight_threshold": 0}
    axis = {"conv": 0, "linear": 0, "conv_transpose": 1}.get(op.op_type, -1)
    if os >= _GROUPS_SINCE and axis >= 0 and int(weight.shape[axis]) % GROUP == 0:
        options |= {"granularity": "per_grouped_channel", "group_size": GROUP, "channel_axis": axis}
    return cto.OpPalettizerConfig(**options)


def table(bits: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2^bits values that represent a weight with the least squared error, and which of them each element takes.

    Exact one-dimensional k-means (Groenlund et al., 2017, arXiv:1701.07204) as coremltools carries it. Its own "kmeans"
    mode takes scikit-learn's, which starts at random and stops early, for weights below 10,000 elements.
    """
    from coremltools._deps import _kmeans1d

    values, places, counts = np.unique(weight.reshape(-1), return_inverse=True, return_counts=True)
    found = _kmeans1d.cluster(values.astype(np.float64), min(len(values), 2**bits), weights=counts.astype(np.float64))
    lut = np.zeros(2**bits, weight.dtype)
    lut[: len(found.centroids)] = found.centroids
    return lut, np.asarray(found.clusters, np.uint8)[places.reshape(-1)]


def least(plan: PrecisionPlan) -> int:
    """Elements from which on a weight is stored narrower: all where they are computed with, else where it pays."""
    return 0 if plan.precision == "int8" else THRESHOLD


def is_chosen(op: Any, plan: PrecisionPlan, layers: Mapping[str, str]) -> bool:
    """Whether the plan does not keep an operation in float."""
    kept_types = {kind for name in plan.float_types for kind in _ONNX_TYPES.get(name, ())}
    return op.op_type not in kept_types and layer_of(op, layers) not in plan.float_layers


def with_integer_activations(
    model: Any, plan: PrecisionPlan, ranges: Mapping[str, tuple[float, float]], layers: Mapping[str, str]
) -> Any:
    """The model with quantize/dequantize pairs (symmetric int8) around its layers, from recorded ranges.

    The same passes as `coremltools.optimize.coreml.linear_quantize_activations`, which can only record on a Mac.
    """
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils

    setting = cto.OpLinearQuantizerConfig(mode="linear_symmetric")
    configs = {
        op.name: setting if is_chosen(op, plan, layers) else None
        for op in loaded(model).functions["main"].operations
        if op.op_type in _ACTIVATIONS
    }
    config = cto.OptimizationConfig(global_config=None, op_name_configs=configs)
    stats = {name: {"rmin": low, "rmax": high} for name, (low, high) in ranges.items()}
    passes = []
    for side in ("prefix", "suffix"):
        step = PASS_REGISTRY[f"compression::insert_{side}_quantize_dequantize_pair"]
        step.set_options([PassOption("config", config), PassOption("activation_stats", stats)])
        passes.append(step)
    passes.append(PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    return utils._apply_graph_pass(model, passes, spec_version=ct.target.iOS17, skip_model_load=True)


def loaded(model: Any) -> Any:
    """The PyMIL program of a model that is not saved yet, with the names that coremltools' passes will see."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = model.get_spec()
    return load(spec, spec.specificationVersion, model.weights_dir)
