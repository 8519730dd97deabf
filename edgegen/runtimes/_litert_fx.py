"""Tools to rewrite a torch.fx graph for the LiteRT converter, and what is folded before any rewrite."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
_FOLD_LIMIT = 2**22  # elements of a constant that is computed here instead of on the device
_RANDOM = (torch.Tag.nondeterministic_seeded,)


def locate(node: Any, name: str) -> None:
    """Name the node: litert-torch writes the module stack as the location of what the node becomes."""
    node.meta["nn_module_stack"] = {"edgegen": ("", name)}


def location(node: Any) -> str:
    stack = node.meta.get("nn_module_stack", {})
    return stack["edgegen"][1] if "edgegen" in stack else ""


@functools.cache
def block_operations() -> tuple[Any, Any]:
    """torch operations with the meaning of LiteRT's DEPTH_TO_SPACE and SPACE_TO_DEPTH, known to the converter."""
    from litert_converter.mlir import ir
    from litert_torch.backend.experimental.torch_tfl import _lowerings
    from litert_torch.backend.lowerings import registry, utils

    @torch.library.custom_op("edgegen::depth_to_space", mutates_args=())
    def depth_to_space(x: torch.Tensor, block: int) -> torch.Tensor:
        """(N, H, W, block * block * C) to (N, block * H, block * W, C); channel = (row * block + column) * C + c."""
        n, h, w, c = x.shape
        parts = x.reshape(n, h, w, block, block, c // block**2).permute(0, 1, 3, 2, 4, 5)
        return parts.reshape(n, h * block, w * block, c // block**2).clone()

    @torch.library.custom_op("edgegen::space_to_depth", mutates_args=())
    def space_to_depth(x: torch.Tensor, block: int) -> torch.Tensor:
        """The inverse."""
        n, h, w, c = x.shape
        parts = x.reshape(n, h // block, block, w // block, block, c).permute(0, 1, 3, 2, 4, 5)
        return parts.reshape(n, h // block, w // block, c * block**2).clone()

    depth_to_space.register_fake(
        lambda x, block: x.new_empty(x.shape[0], x.shape[1] * block, x.shape[2] * block, x.shape[3] // block**2)
    )
    space_to_depth.register_fake(
        lambda x, block: x.new_empty(x.shape[0], x.shape[1] // block, x.shape[2] // block, x.shape[3] * block**2)
    )

    def lower(name: str) -> Callable[..., Any]:
        def lowering(context: Any, x: Any, block: int) -> Any:
            size = {"block_size": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), block)}
            return _lowerings._ir_operation(name, utils.node_meta_to_ir_types(context.node), [x], size)

        return lowering

    found = torch.ops.edgegen.depth_to_space.default, torch.ops.edgegen.space_to_depth.default
    registry.lower(found[0])(lower("tfl.depth_to_space"))
    registry.lower(found[1])(lower("tfl.space_to_depth"))
    return found


class Writer:
    """Puts nodes before `node`, with its location; `done` replaces it."""

    def __init__(self, module: Any, node: Any):
        self.module, self.node, self.fx = module, node, node.graph

    def __call__(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> Any:
        with self.fx.inserting_before(self.node):
            made = self.fx.call_function(target, args, kwargs)
        shapes = torch.fx.node.map_arg((args, kwargs), lambda n: torch.empty_like(n.meta["val"], device="meta"))
        made.meta["val"] = target(*shapes[0], **shapes[1])
        locate(made, name or location(self.node))
        return made

    def constant(self, value: torch.Tensor) -> Any:
        name = f"edgegen_constant_{len(list(self.module.buffers()))}"
        self.module.register_buffer(name, value.detach().contiguous())
        with self.fx.inserting_before(self.node):
            made = self.fx.get_attr(name)
        made.meta["val"] = value
        return made

    def gather(self, source: Any, index: torch.Tensor, axis: int) -> Any:
        """Rows, columns or channels of (N, C, H, W) by their numbers, as a GATHER on channels-last data."""
        block_operations()
        last = self(aten.permute.default, source, [0, 2, 3, 1])
        found = self(torch.ops.tfl.gather.default, last, self.constant(index.to(torch.int32)), {1: 3, 2: 1, 3: 2}[axis])
        return self(aten.permute.default, found, [0, 3, 1, 2])

    def done(self, made: Any) -> None:
        self.node.replace_all_uses_with(made)
        self.fx.erase_node(self.node)


def value(module: Any, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    found = operator.attrgetter(str(node.target))(module)
    return found if isinstance(found, torch.Tensor) else None


def arguments(node: Any) -> dict[str, Any]:
    """A call's arguments by name, with the schema's defaults."""
    schema = node.target._schema.arguments
    given = {spec.name: value for spec, value in zip(schema, node.args)}
    return {spec.name: spec.default_value for spec in schema} | given | dict(node.kwargs)


def pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return (values[0], values[-1])


def packet(node: Any) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def fold_constants(module: Any) -> None:
    """Compute what depends on weights alone (weight norm, index grids): the converter leaves operations on constants
    in the file, some of which the interpreter does not know."""
    values: dict[Any, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = value(module, node)
        if node.op != "call_function" or not all(values.get(n) is not None for n in node.all_input_nodes):
            continue
        if any(tag in getattr(node.target, "tags", ()) for tag in _RANDOM) or getattr(
            getattr(node.target, "_schema", None), "is_mutable", True
        ):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        with torch.no_grad():
            found = node.target(*args, **kwargs)
        if isinstance(found, torch.Tensor) and found.numel() <= _FOLD_LIMIT:
            values[node] = found.detach()
            constant = Writer(module, node).constant(found)
            values[constant] = values[node]
            node.replace_all_uses_with(constant)


def fold_batch_norms(module: Any) -> None:
    """Into the weights of the convolution before, as the ONNX export does it."""
    axis = {aten.conv2d: 0, aten.conv1d: 0, aten.conv_transpose2d: 1, aten.conv_transpose1d: 1}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or packet(node) is not aten.batch_norm:
            continue
        given, conv = arguments(node), node.args[0]
        if given["training"] or conv.op != "call_function" or packet(conv) not in axis or len(conv.users) != 1:
            continue
        made = arguments(conv)
        weight, bias = value(module, made["weight"]), value(module, made["bias"])
        mean, variance = value(module, given["running_mean"]), value(module, given["running_var"])
        if weight is None or mean is None or variance is None or (made["bias"] is not None and bias is None):
            continue
        gain, shift = value(module, given["weight"]), value(module, given["bias"])
        scale = torch.rsqrt(variance.double() + given["eps"]) * (1.0 if gain is None else gain.double())
        moved = (0.0 if bias is None else bias.double()) - mean.double()
        new_bias = moved * scale + (0.0 if shift is None else shift.double())
        groups = made["groups"] if axis[packet(conv)] else 1
        # weights are (out, in / groups, ...) or, transposed, (groups * in / groups, out / groups, ...)
        sides = (groups, 1, -1) if axis[packet(conv)] else (1, -1, 1)
        wide = weight.double().unflatten(0, (groups, -1)) * scale.reshape(*sides, *[1] * (weight.dim() - 2))
        write = Writer(module, conv)
        changed = {"weight": write.constant(wide.flatten(0, 1).float()), "bias": write.constant(new_bias.float())}
        conv.args, conv.kwargs = tuple((made | changed).values()), {}
        node.replace_all_uses_with(conv)
        module.graph.erase_node(node)
