"""Checks that the passes which write a precision plan share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from edgegen import graph, registry
from edgegen.errors import RecipeError
from edgegen.types import Job, Model

WEIGHTS = ("int8", "int4")  # how they can be stored
# torch layer -> ONNX operation types that it can become
TYPES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("Conv",), nn.Conv2d: ("Conv",), nn.Conv3d: ("Conv",), nn.ConvTranspose1d: ("ConvTranspose",),
    nn.ConvTranspose2d: ("ConvTranspose",), nn.ConvTranspose3d: ("ConvTranspose",), nn.Linear: ("Gemm", "MatMul"),
}  # fmt: skip


def check_precision(what: str, precision: str, allowed: Sequence[str], job: Job) -> None:
    """Raise RecipeError unless `precision` is one of `allowed` and the target lists it (fp32 runs everywhere)."""
    if precision not in allowed:
        raise RecipeError(f"{what} must be one of {', '.join(allowed)}, got {precision!r}")
    if precision != "fp32" and precision not in job.target.precisions:
        raise RecipeError(
            f"{what}: target {job.target.name} has no {precision}; it has: {', '.join(job.target.precisions)}"
        )


def layer_types(module: nn.Module | None) -> dict[str, tuple[str, ...]]:
    """Layer path -> ONNX types it can become, for convolutions and linear layers; empty for an ONNX file."""
    if module is None:
        return {}
    return {
        path: next(types for kind, types in TYPES.items() if isinstance(layer, kind))
        for path, layer in graph.layers(module).items()
    }


def node_names(names: Sequence[str], model: Model) -> tuple[str, ...]:
    """Names of graph nodes (`path/Type`) for names of nodes or of layers; an ONNX file's are taken as they are.

    Raises:
        RecipeError: a name that is neither, with the near match; a linear layer without its type.
    """
    if model.stage.module is None:
        return tuple(names)
    types = layer_types(model.stage.module)
    paths = {path for path, _ in model.stage.module.named_modules()}
    found = []
    for name in names:
        path, slash, _ = name.rpartition("/")
        if slash and path in paths:
            found.append(name)
        elif len(types.get(name, ())) == 1:
            found.append(f"{name}/{types[name][0]}")
        elif name in types:
            allowed = " or ".join(f"{name}/{kind}" for kind in types[name])
            raise RecipeError(f"float_layers: {name!r} may become two kinds of node; say {allowed}")
        else:
            near = registry.near(name.rpartition("/")[0] or name, tuple(types))
            raise RecipeError(f"float_layers: no layer {name!r} in {model.name}{near}; name a layer, or a node as "
                              f"path/Type, such as {next((f'{p}/{t[0]}' for p, t in types.items()), 'body.0/Conv')}")
    return tuple(found)
