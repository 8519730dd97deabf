"""What INT8 costs layer by layer: outputs of real Q/DQ graphs in ONNX Runtime, with one part in INT8, or all but one.

Label-free by the distance of outputs (signal to quantization noise; Kullback-Leibler divergence of class probabilities
for classifiers), or by the task's own figure. Every graph is what `onnx_qdq` writes for a build, so it rounds where
builds round; ranges are calibrated once and handed from graph to graph in `plan.scales`.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, graph, onnx_cost, onnx_exact, onnx_graph, onnx_narrow, onnx_qdq
from edgegen.passes import _simulate
from edgegen.types import Graph, Job, Model

MEASURES = ("output", "metric")
_MOST_DB = 200.0  # nothing differs


@dataclass(frozen=True)
class Row:
    """A layer of the graph: its cost, and what INT8 does to the network's output.

    noise: distance of the output with this layer alone in INT8 (share of noise power; KL divergence for classes; loss
    of the task's figure). sqnr_db: the same as signal to noise ratio. recovers: what comes back when it alone is left
    in float, in dB of that ratio, or in units of the task's figure. four_bits: noise and sqnr_db with its weight stored
    in 4 bits; None where that was not asked for, or the weight is too small to count, or none that 4 bits hold.
    """

    name: str
    kind: str
    macs: int
    weights: int
    noise: float
    sqnr_db: float
    recovers: float
    four_bits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Found:
    """rows in graph order; sqnr_db of the network with everything in INT8; groups: kind or block -> recovers."""

    rows: tuple[Row, ...]
    sqnr_db: float
    figure: float | None
    groups: dict[str, float]


class Simulator:
    """Outputs of the network's graph on samples under any INT8 plan.

    layers: those that may be INT8, in graph order. last: those of them with no other layer between them and an output.
    """

    def __init__(self, model: Model, job: Job, folder: Path, samples: Sequence[tuple[np.ndarray, ...]]) -> None:
        self.model, self.folder, self.samples = model, folder, samples
        for spec, values in zip(model.stage.inputs, zip(*samples, strict=True), strict=True):
            np.save(folder / f"{spec.name}.npy", np.concatenate(values))
        made = onnx_graph.to_onnx(model.stage, folder / "float.onnx", opset=job.target.opset)
        self.graph: Graph = dataclasses.replace(made, preprocessing=model.preprocessing)
        self.plan = dataclasses.replace(_simulate.plan_of(job.target), scales=model.plan.scales)
        scales = onnx_qdq.activation_ranges(self.graph, folder, self.plan)
        self.plan = dataclasses.replace(self.plan, scales=scales)
        proto = onnx.load(self.graph.onnx)
        able = set(onnx_qdq.quantized_nodes(proto, self.plan))
        weighted = onnx_cost.cost(proto).layers
        self.layers = [layer for layer in weighted if layer.name in able]
        self.last = _last(proto, {layer.name for layer in weighted}) & {layer.name for layer in self.layers}
        self._factors: list[float] = []
        self.exact = self._run(self.graph.onnx)

    def outputs(self, float_layers: Sequence[str] = (), four_bits: Collection[str] = ()) -> np.ndarray:
        """Outputs (N, ...) with these layers in float; the float network's where that leaves nothing in INT8.

        four_bits: layers whose weights are stored so.
        Several outputs become one (N, sum of their sizes), each scaled to the same power: so none is drowned.
        """
        if {layer.name for layer in self.layers} <= set(float_layers):
            return self.exact
        plan = dataclasses.replace(self.plan, float_layers=tuple(float_layers))
        if four_bits:
            wide = tuple(layer.name for layer in self.layers if layer.name not in four_bits)
            plan = dataclasses.replace(plan, weights="int4", eight_bits=wide)
        made = onnx_qdq.insert_qdq(self.graph, self.folder / "int8.onnx", calibration=self.folder, plan=plan)
        return self._run(made.onnx)

    def four_bits(self) -> tuple[str, ...]:
        """The layers whose weights 4 bits can hold, and are large enough to count."""
        proto = onnx.load(self.graph.onnx)
        held = onnx_narrow.axes(proto, [layer.name for layer in self.layers])
        return tuple(layer.name for layer in self.layers if layer.weight in held)

    def _run(self, path: Path) -> np.ndarray:
        session = onnx_exact.session(path, threads=1)
        names = [spec.name for spec in self.graph.inputs]
        found = [session.run(None, dict(zip(names, sample, strict=True))) for sample in self.samples]
        parts = [np.concatenate(one).astype(np.float64) for one in zip(*found, strict=True)]
        if len(parts) == 1:
            return parts[0]
        if not self._factors:  # the first run is that of the float network
            self._factors = [1 / max(1e-15, float(np.linalg.norm(part))) for part in parts]
        rows = [part.reshape(len(part), -1) * factor for part, factor in zip(parts, self._factors, strict=True)]
        return np.concatenate(rows, axis=1)


def _last(proto: onnx.ModelProto, layers: set[str]) -> set[str]:
    """The layers that are met first on every way back from an output: what the output's own steps come from."""
    made = {name: node for node in proto.graph.node for name in node.output}
    queue, seen, found = [output.name for output in proto.graph.output], set(), set()
    while queue:
        name = queue.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        if made[name].name in layers:
            found.add(made[name].name)
        else:
            queue.extend(made[name].input)
    return found


@contextmanager
def simulator(model: Model, job: Job, samples: Sequence[tuple[np.ndarray, ...]]) -> Iterator[Simulator]:
    """A simulator with its files in a folder that goes away.

    Raises:
        ValueError: the network cannot be exported or has nothing for INT8.
    """
    with tempfile.TemporaryDirectory(prefix="edgegen-") as name:
        try:
            made = Simulator(model, job, Path(name), samples)
        except errors.EdgegenError as error:
            raise ValueError(f"the sensitivity of {model.name} cannot be measured: {error}") from error
        if not made.layers:
            raise ValueError(f"{model.name} has no layer for INT8")
        yield made


def sqnr(exact: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise ratio in dB, at most 200."""
    noise = float(np.square(exact - found).sum()) / max(1e-30, float(np.square(exact).sum()))
    return _MOST_DB if noise <= 10 ** (-_MOST_DB / 10) else -10 * math.log10(noise)


def divergence(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of class probabilities, from logits (N, classes)."""

    def logs(x: np.ndarray) -> np.ndarray:
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    p, q = logs(exact), logs(found)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def distance(model: Model, exact: np.ndarray, found: np.ndarray) -> float:
    """What is added up over layers: KL divergence for classes, else the share of noise power."""
    if model.task == "classification" and exact.ndim == 2 and len(model.stage.outputs) == 1:
        return max(0.0, divergence(exact, found))
    return 10 ** (-sqnr(exact, found) / 10)


def figure(model: Model, job: Job, count: int) -> Callable[[np.ndarray], float]:
    """Outputs of `samples_of` -> the task's figure, higher is better: points of top-1, or PSNR in dB.

    Raises:
        ValueError: the data has neither labels nor reference images, or the network has several inputs or outputs.
    """
    if len(model.stage.outputs) != 1:
        number = len(model.stage.outputs)
        raise ValueError(f"sensitivity metric judges one output, and {model.name} has {number}; use output")
    found = samples_of(model, job, count)
    if model.task == "classification" and found and found[0].label is not None:
        labels = np.array([sample.label for sample in found])
        return lambda outputs: 100.0 * float((outputs.argmax(1) == labels).mean())
    if found and found[0].reference is not None:
        low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
        wanted = np.stack([sample.reference for sample in found]).astype(np.float64)

        def psnr(outputs: np.ndarray) -> float:
            wrong = np.square(np.clip(outputs, low, high) - wanted).reshape(len(wanted), -1).mean(1)
            return float(np.mean(-10 * np.log10(np.maximum(wrong, 1e-12) / (high - low) ** 2)))

        return psnr
    raise ValueError("sensitivity metric needs data with labels or reference images; use output, or give --data")


def measure(
    job: Job, sim: Simulator, by: str, score: Callable[[np.ndarray], float] | None = None, narrow: bool = False
) -> Found:
    """The sensitivity of every layer, and of every operation type and block.

    Args:
        by: "output", or "metric" with `score`: outputs -> figure, higher is better. narrow: weights in 4 bits as well.
    """
    if by not in MEASURES or (by == "metric") != (score is not None):
        raise ValueError(f"sensitivity must be one of {', '.join(MEASURES)}, got {by!r}")
    names = [layer.name for layer in sim.layers]

    def value(outputs: np.ndarray) -> float:
        return score(outputs) if score is not None else sqnr(sim.exact, outputs)

    def noise(outputs: np.ndarray) -> float:
        if score is None:
            return distance(sim.model, sim.exact, outputs)
        return max(0.0, value(sim.exact) - value(outputs))

    able = sim.four_bits() if narrow else ()
    full = sim.outputs()
    whole, rows = value(full), []
    for number, layer in enumerate(sim.layers):
        job.progress(layer.name, number / len(names))
        others = [name for name in names if name != layer.name]
        alone = sim.outputs(others)
        without = value(sim.outputs([layer.name]))
        four = None
        if layer.name in able:
            narrowed = sim.outputs(others, [layer.name])
            four = noise(narrowed), sqnr(sim.exact, narrowed)
        rows.append(Row(layer.name, layer.op, layer.macs, layer.params, noise(alone), sqnr(sim.exact, alone),
                        without - whole, four))  # fmt: skip
    groups = {}
    for label, members in _groups(sim).items():
        groups[label] = value(sim.outputs(members)) - whole
    return Found(tuple(rows), sqnr(sim.exact, full), whole if score is not None else None, groups)


def _groups(sim: Simulator) -> dict[str, list[str]]:
    """Operation types where there are several, and blocks: the modules that hold two layers or more, but not all."""
    kinds: dict[str, list[str]] = {}
    blocks: dict[str, list[str]] = {}
    for layer in sim.layers:
        kinds.setdefault(layer.op, []).append(layer.name)
        blocks.setdefault(layer.name.rpartition("/")[0].rpartition(".")[0], []).append(layer.name)
    found = {f"type {kind}": members for kind, members in kinds.items() if len(kinds) > 1}
    return found | {
        f"block {path}": members for path, members in blocks.items() if path and 1 < len(members) < len(sim.layers)
    }


def samples_of(model: Model, job: Job, count: int) -> list[Any]:
    """At most `count` samples, drawn under the job's seed: the first ones of a folder are all of one class.

    Empty where there is no data, or a network has more inputs than data have.
    """
    if job.data is None or len(model.stage.inputs) != 1:
        return []
    chosen = job.data.select(count, job.seed)
    return [chosen[i] for i in range(len(chosen))]


def inputs_of(model: Model, job: Job, count: int) -> tuple[list[tuple[np.ndarray, ...]], str]:
    """`count` inputs, each a batch of one: those of `samples_of`, or made up."""
    from edgegen.passes import _lessons

    if found := samples_of(model, job, count):
        return [(sample.input[None].astype(np.float32),) for sample in found], "data"
    if model.stage.module is None:
        generator = (graph.example_inputs(model.stage, seed=job.seed + i, preprocessing=model.preprocessing)
                     for i in range(count))  # fmt: skip
        return [tuple(value.numpy() for value in sample) for sample in generator], "random values"
    inputs, source = _lessons.some_inputs(model, job, count)
    return [tuple(value.numpy() for value in sample) for sample in inputs], source
