"""Weights of INT8 layers stored in 4 bits: half of the file, the same integer kernels.

Each output channel has 15 levels, -7 to 7 times a step (Jacob et al., 2018, arXiv:1712.05877, with four bits); the file
holds them as INT4 and a Cast to INT8, which the runtime folds when it loads the file. So layers compute as in any INT8
build, in the same time. The step is the one with the least squared error (Banner et al., 2019, arXiv:1810.05723, clip
rather than cover the largest weight); weights that lie on such a grid already keep it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgegen import errors
from edgegen.onnx_cost import constants

SEVEN_BITS = 64  # integers on each side of zero of weights with 7 bits, as ONNX Runtime's quantizer has them
LEVELS = 7  # on each side of zero; -8 is left out, so that the grid is symmetric
SHARE = 1 / 200  # of all weights: a layer with fewer, the one that makes the image for instance, stays in 8 bits
_CLIPS = np.linspace(0.3, 1.0, 36)  # tried shares of the largest magnitude
_FIRST_OPSET = 21  # the first in which Cast takes INT4
_CHANGED = ("DFT", "GridSample", "GroupNormalization")  # what means something else from opset 18 to 21


def steps(weight: np.ndarray, axis: int) -> np.ndarray:
    """Step of each channel along `axis`, of those tried the one with the least squared error; float32, above 0."""
    rows = np.moveaxis(np.asarray(weight, np.float32), axis, 0).reshape(weight.shape[axis], -1)
    peak = np.abs(rows).max(axis=1)
    peak = np.where(peak > 0, peak, 1.0).astype(np.float32)
    # peak / k: exact for weights that lie on a grid already and use only k of its levels
    tried = [peak / k for k in range(LEVELS, 0, -1)] + [peak * np.float32(clip / LEVELS) for clip in _CLIPS]
    best, least = tried[0], np.full(len(rows), np.inf)
    for step in tried:
        wrong = np.square(levels(rows, step[:, None]) * step[:, None] - rows, dtype=np.float64).sum(axis=1)
        best, least = np.where(wrong < least, step, best), np.minimum(wrong, least)
    return best.astype(np.float32)


def levels(weight: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The integers, -LEVELS to LEVELS, nearest to the weight; `step` broadcasts with it."""
    return np.clip(np.rint(weight / step), -LEVELS, LEVELS).astype(np.int8)


def shaped(step: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Steps of channels so that they broadcast with the weight."""
    shape = [1] * ndim
    shape[axis] = -1
    return step.reshape(shape)


def axes(model: onnx.ModelProto, nodes: Collection[str], share: float = SHARE) -> dict[str, int]:
    """Weight -> axis of its output channels, for what the named nodes multiply with and has this share of all weights.
    """
    consts = constants(model)
    found: dict[str, int] = {}
    refused: set[str] = set()
    initializers = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            axis = _axis(node, consts) if node.name in nodes and place == 1 and name in initializers else None
            if axis is None or found.setdefault(name, axis) != axis:
                refused.add(name)  # also read elsewhere, where other values would come as a surprise
    sizes = {name: int(np.prod(consts[name].dims)) for name in found}
    least = share * sum(sizes.values())
    return {name: axis for name, axis in found.items() if name not in refused and sizes[name] >= least}


def _axis(node: onnx.NodeProto, consts: Mapping[str, TensorProto]) -> int | None:
    flags = {a.name: a.i for a in node.attribute if a.name in ("group", "transB")}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if flags.get("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if flags.get("transB") else 1
    return 1 if node.op_type == "MatMul" and len(consts[node.input[1]].dims) == 2 else None


def snap(model: onnx.ModelProto, nodes: Collection[str]) -> dict[str, tuple[int, np.ndarray]]:
    """Put the weights of the named nodes on their 15 levels, in place; weight -> (axis, step of each channel).

    Raises:
        errors.Unsupported: no weight is large enough to count, or is one that can be stored so.
    """
    found = {}
    consts = constants(model)
    for name, axis in axes(model, nodes).items():
        weight = numpy_helper.to_array(consts[name])
        step = steps(weight, axis)
        wide = shaped(step, axis, weight.ndim)
        value = levels(weight, wide).astype(np.float32) * wide
        consts[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
        found[name] = (axis, step)
    if not found:
        raise errors.Unsupported("no layer that becomes INT8 has a weight that 4 bits can store; store it in 8")
    return found


def overrides(found: Mapping[str, tuple[int, np.ndarray]]) -> dict[str, list[dict[str, Any]]]:
    """The steps as ONNX Runtime's quantizer takes them, so that its integers are the levels."""
    zero = np.array(0, np.int8)
    return {
        name: [{"scale": np.array(s, np.float32), "zero_point": zero} | ({"axis": axis} if i == 0 else {})
               for i, s in enumerate(step)]
        for name, (axis, step) in found.items()
    }  # fmt: skip


def store(model: onnx.ModelProto) -> onnx.ModelProto:
    """The Q/DQ model with INT4 in the place of each INT8 weight whose integers all are levels.

    Raises:
        errors.Unsupported: the opset is older than 18, or an operation means something else in the one that has INT4.
    """
    opset = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    changed = next((node for node in model.graph.node if node.op_type in _CHANGED), None)
    if opset.version < 18 or (changed is not None and opset.version < _FIRST_OPSET):
        what = f"{changed.op_type} {changed.name!r}" if changed is not None else f"a graph of opset {opset.version}"
        raise errors.Unsupported(f"INT4 weights need opset {_FIRST_OPSET}, which changes {what}; store them in 8 bits")
    opset.version = max(opset.version, _FIRST_OPSET)
    model.ir_version = max(model.ir_version, 10)
    wanted = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    done = []
    for tensor in model.graph.initializer:
        if tensor.name not in wanted or tensor.data_type != TensorProto.INT8 or len(tensor.dims) < 2:
            continue
        value = numpy_helper.to_array(tensor)
        if np.abs(value.astype(np.int16)).max(initial=0) <= LEVELS:
            name = tensor.name
            tensor.CopyFrom(_packed(value, f"{name}_int4"))
            done.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.INT8))
    nodes = [*done, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _packed(value: np.ndarray, name: str) -> TensorProto:
    """Two values a byte, the first in the low half."""
    flat = value.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return helper.make_tensor(name, TensorProto.INT4, value.shape, (flat[1::2] << 4 | flat[::2]).tobytes(), raw=True)
