"""From a torch program to a float32 .tflite file by litert-torch, without a word; what it refuses is told before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen import errors, program
from edgegen.runtimes import _litert_file, _litert_run
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
    "_assert_scalar": "a shape depends on values (a boolean mask): keep all tokens and weigh them by the mask",
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


def problems(graph: Graph) -> list[Problem]:
    """What of the program has no way into a .tflite file, after the rewrites that edgegen knows."""
    if graph.program is None:
        return [Problem("graph", "", "needs the torch program: give the model as a torch network, not as .onnx")]
    with _litert_run.quiet():
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
    with _litert_run.quiet():
        import torch
        from litert_torch._convert import litert_converter, signature

        try:
            ready, layouts = _decomposed(program.load(graph.program), graph)
            named = signature.Signature("serving_default", torch.nn.Identity(), ready.example_inputs[0], {})
            content = litert_converter.exported_programs_to_flatbuffer([ready], [named]).to_bytes()
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
            line = _litert_run.first_line(error)
            raise errors.RuntimeFailed(f"litert: cannot convert {graph.stage}: {line}") from error
    return Converted(bytes(content), layouts, _litert_file.layers(bytes(content), weighted(graph)))


def weighted(graph: Graph) -> dict[str, str]:
    """Layers with MACs of the ONNX graph: name -> operation type."""
    import onnx

    from edgegen import onnx_cost

    return {layer.name: layer.op for layer in onnx_cost.cost(onnx.load(graph.onnx)).layers}


def reference(graph: Graph, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the torch program says to the same arrays."""
    import torch

    if graph.program is None:
        raise errors.RuntimeFailed(f"{graph.stage}: no torch program to compare with")
    with _litert_run.quiet(), torch.no_grad():
        found = program.load(graph.program).module()(*[torch.from_numpy(value) for value in values])
    return [value.numpy() for value in (found if isinstance(found, tuple | list) else (found,))]
