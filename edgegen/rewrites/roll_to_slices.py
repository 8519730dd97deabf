"""Roll (a cyclic shift, as windowed attention has it) as two slices and a concatenation for each axis.

Exact: elements are moved. For runtimes without roll, and for ONNX files that write it as a gather over a rotated index.
coremltools 9.0 refuses a roll without axes, and writes one with axes as a gather.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("roll",)
RUNTIMES: tuple[str, ...] = ("coreml",)


def roll_to_slices(model: onnx.ModelProto) -> dict[str, str]:
    """Gather with the indices k, k + 1 ... n - 1, 0 ... k - 1 of an axis -> Slice, Slice, Concat."""
    return _net.each(model, ("Gather",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    index, shape = net.constant(node.input[1]), net.shape(node.input[0])
    axis = _net.attributes(node).get("axis", 0) % max(1, len(shape))
    if index is None or index.ndim != 1 or not shape or node.input[0] in net.constants or len(index) != shape[axis]:
        return ""
    start = int(index[0]) % shape[axis]
    if start == 0 or not np.array_equal(index % shape[axis], np.roll(np.arange(shape[axis]), -start)):
        return ""
    chain = _net.Chain(net, node)
    along = chain.const("axis", [axis])
    edges = [chain.const("edge", [edge]) for edge in (0, start, shape[axis])]
    tail = chain.then("Slice", node.input[0], edges[1], edges[2], along)
    head = chain.then("Slice", node.input[0], edges[0], edges[1], along)
    chain.then("Concat", tail, head, axis=axis)
    chain.finish()
    return f"rotation of axis {axis} by {start} -> slices"


def program_roll_to_slices(network: Any) -> dict[str, str]:
    """aten.roll of a torch program -> slices and concatenations."""
    return _program.swap(network, ("aten.roll",), _sliced, lambda node: "roll -> slices")


def _sliced(x: Any, shifts: Any, dims: Any = ()) -> Any:
    import torch

    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:  # the flattened tensor is rolled
        return _sliced(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims):
        size = x.shape[dim]
        start = -shift % size if size else 0
        if start:
            x = torch.cat((x.narrow(dim, start, size - start), x.narrow(dim, 0, start)), dim)
    return x
