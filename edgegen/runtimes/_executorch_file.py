"""What a .pte file holds, read back from it: kernels, the XNNPACK delegate's own graphs, weights, MACs.

The program and each delegate's payload are flatbuffers; the package brings their schemas and a reader (flatc).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgegen import errors

_BYTES = {"qcint8": 1, "qint8": 1, "quint8": 1, "fp32": 4, "fp16": 2, "bf16": 2, "qcint4": 0.5, "qbint4": 0.5}
_WEIGHTED = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply")
# Copies that the delegate adds around its convolutions, and quantization itself: no operations of the network.
_MOVES = ("XNNConvert", "XNNCopy")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weighted operation. handle: which one of the program it was, or -1; weight: "int8", "fp32" or ""."""

    handle: int
    precision: str
    macs: int
    weight: str = ""
    weight_bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Content:
    """delegated: operations that delegates run (XNNPACK only: others do not tell). kernels: names of those outside."""

    delegated: int
    kernels: tuple[str, ...]
    layers: tuple[Layer, ...]
    delegates: tuple[str, ...]

    @property
    def delegated_share(self) -> float:
        """Share of operations that a delegate runs, 0..1."""
        return self.delegated / max(1, self.delegated + len(self.kernels))


def read(file: Path) -> Content:
    """Read a .pte file.

    Raises:
        errors.RuntimeFailed: it is none.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        program = deserialize_pte_binary(file.read_bytes()).program
        plan = program.execution_plan[0]
        used = [call for chain in plan.chains for call in (i.instr_args for i in chain.instructions)]
        kernels = [call for call in used if type(call).__name__ == "KernelCall"]
        delegates = tuple(delegate.id for delegate in plan.delegates)
        payloads = [
            program.backend_delegate_data[delegate.processed.index].data
            for delegate in plan.delegates
            if delegate.id == "XnnpackBackend"
        ]
        graphs = [_xnnpack(bytes(payload)) for payload in payloads]
    except (OSError, ValueError, AssertionError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise errors.RuntimeFailed(f"{file.name}: not a readable ExecuTorch program ({_line(error)})") from error
    layers = [layer for graph in graphs for layer in _layers(graph)]
    names = tuple(plan.operators[call.op_index].name.removeprefix("aten::") for call in kernels)
    layers += [_kernel(name, [plan.values[i].val for i in call.args]) for name, call in zip(names, kernels)]
    delegated = sum(_counts(node) for graph in graphs for node in graph["xnodes"])
    return Content(delegated, names, tuple(layer for layer in layers if layer.macs), delegates)


def _counts(node: Any) -> bool:
    """Whether a node of the delegate is one of the network's; transposes that the delegate adds have no handle."""
    return node["xnode_union_type"] not in _MOVES and node.get("debug_handle", 65535) != 65535


def _xnnpack(payload: bytes) -> Any:
    """The XNNPACK delegate's graph as JSON."""
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _run_flatc

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, graph = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes((importlib.resources.files(schemas) / "schema.fbs").read_bytes())
        graph.write_bytes(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _run_flatc(["--json", "--strict-json", "--raw-binary", "-o", folder, str(schema), "--", str(graph)])
        text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
    return json.loads(re.sub(r"(?<=[ :\[-])inf\b", "Infinity", text))  # a ReLU's upper bound, which flatc writes so


def _layers(graph: Any) -> list[Layer]:
    tensors = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        tensors[tensor.get("id_out", 0)] = tensor
    return [
        _layer(node["xnode_union_type"], node["xnode_union"], node.get("debug_handle", 0), tensors)
        for node in graph["xnodes"]
        if node["xnode_union_type"] in _WEIGHTED
    ]


def _layer(kind: str, node: Any, handle: int, tensors: dict[int, Any]) -> Layer:
    """MACs from the shapes; channels are last in the delegate."""
    source = tensors[node.get("input1_id", 0)]
    weight = tensors[node.get("input2_id" if kind == "XNNBatchMatrixMultiply" else "filter_id", 0)]
    out = tensors[node.get("output_id", 0)]
    if kind == "XNNConvTranspose2d":
        macs = math.prod(source["dims"]) * node["kernel_height"] * node["kernel_width"] * node["group_output_channels"]
    elif kind.endswith("Conv2d"):
        macs = math.prod(out["dims"]) * node["kernel_height"] * node["kernel_width"] * node["group_input_channels"]
    else:
        macs = math.prod(out["dims"]) * source["dims"][-1]
    types = [tensor["datatype"].removeprefix("xnn_datatype_") for tensor in (source, weight)]
    precision = "int8" if all(_BYTES.get(kind) == 1 for kind in types) else types[0]
    if not weight.get("constant_buffer_idx"):
        return Layer(handle, precision, macs)
    size = math.prod(weight["dims"]) * _BYTES.get(types[1], 4)
    return Layer(handle, precision, macs, "int8" if _BYTES.get(types[1]) == 1 else types[1], size)


def _kernel(name: str, values: Sequence[Any]) -> Layer:
    """MACs of a kernel outside every delegate; those run in float."""
    sizes = [list(value.sizes) for value in values if hasattr(value, "sizes")]
    if name == "convolution" and len(sizes) > 2:
        flags = [value.bool_val for value in values if hasattr(value, "bool_val")]
        macs = math.prod(sizes[0] if flags and flags[0] else sizes[-1]) * math.prod(sizes[1][1:])
        return Layer(-1, "fp32", macs, "fp32", 4 * math.prod(sizes[1]))
    if name in ("mm", "bmm", "matmul", "linear", "addmm") and len(sizes) > 2:
        return Layer(-1, "fp32", math.prod(sizes[-1]) * sizes[1 if name == "addmm" else 0][-1])
    return Layer(-1, "fp32", 0)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
