"""What each layer of a network takes on the target, as a function of its widths: measured, or by its MACs.

Every different operator (window, stride, groups, size of its output) is measured at several widths in and out, as a
small network of itself with the time of reading its input taken off; between widths the time is bilinear. What a whole
network takes beyond its operators (norms, activations, movements) is spread over the layers by the sizes of their
outputs, so that the sum of the original is its own measured latency.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.types import Job, Measurement

LEAST = 0.02  # share of a measurement that is left to the operator when reading its input seems to take all


@dataclass(frozen=True)
class Layer:
    """A weighted layer as it is called. kind: of operator, "" for one that probes do not know. space: of the output
    (rows and 1 for a linear layer). shares: each as if full. wide: channels (in, out)."""

    path: str
    kind: str
    window: int
    stride: int
    groups: int
    space: tuple[int, int]
    wide: tuple[int, int]
    calls: int
    macs: int

    @property
    def operator(self) -> tuple[Any, ...]:
        """What is measured once: equal for layers that do the same."""
        return (self.kind, self.window, self.stride, self.groups, self.space, self.wide)

    def probe(self, width_in: int, width_out: int, empty: bool = False) -> dict[str, Any]:
        """The operator with other widths as a small network (see `edgegen.probes`); empty: its input is only read."""
        height, width = self.space
        grouped = f" groups {self.groups}" if self.groups > 1 else ""
        what = f"{self.kind} {self.window}x{self.window} /{self.stride}{grouped}"
        name = f"{what} {width_in} to {width_out} at {height}x{width}"
        if self.kind == "linear":
            body: list[list[Any]] = [] if empty else [["linear", width_out, "relu"]]
            return {"name": f"rows {height}x{width_in}" if empty else name, "input": [1, height, width_in],
                    "layers": [*body, ["mean"]]}  # fmt: skip
        if self.kind == "transposed":
            shape, layer = (height // self.stride, width // self.stride), ["transposed", width_out, self.window]
            body = [[*layer, self.stride, "relu"]]
        else:
            shape = (height * self.stride, width * self.stride)
            groups = width_out if self.kind == "depthwise" else self.groups
            body = [["conv", width_out, self.window, self.stride, groups, "relu"]]
        layers = [*([] if empty else body), ["pool", "global"]]
        name = f"image {width_in}x{shape[0]}x{shape[1]}" if empty else name
        return {"name": name, "input": [1, width_in, *shape], "layers": layers}


def layers_of(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Layer]:
    """Every convolution and linear layer that is called, in order of first call."""
    found: dict[str, list[tuple[Any, ...]]] = {}

    def see(path: str, args: Any, out: torch.Tensor) -> None:
        found.setdefault(path, []).append((tuple(args[0].shape), tuple(out.shape)))

    parts = graph.layers(module)
    handles = [part.register_forward_hook(lambda _, a, o, path=path: see(path, a, o)) for path, part in parts.items()]
    with graph.hooked(handles):
        graph.outputs(module, inputs)
    macs = graph.cost(module, inputs).layers
    return [_layer(path, parts[path], s[0][0], s[0][1], len(s), macs[path]) for path, s in found.items()]


def _layer(path: str, part: Any, shape: Sequence[int], out: Sequence[int], calls: int, macs: int) -> Layer:
    if isinstance(part, nn.Linear):
        rows = math.prod(shape[1:-1])
        return Layer(path, "linear", 1, 1, 1, (rows, 1), (part.in_features, part.out_features), calls, macs)
    wide, (window, stride) = (part.in_channels, part.out_channels), (part.kernel_size[0], part.stride[0])
    kind = "transposed" if part.transposed else "conv"
    plain = set(part.kernel_size) == {window} and set(part.stride) == {stride} and set(part.dilation) == {1}
    if not plain or len(part.kernel_size) != 2 or (kind == "transposed" and part.groups > 1):
        kind = ""
    elif part.groups > 1 and part.groups == wide[0] == wide[1]:
        kind = "depthwise"
    return Layer(path, kind, window, stride, part.groups, (*out[2:], 1, 1)[:2], wide, calls, macs)  # type: ignore[arg-type]


@dataclass
class Grid:
    """Measured times of an operator, ms at (width in, width out)."""

    ins: list[int]
    outs: list[int]
    ms: dict[tuple[int, int], float]

    def at(self, width_in: int, width_out: int) -> float:
        """Bilinear between the widths that were measured; beyond them as at the last one."""
        (a, b, x), (c, d, y) = _between(self.ins, width_in), _between(self.outs, width_out)
        low = self.ms[a, c] * (1 - x) + self.ms[b, c] * x
        return low * (1 - y) + (self.ms[a, d] * (1 - x) + self.ms[b, d] * x) * y


def _between(known: Sequence[int], value: int) -> tuple[int, int, float]:
    """The neighbours of a value in a sorted list, and how far it is from the first to the second (0..1)."""
    place = bisect.bisect_left(known, value)
    if place == 0 or place == len(known):
        end = known[0] if place == 0 else known[-1]
        return end, end, 0.0
    a, b = known[place - 1], known[place]
    return a, b, (value - a) / (b - a)


@dataclass
class Clock:
    """Predicted ms of a layer at any width. grids: operator -> times; rate: ms a MAC for what has no grid.

    scale: of all of them, where fusion makes the whole faster than its parts; rest: ms that are no operator's, spread
    over `outputs` elements. relative: no latency is known, and the whole network takes 1.
    """

    grids: dict[tuple[Any, ...], Grid] = field(default_factory=dict)
    rate: float = 1.0
    scale: float = 1.0
    rest: float = 0.0
    outputs: float = 1.0
    relative: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def ms(self, layer: Layer, width_in: int, width_out: int) -> float:
        """Its time and its part of the rest, for all its calls."""
        size = layer.calls * width_out * math.prod(layer.space)
        return self.scale * self._own(layer, width_in, width_out) + self.rest * size / self.outputs

    def _own(self, layer: Layer, width_in: int, width_out: int) -> float:
        grid = self.grids.get(layer.operator)
        if grid is not None:
            return layer.calls * grid.at(width_in, width_out)
        share = width_out / layer.wide[1] * (1.0 if layer.kind == "depthwise" else width_in / layer.wide[0])
        return self.rate * layer.macs * share

    def whole(self, layers: Sequence[Layer]) -> float:
        """The network as it is."""
        return sum(self.ms(layer, *layer.wide) for layer in layers)


def clock(
    layers: Sequence[Layer], widths: Mapping[str, tuple[Sequence[int], Sequence[int]]], original: float, job: Job
) -> Clock:
    """A clock that takes `original` ms for the whole network.

    Args:
        widths: path -> the widths (in, out) at which to measure its operator; paths that are missing keep theirs.
        original: measured ms of the network; NaN where there is none: then the whole network takes 1.
    """
    whole = original if math.isfinite(original) else 1.0
    macs = sum(layer.macs for layer in layers)
    told: dict[str, Any] = {"source": "MACs of each layer: predicted"}
    made = Clock(rate=whole / max(1, macs), relative=not math.isfinite(original), notes=told)
    if job.operators is None or not math.isfinite(original):
        return made
    grids, more = _measured(layers, widths, job)
    known = [layer for layer in layers if layer.operator in grids]
    if not known:
        return Clock(rate=made.rate, notes=told | more)
    measured = sum(layer.calls * grids[layer.operator].at(*layer.wide) for layer in known)
    made = Clock(grids, rate=measured / max(1, sum(layer.macs for layer in known)))
    total = sum(made._own(layer, *layer.wide) for layer in layers)
    made.scale = min(1.0, original / total)
    made.rest = original - made.scale * total
    made.outputs = sum(layer.calls * layer.wide[1] * math.prod(layer.space) for layer in layers)
    foreign = [layer.path for layer in layers if layer.operator not in grids]
    made.notes = {"source": "operator table", **more, "operators_ms": total, "by_macs": foreign}
    return made


def _measured(
    layers: Sequence[Layer], widths: Mapping[str, tuple[Sequence[int], Sequence[int]]], job: Job
) -> tuple[dict[tuple[Any, ...], Grid], dict[str, Any]]:
    """(operator -> its grid, figures about the table). An operator of which one time is missing has no grid."""
    plans: dict[tuple[Any, ...], tuple[Layer, list[int], list[int]]] = {}
    for layer in (layer for layer in layers if layer.kind):
        ins, outs = widths.get(layer.path, ((), ()))
        _, a, b = plans.get(layer.operator, (layer, [], []))
        plans[layer.operator] = (layer, sorted({*a, *ins, layer.wide[0]}), sorted({*b, *outs, layer.wide[1]}))
    points = {op: [(i, o) for i in ins for o in outs if layer.kind != "depthwise" or i == o]
              for op, (layer, ins, outs) in plans.items()}  # fmt: skip
    full = {op: {pair: plans[op][0].probe(*pair) for pair in pairs} for op, pairs in points.items()}
    empty = {op: {i: layer.probe(i, i, empty=True) for i in ins} for op, (layer, ins, _) in plans.items()}
    wanted = {probe["name"]: probe for made in (full, empty) for probes in made.values() for probe in probes.values()}
    found = list(job.operators(list(wanted.values()))) if job.operators is not None and wanted else []
    times = dict(zip(wanted, found, strict=True))
    grids = {}
    for op, probes in full.items():
        layer, ins, outs = plans[op]
        pairs = {pair: times[probe["name"]] for pair, probe in probes.items()}
        read = {i: times[probe["name"]] for i, probe in empty[op].items()}
        if all(map(_usable, (*pairs.values(), *read.values()))):
            ms = {(i, o): max(m.value - read[i].value, LEAST * m.value) for (i, o), m in pairs.items()}
            if layer.kind == "depthwise":
                ms = {(i, o): ms[o, o] for i in outs for o in outs}
                ins = outs
            grids[op] = Grid(ins, outs, ms)
    alive = [m for m in found if _usable(m)]
    spreads = sorted(float(m.conditions.get("spread", 0.0)) for m in alive)
    lost = next((m.reason for m in found if not _usable(m)), "")
    told = {
        "table": next((str(m.conditions["table"]) for m in alive if "table" in m.conditions), ""),
        "measured": len(alive), "not_measured": len(found) - len(alive), "why_not": lost,
        "spread": spreads[len(spreads) // 2] if spreads else 0.0,
        "busy": any(m.conditions.get("busy") for m in alive),
    }  # fmt: skip
    return grids, told


def _usable(found: Measurement) -> bool:
    return found.status == "measured" and math.isfinite(found.value) and found.value > 0
