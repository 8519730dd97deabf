"""A torch program made ready for the LiteRT converter: named layers, channels-last images, exact rewrites.

litert-torch 0.10 converts some constructs wrongly (nearest resizing by a ratio that is not whole, output padding of two
and more), some not at all (the transposed convolution of CycleGAN generators), and some into many operations that a
phone's GPU does not take (pixel shuffle, bicubic resizing). Each rewrite here is exact: it computes the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from edgegen.runtimes import _litert_cures as cures
from edgegen.runtimes import _litert_fx
from edgegen.runtimes._litert_file import FLOAT
from edgegen.types import Graph

aten = torch.ops.aten
_WEIGHTED = {
    aten.conv1d: "Conv", aten.conv2d: "Conv", aten.conv3d: "Conv", aten.convolution: "Conv",
    aten.conv_transpose1d: "Conv", aten.conv_transpose2d: "Conv", aten.linear: "MatMul", aten.addmm: "MatMul",
    aten.mm: "MatMul", aten.bmm: "MatMul", aten.matmul: "MatMul", aten.baddbmm: "MatMul",
}  # fmt: skip
_FAMILY = {"Conv": "Conv", "ConvTranspose": "Conv", "Gemm": "MatMul", "MatMul": "MatMul"}
# One 8-bit scale for all channels into a normalisation enlarges the error of the quiet channels (see openvino.py).
_NORMALISATIONS = (
    aten.instance_norm, aten.group_norm, aten.layer_norm, aten.native_layer_norm, aten.native_group_norm,
    aten.rms_norm, aten._fused_rms_norm, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.rsqrt, aten.softmax,
    aten._softmax, aten.linalg_vector_norm, aten.norm, aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa,
    aten._upsample_bilinear2d_aa,
)  # fmt: skip


def prepare(program: Any, graph: Graph) -> tuple[Any, tuple[str, ...]]:
    """The program exported again, rewritten, and the layout of each input and output ("NHWC", or "" as in `graph`).

    Locations are the names of the ONNX graph's layers where an operation has weights, module paths elsewhere.
    """
    whole = program.module(check_guards=False)
    module = torch.fx.GraphModule(whole, whole.graph)  # without the hooks that hold it to its first input shapes
    module.graph.eliminate_dead_code()
    _name(module.graph, graph)
    _litert_fx.fold_constants(module)
    _litert_fx.fold_batch_norms(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and (cure := cures.CURES.get(_litert_fx.packet(node))):
            cure(module, node)
    layouts = _channels_last(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    count = len(graph.inputs)
    arguments = tuple(
        torch.full(_shape(spec.shape, layout), 0.5, dtype=getattr(torch, spec.dtype))
        for spec, layout in zip(graph.inputs, layouts[:count])
    )
    with torch.no_grad():
        return torch.export.export(module, arguments, strict=False), layouts


def _shape(shape: Sequence[int | str], layout: str) -> tuple[int, ...]:
    sizes = tuple(int(d) for d in shape)
    return (sizes[0], *sizes[2:], sizes[1]) if layout else sizes


def _name(fx: Any, graph: Graph) -> None:
    """Set each node's location, which becomes the name of its tensors in the file."""
    import onnx

    from edgegen import onnx_cost

    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    model = onnx.load(graph.onnx, load_external_data=False)
    for layer in onnx_cost.cost(model).layers:
        waiting[layer.name.rpartition("/")[0], _FAMILY.get(layer.op, layer.op)].append(layer.name)
    for node in fx.nodes:
        if node.op != "call_function":
            continue
        packet = _litert_fx.packet(node)
        path = next((value[0] for value in _stack(node)), "")
        names = waiting[path, _WEIGHTED.get(packet, "")]
        name = names.pop(0) if names else f"{path}/{str(packet).rpartition('.')[2]}"
        if packet is aten.scaled_dot_product_attention:
            name, names = f"{path}/attention", waiting[path, "MatMul"]
            node.meta[cures.PARTS] = [names.pop(0) for _ in range(min(2, len(names)))]
        _litert_fx.locate(node, name + FLOAT if packet in _NORMALISATIONS else name)


def operation(node: Any) -> str:
    """The operation without namespace and overload: `aten.conv2d.default` is `conv2d`."""
    return str(_litert_fx.packet(node)).rpartition(".")[2]


def layer(node: Any) -> str:
    """The node's location, or the path of the module that it belongs to."""
    return next((value[1] if not value[0] else value[0] for value in _stack(node)), "").removesuffix(FLOAT)


def _stack(node: Any) -> list[Any]:
    return list(reversed(list(node.meta.get("nn_module_stack", {}).values())))


def refused(fx: Any, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(operation, layer) of nodes whose operation is in `known`; what a cure takes care of is not asked."""
    names = set(known)
    for node in fx.nodes:
        if node.op == "call_function" and operation(node) in names and _litert_fx.packet(node) not in cures.CURES:
            yield operation(node), layer(node)


def _channels_last(fx: Any) -> tuple[str, ...]:
    """Make images of inputs and outputs (rank 4) channels-last, as cameras, bitmaps and LiteRT's kernels have them."""
    layouts = []
    for node in [node for node in fx.nodes if node.op == "placeholder"]:
        ranked = node.meta["val"].dim() == 4
        layouts.append("NHWC" if ranked else "")
        if ranked:
            with fx.inserting_after(node):
                first = fx.call_function(aten.permute.default, (node, [0, 3, 1, 2]))
            _litert_fx.locate(first, "input/Transpose")
            node.replace_all_uses_with(first, delete_user_cb=lambda user, first=first: user is not first)
    output = next(node for node in fx.nodes if node.op == "output")
    results = []
    for node in output.args[0]:
        ranked = node.meta["val"].dim() == 4
        layouts.append("NHWC" if ranked else "")
        if ranked:
            with fx.inserting_before(output):
                last = fx.call_function(aten.permute.default, (node, [0, 2, 3, 1]))
            _litert_fx.locate(last, "output/Transpose")
        results.append(last if ranked else node)
    output.args = (tuple(results),)
    return tuple(layouts)
