"""What every ONNX rewrite needs: producers, users, constants and shapes of a model that is being changed.

A rewrite looks at one node after the other and says, for each that it changes, which nodes take its place. Nodes that
nothing uses any more, and their weights, are swept out at the end, so a pattern may share parts with its surroundings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgegen import onnx_cost, onnx_files

Rule = Callable[["Net", onnx.NodeProto], str]


def each(model: onnx.ModelProto, kinds: Collection[str], rule: Rule) -> dict[str, str]:
    """Try `rule` on every node of these types, in graph order; the model changes in place.

    A rule returns what it rewrote (after `Net.swap`), or "" for a node that it leaves.

    Returns:
        Name of each rewritten node (of its first output, where it has no name) -> what was done.
    """
    net, changed = Net(model), {}
    for node in list(net.nodes):
        if node.op_type in kinds and node.domain in ("", "ai.onnx") and not net.is_gone(node):
            name = node.name or node.output[0]
            if text := rule(net, node):
                changed[name] = text
    if changed:
        net.close()
    return changed


class Net:
    """Lookup in a model, and nodes that take the place of others."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.graph = model, model.graph
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.constants = dict(onnx_cost.constants(model))
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            self._note(node)
        self.results = {info.name for info in model.graph.output}
        self.inner = set(_inner_uses(model.graph.node))
        given = (info.name for info in model.graph.input)
        self.taken = {*given, *self.inner, *self.users, *self.constants, *self.makers, *self.results}
        self._instead: dict[int, list[onnx.NodeProto]] = {}
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> static shape, as far as shapes were known before the rewrite began."""
        return onnx_cost.static_shapes(self.model)

    @cached_property
    def types(self) -> dict[str, int]:
        """Tensor -> ONNX element type."""
        graph = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        found = {i.name: i.type.tensor_type.elem_type for i in (*graph.input, *graph.output, *graph.value_info)}
        return {**found, **{name: tensor.data_type for name, tensor in self.constants.items()}}

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float32; rewrites that add constants work in that type alone."""
        return self.types.get(name) == onnx.TensorProto.FLOAT

    def shape(self, name: str) -> tuple[int, ...]:
        """Static shape, or () where it is unknown (or a scalar)."""
        return self.shapes.get(name, ())

    def constant(self, name: str) -> np.ndarray | None:
        """Value of an initializer or a Constant node, else None."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def scalar(self, name: str) -> float | None:
        """Value of a constant that has one element, else None."""
        value = self.constant(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node of one of those types that computes a tensor, whoever else uses it."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx") else None

    def sole(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node of those types whose only user is the asking one."""
        node = self.maker(name, *kinds)
        return node if node is not None and self.is_private(name) else None

    def is_private(self, name: str) -> bool:
        """Whether one node uses a tensor once, and nothing else does."""
        uses = sum(list(node.input).count(name) for node in self.users.get(name, []))
        return uses == 1 and name not in self.results and name not in self.inner

    def user(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The only user of a tensor, when it is of one of those types."""
        node = self.users[name][0] if self.is_private(name) else None
        return node if node is not None and node.op_type in kinds else None

    def axes(self, node: onnx.NodeProto) -> tuple[int, ...] | None:
        """Axes of a Reduce*, Squeeze or Unsqueeze, as attribute or constant input; None when they are not fixed."""
        given = node.input[1] if len(node.input) > 1 else ""
        value = self.constant(given) if given else attributes(node).get("axes")
        rank = len(self.shape(node.input[0])) or None
        if value is None or rank is None:
            return None
        return tuple(sorted(int(axis) % rank for axis in np.asarray(value).reshape(-1)))

    def fresh(self, base: str) -> str:
        """A tensor name that nothing has."""
        return onnx_files.unique(base, self.taken)

    def add(self, base: str, value: np.ndarray) -> str:
        """A new initializer; its name."""
        name = self.fresh(base)
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def ints(self, base: str, values: Sequence[int]) -> str:
        """A new int64 vector."""
        return self.add(base, np.array(values, np.int64))

    def is_gone(self, node: onnx.NodeProto) -> bool:
        """Whether something has taken the node's place."""
        return id(node) in self._instead

    def swap(self, node: onnx.NodeProto, instead: Sequence[onnx.NodeProto]) -> None:
        """Put nodes in the place of one; together they must make its outputs."""
        self._instead[id(node)] = list(instead)
        for name in set(node.input) & set(self.users):
            self.users[name] = [user for user in self.users[name] if user is not node]
        for new in instead:
            self.makers.update(dict.fromkeys(new.output, new))
            self._note(new)

    def close(self) -> None:
        """Write the nodes back, without those that nothing uses and their weights."""
        nodes = list(self._placed(self.nodes))
        while True:
            used = {*self.results, *(name for node in nodes for name in node.input), *_inner_uses(nodes)}
            kept = [node for node in nodes if any(name in used for name in node.output)]
            if len(kept) == len(nodes):
                break
            nodes = kept
        weights = [t for t in self.graph.initializer if t.name in used]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(weights)

    def _placed(self, nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            if self.is_gone(node):
                yield from self._placed(self._instead[id(node)])
            else:
                yield node

    def _note(self, node: onnx.NodeProto) -> None:
        for name in dict.fromkeys(node.input):
            if name:
                self.users.setdefault(name, []).append(node)


class Chain:
    """Nodes that are to take the place of one, written down one after the other."""

    def __init__(self, net: Net, node: onnx.NodeProto):
        self.net, self.node = net, node
        self.nodes: list[onnx.NodeProto] = []
        self.name, self.output = node.name or node.output[0], node.output[0]

    def then(self, kind: str, *inputs: str, last: bool = False, **options: Any) -> str:
        """Add an operation; its result. The last one makes the output of the replaced node."""
        result = self.output if last else self.net.fresh(f"{self.output}.{kind.lower()}")
        label = self.name if last else f"{self.name}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [result], label, **options))
        return result

    def const(self, what: str, value: np.ndarray | Sequence[int]) -> str:
        """A new constant; a list is an int64 vector."""
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        return self.net.add(f"{self.output}.{what}", array)

    def reduce(self, kind: str, source: str, axes: Sequence[int]) -> str:
        """ReduceMean or ReduceSum that keeps the axes, in the form of the model's operator set."""
        if self.net.opset >= (13 if kind == "ReduceSum" else 18):
            return self.then(kind, source, self.const("axes", list(axes)), keepdims=1)
        return self.then(kind, source, axes=list(axes), keepdims=1)

    def finish(self, layer: str = "") -> None:
        """Take the node's place: the last operation makes its output, the first of type `layer` has its name."""
        last = self.nodes[-1]
        last.output[0] = self.output
        named = next((node for node in self.nodes if node.op_type == layer), last)
        named.name, last.name = self.name, named.name if named is not last else self.name
        self.done()

    def done(self) -> None:
        """Take the node's place."""
        self.net.swap(self.node, self.nodes)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attribute name -> value; texts are bytes."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def pads(node: onnx.NodeProto) -> list[int] | None:
    """Explicit (top, left, bottom, right) padding of a 2-d convolution or pooling; None where it is automatic."""
    found = attributes(node)
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    return list(found.get("pads", [0, 0, 0, 0]))


def _inner_uses(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    """Tensors that branches and loop bodies take from outside."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from (name for inner in graph.node for name in inner.input)
                yield from (info.name for info in graph.output)
                yield from _inner_uses(graph.node)


def plain(node: onnx.NodeProto) -> dict[str, Any] | None:
    """Attributes of a stride-1, undilated, ungrouped 2-d convolution with explicit pads, or None."""
    found = attributes(node)
    standard = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}
    if any(found.get(key, value) != value for key, value in standard.items()):
        return None
    return {**found, "pads": list(found.get("pads", [0, 0, 0, 0]))}
