"""Networks that come as a file with their graph inside (.pt2, .onnx), and the forward check that all networks share."""

from __future__ import annotations

import logging
import operator
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen import files, origins, records
from edgegen.errors import ModelError
from edgegen.records import ModelOptions, Record
from edgegen.types import Stage, TensorSpec

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int | str, ...]


def stage(
    module: Any, record: Record, ends: tuple[str, tuple[int, ...], str], name: str, onnx: Path | None = None
) -> Stage:
    """The only stage of a network.

    Args:
        ends: (name of the input, real shape of the output, name of the output).
    Raises:
        ModelError: the output's shape is not what the record or the task says.
    """
    source, shape, sink = ends
    stated = record.output.shape
    if stated is not None and tuple(stated) != shape:
        raise ModelError(f"{name}: the output has shape {shape}, the record says {tuple(stated)}")
    if record.task == "classification" and len(shape) != 2:
        raise ModelError(f"{name}: a classifier gives (1, classes), got {shape}; set --task to what it is")
    if record.gives_images and len(shape) != 4:
        raise ModelError(f"{name}: {record.task} gives images (1, C, H, W), got {shape}; set --task to what it is")
    value_range = record.input.value_range if record.task != "unconditional" else None
    latent = "NCHW" if len(record.input.shape or ()) == 4 else "NC"
    given = TensorSpec(source, tuple(record.input.shape or ()), value_range=value_range, layout=latent)
    layout = "NCHW" if len(shape) == 4 else "NC"
    out_range = record.output.value_range if record.gives_images else None
    made = TensorSpec(sink, shape, value_range=out_range, layout=layout)
    return Stage("model", module, (given,), (made,), onnx)


def forward_shape(
    module: nn.Module, shape: tuple[int, ...], name: str, *others: TensorSpec
) -> tuple[int, ...]:
    """Output shape of a forward pass on zeros; `others` are the further inputs.

    Raises:
        ModelError: the pass fails, does not give one float tensor, or gives NaN or infinity.
    """
    torch = origins.require("torch")
    try:
        with torch.no_grad():
            further = [torch.zeros(tuple(map(int, spec.shape)), dtype=getattr(torch, spec.dtype)) for spec in others]
            output = module(torch.zeros(shape), *further)
    except Exception as error:
        raise ModelError(
            f"{name}: the forward pass on zeros of shape {shape} failed: {origins.describe(error)}; check --input-shape"
        ) from error
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        got = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(f"{name}: the forward pass must give one float tensor, got {got}")
    if not bool(torch.isfinite(output).all()):
        raise ModelError(f"{name}: the forward pass on zeros gives NaN or infinity; are these the right weights?")
    return tuple(output.shape)


def pt2_stage(path: Path, options: ModelOptions, name: str) -> tuple[Stage, Record, str]:
    """A torch export: (stage with its module, record from the options, hash of the state).

    Raises:
        ModelError: damaged, carries pickled objects or foreign functions, or several inputs.
    """
    torch = origins.require("torch")
    from edgegen.weights import state_hash

    program = _read_program(path)
    _check_functions(program, path)
    names = program.graph_signature.user_inputs
    if len(names) != 1:
        raise ModelError(f"model {path}: has {len(names)} inputs; edgegen takes networks with one")
    placeholder = next(node for node in program.graph.nodes if node.name == names[0])
    fixed = tuple(int(size) if type(size) is int else str(size) for size in placeholder.meta["val"].shape)
    record = records.complete(_input_record(fixed, options, path.name), options, name)
    module = program.module()
    shape = forward_shape(module, record.input.shape or (), name)
    x = torch.ones(record.input.shape)
    with torch.no_grad():
        if not torch.equal(module(x), module(x)):
            raise ModelError(f"model {path}: gives another output each time; was it exported in training mode?")
    return stage(module, record, ("input", shape, "output"), name), record, state_hash(module)


def onnx_stage(path: Path, options: ModelOptions, name: str) -> tuple[Stage, Record, str]:
    """An ONNX file: (stage without a module, record from the options, SHA-256 of the file).

    Raises:
        ModelError: damaged or cut short, several inputs or outputs, or shapes that stay open.
    """
    import onnx

    model = _read_onnx(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(
            f"model {path}: has {len(inputs)} inputs and {len(model.graph.output)} outputs; edgegen takes one of each"
        )
    record = records.complete(_input_record(_onnx_shape(inputs[0]), options, path.name), options, name)
    for dimension, size in zip(inputs[0].type.tensor_type.shape.dim, record.input.shape or ()):
        dimension.dim_value = size
    output = model.graph.output[0]
    output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"model {path}: its shapes do not fit together: {origins.describe(error)}") from error
    shape = _onnx_shape(inferred.graph.output[0])
    fixed = tuple(size for size in shape if isinstance(size, int))
    if not shape or len(fixed) != len(shape):
        raise ModelError(f"model {path}: the output's shape stays open {shape}; export it with fixed shapes")
    ends = (inputs[0].name, fixed, output.name)
    return stage(None, record, ends, name, path.absolute()), record, files.sha256(path)


def _input_record(shape: Shape, options: ModelOptions, source: str) -> dict[str, Any]:
    """The record that a file's own input shape makes; a free batch is 1, other free dimensions must be given.

    Raises:
        ModelError: the option contradicts the file, or a dimension is free.
    """
    given = options.input_shape
    if given is not None:
        given = (1, *given) if len(given) == len(shape) - 1 else given
        if len(given) != len(shape) or any(isinstance(f, int) and f != g for f, g in zip(shape, given)):
            raise ModelError(f"model {source}: takes the input shape {shape}, got --input-shape {given}")
        return {"input": {"shape": given}, "source": source}
    fixed = (1, *shape[1:]) if shape and isinstance(shape[0], str) else shape
    if not fixed or not all(isinstance(size, int) for size in fixed):
        raise ModelError(f"model {source}: its input shape is open {shape}: give --input-shape")
    return {"input": {"shape": fixed}, "source": source}


def _read_onnx(path: Path) -> Any:
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's own errors among them
        text = (str(error).strip().splitlines() or ["unreadable"])[0][:160]
        raise ModelError(f"model {path}: damaged, cut short or not an ONNX file ({text})") from error
    return model


def _onnx_shape(value: Any) -> Shape:
    return tuple(
        int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or "?"
        for d in value.type.tensor_type.shape.dim
    )


def _read_program(path: Path) -> Any:
    """torch.export.load without its fall-back to full unpickling, which would run code that the file carries."""
    torch = origins.require("torch")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"model {path}: damaged, cut short or not a torch export")
    try:
        with _weights_only(), _quiet("torch.export"):
            return torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"model {path}: no torch export that can be read without running code from it ({origins.describe(error)})"
        ) from error


def _check_functions(program: Any, path: Path) -> None:
    """Refuse a graph that calls anything but torch operators and arithmetic."""
    torch = origins.require("torch")
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            target = node.target
            known = isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
            arithmetic = getattr(target, "__module__", "") in (operator.__name__, "_operator", "math")
            if node.op == "call_function" and not known and not arithmetic:
                raise ModelError(f"model {path}: its graph calls {target}, which is no torch operator; refused")


@contextmanager
def _weights_only() -> Iterator[None]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from logging a traceback of what is reported here as one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
