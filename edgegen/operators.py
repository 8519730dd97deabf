"""An ONNX graph as the kernels that a runtime makes of it, each with the features that its time depends on.

A convolution or linear layer, its bias, its activation and, where the runtime fuses it, the addition of a shortcut are
one kernel. Norms, softmax, pooling, resizing, element-wise operations and movements of data are kernels of their own;
reshapes are free. Zhang et al., 2021, nn-Meter, doi:10.1145/3458864.3467882, finds such rules by probing; those here
(`operator_rules`) are read off what runtimes report, and what they miss is in the error of the validation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import operator_rules as rules
from edgegen.types import PrecisionPlan

KINDS = (
    "conv1x1", "conv3x3", "conv", "depthwise", "grouped", "transposed", "linear", "matmul", "norm", "softmax", "pool",
    "resize", "elementwise", "movement", "input", "output", "run", "scale", "layernorm", "concat", "pad", "transpose",
    "activation", "cast",
)  # fmt: skip
"""scale: a batch norm that is no part of a layer. norm: by instance or group. elementwise: of two tensors. cast:
between INT8 and float. input, output: copies of the graph's tensors from and to numpy. run: the cost of any call."""
WORK = KINDS[:8]
"""Kinds with MACs."""
_NORMS = ("layernorm", "norm", "scale")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel. bytes_in, bytes_weights, bytes_out in its precision; height, width, kernel: of the output and
    of the window (for matrices: rows and 1). fused: operations that are part of it. curved:
    elements that an exponential or the like is taken of."""

    kind: str
    macs: int = 0
    bytes_in: int = 0
    bytes_weights: int = 0
    bytes_out: int = 0
    channels_in: int = 1
    channels_out: int = 1
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    groups: int = 1
    precision: str = "fp32"
    curved: int = 0
    name: str = ""
    fused: tuple[str, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """Activations that are read and written."""
        return self.bytes_in + self.bytes_out


ROW = tuple(field.name for field in dataclasses.fields(Kernel) if field.name not in ("name", "fused"))
"""Order of the figures of a kernel in a table file."""


def to_row(kernel: Kernel) -> list[Any]:
    """A kernel as JSON: its figures in the order of `ROW`."""
    return [list(value) if isinstance(value := getattr(kernel, name), tuple) else value for name in ROW]


def from_row(row: Iterable[Any]) -> Kernel:
    """The kernel of a row. Raises ValueError: not as many figures as `ROW`, or an unknown kind."""
    values = dict(zip(ROW, row, strict=True))
    if values["kind"] not in KINDS:
        raise ValueError(f"unknown kind of kernel {values['kind']!r}")
    return Kernel(**{**values, "kernel": tuple(values["kernel"])})


def kernels(source: Path | Any, runtime: str, plan: PrecisionPlan | None = None) -> list[Kernel]:
    """Kernels of an ONNX model (a file or a ModelProto, float32, static shapes) in a runtime, in graph order.

    The first ones are "run" and one "input" an input, the last one "output" an output.

    Args:
        plan: in an int8 plan, weighted layers count in INT8 unless the plan leaves them in float. None: FP32.
    Raises:
        ValueError: a shape that is not static.
    """
    import onnx

    model = onnx.load(source) if isinstance(source, Path) else source
    return _Reader(model, runtime, plan or PrecisionPlan()).read()


class _Reader:
    """One graph being read: shapes, who uses what, and which nodes an earlier kernel has taken in."""

    def __init__(self, model: Any, runtime: str, plan: PrecisionPlan):
        from edgegen import onnx_cost

        self.model, self.plan = model, plan
        self.shapes, self.consts = onnx_cost.static_shapes(model), onnx_cost.constants(model)
        weighted = (node for node in model.graph.node if node.op_type in onnx_cost.WEIGHTED)
        # by identity of the output: names of nodes need not be unique in foreign files
        self.costs = {n.output[0]: c for n, c in zip(weighted, onnx_cost.cost(model).layers, strict=True)}
        self.users: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.made = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
        self.runtime, self.taken = runtime, set[str]()
        self.eight, self.cast = set[str](), set[str]()  # tensors in INT8, and those that were cast already

    def read(self) -> list[Kernel]:
        graph = self.model.graph
        inputs = [i.name for i in graph.input if i.name not in self.consts]
        found = [Kernel("run"), *(Kernel("input", bytes_in=4 * self._size(name)) for name in inputs)]
        self._constant_parts()
        for node in graph.node:
            if node.op_type in rules.FREE and node.input and node.input[0] in self.eight:
                self.eight.update(node.output)
            if node.op_type not in rules.FREE and node.output[0] not in self.taken:
                precision = self._precision(node)
                found += self._casts(node, precision)
                found.append((self._weighted if node.output[0] in self.costs else self._other)(node, precision))
        return [*found, *(Kernel("output", bytes_out=4 * self._size(o.name)) for o in graph.output)]

    def _constant_parts(self) -> None:
        """Nodes that depend on constants only are folded by every runtime."""
        fixed = set(self.consts)
        for node in self.model.graph.node:
            if all(not name or name in fixed for name in node.input) or node.op_type == "Shape":
                fixed.update(node.output)
                self.taken.add(node.output[0])

    def _size(self, name: str) -> int:
        if name not in self.shapes:
            raise ValueError(f"the shape of {name!r} is not static; export with fixed shapes")
        return math.prod(self.shapes[name])

    def _casts(self, node: Any, precision: str) -> list[Kernel]:
        """What a node reads in another precision than it works in, once for each tensor."""
        if self.plan.precision != "int8":
            return []
        wanted = [name for name in dict.fromkeys(node.input) if name and name not in self.consts
                  and (name in self.eight) != (precision == "int8") and name not in self.cast]  # fmt: skip
        self.cast.update(wanted)
        ends = (1, 4) if precision != "int8" else (4, 1)
        sizes = [self._size(name) for name in wanted if name in self.shapes]
        return [Kernel("cast", bytes_in=ends[0] * size, bytes_out=ends[1] * size, precision="int8") for size in sizes]

    def _weighted(self, node: Any, precision: str) -> Kernel:
        cost, attributes = self.costs[node.output[0]], {a.name: a for a in node.attribute}
        first, second = self.shapes[node.input[0]], self.shapes[node.input[1]]
        size = BYTES[precision]
        fused, end = self._follow(node, precision) if cost.weight else ((), node.output[0])
        self.eight.update([end] if precision == "int8" else [])
        out = self.shapes[end]
        extra = self._size(end) * fused.count("Add")  # the shortcut is read as well
        shape: dict[str, Any]
        if node.op_type in ("Conv", "ConvTranspose"):
            groups = attributes["group"].i if "group" in attributes else 1
            window = (*second[2:], 1)[:2]
            stride = max(attributes["strides"].ints) if "strides" in attributes else 1
            kind = _convolution(node.op_type, first[1], groups, window)
            space = (*out[2:], 1)[:2]
            shape = {"channels_in": first[1], "channels_out": out[1], "height": space[0], "width": space[1],
                     "kernel": window, "stride": stride, "groups": groups}  # fmt: skip
        else:
            kind = "linear" if cost.weight else "matmul"
            depth = max(1, cost.macs // max(1, math.prod(cost.output_shape)))
            batch = 1 if cost.weight else math.prod(cost.output_shape[:-2])  # heads: as many products
            rows = math.prod(cost.output_shape[:-1]) // max(1, batch)
            shape = {"channels_in": depth, "channels_out": cost.output_shape[-1], "height": rows, "groups": batch}
        return Kernel(
            kind, cost.macs, size * (math.prod(first) + extra + (0 if cost.weight else math.prod(second))),
            size * cost.params, size * math.prod(out), precision=precision, name=node.name, fused=fused,
            curved=math.prod(out) * len(rules.CURVED & set(fused)), **shape,
        )  # fmt: skip

    def _precision(self, node: Any) -> str:
        plan, cost = self.plan, self.costs.get(node.output[0])
        if plan.precision != "int8":
            return plan.precision
        if cost is None:
            read = [name for name in node.input if name and name not in self.consts]
            stays = node.op_type in rules.EIGHT and read and (self.eight | self.cast).issuperset(read)
            return "int8" if stays else plan.rest
        left = node.name in plan.float_layers or node.op_type in plan.float_types or not cost.weight
        return plan.rest if left else "int8"

    def _follow(self, node: Any, precision: str) -> tuple[tuple[str, ...], str]:
        """What is fused behind a weighted node, and the tensor that the kernel writes in the end."""
        less = rules.FUSED_INT8.get(self.runtime) if precision == "int8" else None
        activations = rules.FUSED.get(self.runtime, frozenset()) if less is None else less
        shortcuts = less is None and self.runtime in rules.SHORTCUTS

        def fits(op: str, fused: Sequence[str]) -> bool:
            added = op == "Add" and shortcuts and op not in fused and not set(fused) & rules.ACTIVATIONS
            return op == "Bias" or (op in activations and op not in fused) or added

        return self._chain(node.output[0], fits)

    def _chain(self, end: str, fits: Callable[[str, Sequence[str]], bool]) -> tuple[tuple[str, ...], str]:
        """Operations behind a tensor as long as they fit, and the tensor behind them."""
        fused: list[str] = []
        while True:
            op, members, after = self._next(end)
            if not op or not fits(op, fused):
                return tuple(fused), end
            fused.append(op)
            self.taken.update(members)
            end = after

    def _next(self, name: str) -> tuple[str, list[str], str]:
        """(operation, outputs of its nodes, its result) of what alone reads a tensor; "" when there is no such."""
        users = self._left(name)
        if found := self._composite(name, users):
            return found
        if len(users) != 1 or len(users[0].output) != 1:
            return "", [], name
        user = users[0]
        if user.op_type == "Add" and any(other in self.consts for other in user.input):
            return "Bias", [user.output[0]], user.output[0]
        if user.op_type == "Add" and any(self.shapes.get(i) != self.shapes.get(user.output[0]) for i in user.input):
            return "", [], name
        if any(self.made.get(other, -1) > self.made.get(name, -1) for other in user.input):
            return "", [], name  # what is made last takes it
        return user.op_type, [user.output[0]], user.output[0]

    def _composite(self, name: str, users: list[Any]) -> tuple[str, list[str], str] | None:
        """SiLU, hard swish and GELU written as several nodes that begin and end with the same tensor."""
        ops = sorted(user.op_type for user in users)
        gate = next((u for u in users if u.op_type in ("Sigmoid", "HardSigmoid")), None)
        if len(users) == 2 and gate is not None and "Mul" in ops:
            product = next(u for u in users if u.op_type == "Mul")
            if set(product.input) == {name, gate.output[0]}:
                op = "Silu" if gate.op_type == "Sigmoid" else "HardSwish"
                return op, [gate.output[0], product.output[0]], product.output[0]
        return self._gelu(name, users) if "Div" in ops or "Mul" in ops else None

    def _gelu(self, name: str, users: list[Any]) -> tuple[str, list[str], str] | None:
        """x / sqrt(2) -> Erf -> + 1, times x and a half in either order."""
        scaled = next((u for u in users if u.op_type in ("Div", "Mul")
                       and [n.op_type for n in self.users.get(u.output[0], [])] == ["Erf"]), None)  # fmt: skip
        if scaled is None:
            return None
        members, pending = [scaled.output[0]], [scaled.output[0], *(u.output[0] for u in users if u is not scaled)]
        last = ""
        for _ in range(8):  # at most five nodes
            reached = [n for p in pending for n in self.users.get(p, []) if n.op_type in ("Erf", "Add", "Mul")]
            pending = list(dict.fromkeys(n.output[0] for n in reached if n.output[0] not in members))
            members += pending
            if len(pending) == 1 and len(members) >= 4 and self.shapes.get(pending[0]) == self.shapes.get(name):
                last = pending[0]
                after = (n for n in self.users.get(last, []) if n.op_type == "Mul")
                if not any(other in self.consts for n in after for other in n.input):
                    break
            if not pending:
                break
        members += [u.output[0] for u in users if u is not scaled and u.op_type == "Mul"]
        return ("Gelu", list(dict.fromkeys(members)), last) if last else None

    def _other(self, node: Any, precision: str) -> Kernel:
        """A kernel without MACs; activations written as several nodes are one."""
        read = [name for name in node.input if name and name not in self.consts]
        end, op = node.output[0], node.op_type
        source = read[0] if read else end
        alone = rules.KIND_OF.get(op) in (None, "activation")
        if alone and (found := self._composite(source, self._left(source))) and end in found[1]:
            op, members, end = found
            self.taken.update(members)
            read = [source]
        kind = rules.KIND_OF.get(op, "elementwise" if len(read) > 1 else "activation")
        fused, end = self._behind(node, op, kind, end)
        outputs = [end] if end != node.output[0] else [o for o in node.output if o in self.shapes]
        self.eight.update(outputs if precision == "int8" else [])
        params = sum(self._size(name) for name in node.input if name in self.consts and kind in _NORMS)
        more = self._size(end) * sum(one not in rules.ACTIVATIONS and one != "Bias" for one in fused)
        shape = self.shapes.get(end, ())
        space = (*shape[2:], 1, 1)[:2] if len(shape) == 4 else (math.prod(shape[:-1]) or 1, 1)
        channels = shape[1] if len(shape) == 4 else (shape or (1,))[-1]
        before = self.shapes.get(source, ())
        size = BYTES[precision]
        return Kernel(
            kind, 0, size * (sum(self._size(name) for name in dict.fromkeys(read)) + more), size * params,
            size * sum(self._size(name) for name in outputs),
            before[1] if len(before) == 4 else channels, channels, space[0], space[1], _window(node),
            precision=precision, name=node.name, fused=(op, *fused),
            curved=self._size(end) * len(rules.CURVED & {op, *fused}),
        )  # fmt: skip

    def _behind(self, node: Any, op: str, kind: str, end: str) -> tuple[tuple[str, ...], str]:
        """What is fused behind a kernel without MACs, and what it writes in the end."""
        if kind == "scale" and self.runtime in rules.SCALED and self.plan.precision == "fp32":
            return self._follow(node, self.plan.precision)
        if kind not in (*_NORMS, "elementwise", "activation"):
            return (), end
        if self.runtime in rules.CHAINS:
            return self._chain(end, lambda one, fused: one == "Bias" or rules.KIND_OF.get(one) == "activation"
                               or one in ("Add", "Div", "Mul", "Sub"))  # fmt: skip
        if op in rules.CLAMPED.get(self.runtime, ()):
            return self._chain(end, lambda one, fused: one in rules.FUSED[self.runtime] and not fused)
        return (), end

    def _left(self, name: str) -> list[Any]:
        return [user for user in self.users.get(name, []) if user.output[0] not in self.taken]


def _convolution(op: str, channels: int, groups: int, window: tuple[int, ...]) -> str:
    if op == "ConvTranspose":
        return "transposed"
    if groups > 1:
        return "depthwise" if groups == channels else "grouped"
    return {(1, 1): "conv1x1", (3, 3): "conv3x3"}.get((window[0], window[1]), "conv")


def _window(node: Any) -> tuple[int, int]:
    sizes = next((tuple(a.ints) for a in node.attribute if a.name == "kernel_shape"), ())
    return (*sizes, 1, 1)[:2]
