"""From a stage to an ONNX file: export, simplify, name nodes after modules, check against torch.

The file is float32 with static shapes, batch norms folded into convolutions, one copy of each weight, and the same
bytes whenever the same module is exported. Node names are `<module path>/<operation>`, such as `body.0.conv1/Conv`;
precision plans refer to them. What the root module itself computes is `/Add`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, onnx_files, onnx_idioms, onnx_parity
from edgegen.onnx_cost import WEIGHTED, Cost, LayerCost, cost, static_shapes
from edgegen.onnx_fp16 import to_fp16
from edgegen.onnx_parity import Parity, parity
from edgegen.onnx_qdq import insert_qdq
from edgegen.types import Graph, Stage, TensorSpec

__all__ = ["Cost", "LayerCost", "Parity", "cost", "insert_qdq", "parity", "save", "simplify", "to_fp16", "to_onnx"]

_LOWEST_OPSET = 13  # the first with per-channel Q/DQ
_EXPORTED_OPSET = 18  # the oldest that torch's exporter writes itself; below, it tries ONNX's converter, and is loud
_FOLD_LIMIT = 2**26  # elements; larger constants are left to the runtime to fold
_SCOPES = "pkg.torch.onnx.name_scopes"
_CURES = {
    "DeformConv": "put a plain convolution of the same kernel in its place and train it to the old one's outputs",
}


def to_onnx(stage: Stage, out: Path, *, opset: int = 18) -> Graph:
    """Write a stage as ONNX: eval mode, float32, static shapes, simplified, weights inline below 2 GiB.

    Args:
        stage: its module is exported and left as it was; without a module its `onnx` file is loaded and checked.
            Input shapes must be numbers; batch size is part of the shape.
        out: the .onnx file to write, whole or not at all.
        opset: ONNX operator set of an exported module, 18 at least: torch's exporter has no older one, and a runtime
            whose parser is older rewrites the file itself. A file keeps its own (raised to 13 when it is older).
    Raises:
        errors.ModelError: the module cannot be exported, the file is not a valid ONNX model, a shape is not fixed,
            or inputs and outputs are not those of the stage.
    """
    for spec in stage.inputs:
        if not all(isinstance(d, int) and d > 0 for d in spec.shape):
            raise errors.ModelError(
                f"{stage.name}: shape of input {spec.name!r} must be fixed to export, got {spec.shape}"
            )
    model = simplify(_from_module(stage, opset) if stage.module is not None else _from_file(stage))
    if stage.module is not None:
        _check_operators(model, stage)
    return save(model, out, stage)


def save(model: onnx.ModelProto, out: Path, stage: Stage) -> Graph:
    """Write a simplified model and describe it; checks its outputs against the stage's specs.

    Raises:
        errors.ModelError: number, names or shapes of outputs differ from `stage.outputs`.
    """
    shapes = static_shapes(model)
    names = [o.name for o in model.graph.output]
    specs = {spec.name: spec for spec in stage.outputs}
    if specs and list(specs) != names:
        raise errors.ModelError(f"{stage.name}: the model's outputs are {names}, its record says {list(specs)}")
    outputs = tuple(_output_spec(stage, specs.get(name, TensorSpec(name, ())), shapes) for name in names)
    try:
        total = cost(model)
    except ValueError as error:
        raise errors.ModelError(f"{stage.name}: {error}") from error
    sha256 = onnx_files.write(model, out)
    return Graph(stage.name, out, stage.inputs, outputs, macs=total.macs, params=total.params, sha256=sha256)


def _output_spec(stage: Stage, spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> TensorSpec:
    if spec.name not in shapes:
        raise errors.ModelError(f"{stage.name}: the shape of output {spec.name!r} is not fixed; fix the input shapes")
    shape = shapes[spec.name]
    fits = len(spec.shape) == len(shape) and all(a == b for a, b in zip(spec.shape, shape) if isinstance(a, int))
    if spec.shape and not fits:
        raise errors.ModelError(f"{stage.name}: output {spec.name!r} is {shape}, its record says {spec.shape}")
    return dataclasses.replace(spec, shape=shape)


# ---------------------------------------------------------------------------------------------------- from torch


def _example(spec: TensorSpec, device: Any) -> Any:
    """A tensor of the spec's shape; its values do not matter to the exported graph."""
    import torch

    dtype = getattr(torch, spec.dtype)
    return torch.full(
        tuple(int(d) for d in spec.shape), 0.5 if dtype.is_floating_point else 0, dtype=dtype, device=device
    )


def _from_module(stage: Stage, opset: int) -> onnx.ModelProto:
    import torch

    device = next((p.device for p in stage.module.parameters()), torch.device("cpu"))
    arguments = tuple(_example(spec, device) for spec in stage.inputs)
    with onnx_parity.evaluating(stage.module), torch.no_grad(), warnings.catch_warnings():
        # torch's own deepcopy of its own tree specs trips over its own deprecation; nothing that a caller could mend
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
        try:
            program = torch.onnx.export(
                stage.module,
                arguments,
                dynamo=True,
                opset_version=max(opset, _EXPORTED_OPSET),
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs] or None,
                external_data=False,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise errors.ModelError(
                f"{stage.name}: cannot be exported to ONNX: {onnx_parity.first_line(error)}"
            ) from error
    if program is None:
        raise errors.ModelError(f"{stage.name}: torch's exporter returned nothing")
    return program.model_proto


def _check_operators(model: onnx.ModelProto, stage: Stage) -> None:
    """Raise errors.ModelError for what the exporter wrote though the operator set (and so every target) lacks it."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    defined = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        known = onnx.defs.has(node.op_type, max_inclusive_version=versions.get(node.domain, 1), domain=node.domain)
        if not known and (node.domain, node.op_type) not in defined:
            cure = _CURES.get(node.op_type, "write it with operations of torch itself")
            at = f"{node.op_type} at {node.name.rpartition('/')[0] or 'the top'}"
            raise errors.ModelError(f"{stage.name}: {at} is not in ONNX opset {versions.get('', 0)}, so no target "
                                    f"takes it: {cure}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------- from file


def _from_file(stage: Stage) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if stage.onnx is None:
        raise errors.ModelError(f"{stage.name}: has neither a module nor an ONNX file")
    try:
        model = onnx.load(stage.onnx)
        if model.ByteSize() < onnx_files.INLINE_LIMIT:
            onnx.checker.check_model(model)
        model = _fix_inputs(stage, _raise_opset(model))
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise errors.ModelError(f"{stage.onnx}: not a valid ONNX model ({onnx_parity.first_line(error)})") from error
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise errors.ModelError(f"{stage.onnx}: cannot be used ({onnx_parity.first_line(error)})") from error
    return model


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    return onnx.version_converter.convert_version(model, _LOWEST_OPSET) if version < _LOWEST_OPSET else model


def _fix_inputs(stage: Stage, model: onnx.ModelProto) -> onnx.ModelProto:
    """Set the stage's shapes on the inputs and infer every other shape anew."""
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]  # before IR version 4 weights were inputs too
    del graph.input[:]
    graph.input.extend(inputs)
    wanted = {spec.name: spec for spec in stage.inputs}
    if {i.name for i in inputs} != set(wanted):
        raise errors.ModelError(
            f"{stage.onnx}: its inputs are {sorted(i.name for i in inputs)}, asked for {sorted(wanted)}"
        )
    for info in graph.input:
        kind, spec = info.type.tensor_type, wanted[info.name]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
        if dtype != spec.dtype:
            raise errors.ModelError(f"{stage.onnx}: input {info.name!r} is {dtype}, expected {spec.dtype}")
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind.elem_type, spec.shape))
    del graph.value_info[:]
    for info in graph.output:
        info.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


# ------------------------------------------------------------------------------------------------------ simplify


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and batch norms, merge equal weights, name nodes after modules, drop all that is not graph."""
    import onnxscript.optimizer

    _name_nodes(model)
    _own_weights(model)
    names = _Names(model)
    model = onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    names.restore(model)
    onnx_idioms.straighten(model)
    onnx_files.strip(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _name_nodes(model: onnx.ModelProto) -> None:
    """`<module path>/<operation>`, made unique by `_1`, `_2` ...; nodes of an .onnx file keep their own names."""
    taken: set[str] = set()
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
        if scopes is None:
            base = node.name or node.op_type
        else:
            path = re.findall(r"'([^']*)'", scopes)[:-1]  # the last entry is the torch operation
            base = f"{path[-1] if path else ''}/{node.op_type}"
        node.name = onnx_files.unique(base, taken)


def _own_weights(model: onnx.ModelProto) -> None:
    """Layers that share weights and have a batch norm behind them get copies, or the optimizer would not fold the norm.

    What is equal after folding is merged again.
    """
    normed = {node.input[0] for node in model.graph.node if node.op_type == "BatchNormalization"}
    weights, seen = {tensor.name: tensor for tensor in model.graph.initializer}, set()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.output[0] not in normed:
            continue
        for at, name in list(enumerate(node.input))[1:]:
            if name in seen:
                copy = model.graph.initializer.add()
                copy.CopyFrom(weights[name])
                node.input[at] = copy.name = f"{name}@{node.name}"
            elif name in weights:
                seen.add(name)


class _Names:
    """Gives nodes that the optimizer made (a convolution with its batch norm folded in) their names back."""

    def __init__(self, model: onnx.ModelProto):
        nodes = model.graph.node
        self.known = {node.name for node in nodes}
        self.by_output = {name: node.name for node in nodes for name in node.output}
        self.by_weight: dict[tuple[str, str], list[str]] = {}
        for node in nodes:
            if node.op_type in WEIGHTED and len(node.input) > 1:
                self.by_weight.setdefault((node.op_type, node.input[1]), []).append(node.name)

    def restore(self, model: onnx.ModelProto) -> None:
        taken = {node.name for node in model.graph.node if node.name in self.known}
        for node in model.graph.node:
            if node.name in self.known:
                continue
            found = self.by_weight.get((node.op_type, node.input[1] if len(node.input) > 1 else ""), [])
            path = self.by_output.get(node.output[0], node.op_type).rpartition("/")[0]
            free = [name for name in found if name not in taken]
            base = free[0] if free else f"{path}/{node.op_type}"
            node.name = onnx_files.unique(base, taken)
