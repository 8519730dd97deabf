"""The same network for another input size: of one that makes images from images, and takes more than one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgegen import foreign, origins, samplers
from edgegen.errors import ModelError
from edgegen.types import Model

TASKS = ("super-resolution", "restoration", "image-to-image")
Size = tuple[int, int]
"""(H, W) in pixels."""
# What strides, patches and windows usually ask for. Sides are tried as a prime number of each (one that no multiple
# here has in it), so that a side that suits a larger multiple by chance does not speak for a smaller one.
_MULTIPLES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 79, 97, 127, 251, 509, 1021)


def at(model: Model, size: Size) -> Model:
    """The model at another input size; one forward pass on zeros shows that it takes it.

    Images are scaled to cover the size and cropped: the record's own resize and crop belong to the record's size.

    Raises:
        ModelError: not a network from images to images, a file with fixed shapes, or a size that it cannot take; says
            the multiple that it needs.
    """
    _check_kind(model, size)
    stage, given = model.stage, model.stage.inputs[0]
    if (refused := _refusal(model, size)) is not None:
        raise ModelError(f"{model.name} does not take {told(size)}: {_needed(model, size) or refused}")
    made = dataclasses.replace(stage.outputs[0], shape=_output(model, size))
    inputs = (dataclasses.replace(given, shape=(*given.shape[:2], *size)),)
    stage = dataclasses.replace(stage, inputs=inputs, outputs=(made,))
    how = dataclasses.replace(model.preprocessing, resize=None, crop=None)
    return dataclasses.replace(model, stages=(stage,), preprocessing=how)


def told(size: Sequence[int | str]) -> str:
    """`384x640`: height, then width."""
    return "x".join(map(str, size))


def options_for(path: str, options: dict[str, Any], size: Size) -> dict[str, Any]:
    """Model options with the input shape that an .onnx file with free height and width has at `size`."""
    if Path(path).suffix != ".onnx" or options.get("input_shape") or not Path(path).is_file():
        return options
    free = [d for d in _file_shape(Path(path))[1:] if isinstance(d, str)]
    channels = _file_shape(Path(path))[1:2]
    if not free or not channels or not isinstance(channels[0], int):
        return options
    return {**options, "input_shape": (1, channels[0], *size)}


def _check_kind(model: Model, size: Size) -> None:
    if model.task not in TASKS or samplers.of(model.options) is not None:
        why = "; its resize and crop belong to one size: make a bundle for each with --input-shape and --resize"
        why = why if model.task == "classification" else "; a latent has no height and width in pixels"
        raise ModelError(
            f"--resolution {told(size)}: is for {', '.join(TASKS)}, {model.name} is for {model.task}{why}"
        )
    given, made = model.stage.inputs[0], model.stage.outputs[0]
    if len(model.stage.inputs) != 1 or any(len(s.shape) != 4 or s.layout != "NCHW" for s in (given, made)):
        raise ModelError(f"--resolution {told(size)}: {model.name} takes {given.shape}, which is no image (N, C, H, W)")
    file = model.stage.onnx
    if model.stage.module is None and file is not None and size != tuple(given.shape[2:]):
        sides = _file_shape(file)[2:]
        if any(isinstance(side, int) and side != want for side, want in zip(sides, size, strict=True)):
            raise ModelError(
                f"--resolution {told(size)}: {file.name} has a fixed input of {'x'.join(map(str, sides))}; export it"
                " with free height and width (dynamic_shapes), or give the network as FILE.py:FACTORY"
            )


def _refusal(model: Model, size: Size) -> str | None:
    """Why the network does not take a size; None when it does, and enlarges it as it does its own."""
    try:
        out = _output(model, size)
    except ModelError as error:
        return f"only {told(_own(model))} is known to work ({error})"
    given, made = model.stage.inputs[0].shape, model.stage.outputs[0].shape
    fits = out[:2] == tuple(made[:2]) and all(
        int(o) * int(g) == int(m) * s for o, s, g, m in zip(out[2:], size, given[2:], made[2:], strict=True)
    )
    return None if fits else f"it gives {told(out[2:])} there, of {told(_own(model))} it makes {told(made[2:])}"


def _output(model: Model, size: Size) -> tuple[int, ...]:
    """The output's shape at a size.

    Raises:
        ModelError: it cannot be computed.
    """
    stage = model.stage
    shape = tuple(int(d) for d in (*stage.inputs[0].shape[:2], *size))
    if stage.module is not None:
        return foreign.forward_shape(stage.module, shape, model.name)
    import onnx

    file = onnx.load(str(stage.onnx))
    given = next(value for value in file.graph.input if value.name == stage.inputs[0].name)
    for dimension, side in zip(given.type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = side
    file.graph.output[0].type.tensor_type.ClearField("shape")
    del file.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(file, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"its shapes do not fit together: {origins.describe(error)}") from error
    out = tuple(int(d.dim_value) for d in inferred.graph.output[0].type.tensor_type.shape.dim)
    if len(out) != 4 or not all(out):
        raise ModelError("the output's shape stays open")
    return out


def _needed(model: Model, size: Size) -> str:
    """Which multiple height and width must be of, with the next such size; empty when none helps."""
    for multiple in _MULTIPLES:
        if size[0] % multiple == 0 and size[1] % multiple == 0:
            continue
        trial = tuple(multiple * next((p for p in _PRIMES if p * multiple >= side), _PRIMES[-1]) for side in size)
        if max(trial) <= max(256, 4 * max(size)) and _refusal(model, (trial[0], trial[1])) is None:
            nearest = tuple(-(-side // multiple) * multiple for side in size)
            size = (nearest[0], nearest[1])
            return f"height and width must be multiples of {multiple}; the next size is {told(size)}"
    return ""


def _own(model: Model) -> Size:
    height, width = model.stage.inputs[0].shape[2:]
    return int(height), int(width)


def _file_shape(file: Path) -> tuple[int | str, ...]:
    """Input shape as an .onnx file states it; free dimensions are strings."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    first = next((value for value in graph.input if value.name not in stored), None)
    dims = first.type.tensor_type.shape.dim if first is not None else ()
    return tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or "?" for d in dims)
