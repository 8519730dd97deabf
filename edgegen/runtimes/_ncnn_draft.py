"""A copy of an ONNX model while it is rewritten for pnnx: shapes, constants, and new nodes with names of their own."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from edgegen import onnx_cost, onnx_files

Made = list[onnx.NodeProto] | None
LARGEST = 4096  # elements of a constant that is read


@dataclasses.dataclass
class Draft:
    """A model that is being rewritten: shapes and constants by tensor name; new tensors get names of their own.

    `most` is the number of axes that a new tensor may have behind its first, which is 1.
    """

    model: onnx.ModelProto
    shapes: dict[str, tuple[int, ...]]
    consts: dict[str, np.ndarray]
    taken: set[str]
    most: int = 4

    @classmethod
    def of(cls, model: onnx.ModelProto, most: int = 4) -> Draft:
        """Read a model; small constants only, as rules look at axes and exponents, not at weights."""
        found = {name: t for name, t in onnx_cost.constants(model).items() if math.prod(t.dims) <= LARGEST}
        consts = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in found.items()}
        names = {name for node in model.graph.node for name in (*node.input, *node.output)}
        return cls(model, onnx_cost.static_shapes(model), consts, names, most)

    @functools.cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each tensor; new nodes come into the model after the rule is through."""
        return {name: node for node in self.model.graph.node for name in node.output}

    def name(self, base: str) -> str:
        """A tensor name that is not taken."""
        return onnx_files.unique(f"{base}_edgegen", self.taken)

    def constant(self, base: str, value: Sequence[int] | np.ndarray) -> str:
        """Add a constant; its name."""
        name, array = self.name(base), np.asarray(value)
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        self.consts[name] = array
        return name

    def reshape(self, source: str, shape: Sequence[int], out: str = "") -> onnx.NodeProto:
        """Reshape to `shape`."""
        out = out or self.name(source)
        return self.node("Reshape", [source, self.constant(source, np.array(shape, np.int64))], out)

    def slice(self, source: str, axis: int, start: int, stop: int, out: str = "") -> onnx.NodeProto:
        """source[..., start:stop, ...] along `axis`."""
        ends = [self.constant(source, np.array([value], np.int64)) for value in (start, stop, axis)]
        return self.node("Slice", [source, *ends], out or self.name(source))

    def node(self, op: str, inputs: Sequence[str], out: str = "", **attributes: Any) -> onnx.NodeProto:
        """A node with one output, named after it."""
        out = out or self.name(inputs[0])
        return onnx.helper.make_node(op, list(inputs), [out], name=f"{op}/{out}", **attributes)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of an attribute, or the default."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
