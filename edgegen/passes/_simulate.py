"""An INT8 build in torch: the same tensors are rounded to the same steps as in the Q/DQ file that runtimes build from.

Where a build rounds is decided on the ONNX graph (`onnx_qdq`). So that graph is made and quantized, and each tensor
with a QuantizeLinear is found again among the torch calls by its value on a real input: names of intermediate tensors
mean nothing. Jacob et al., 2018, arXiv:1712.05877; gradients pass the rounding as if it were not there (Bengio et al.,
2013, arXiv:1308.3432).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from edgegen import errors, onnx_cost, onnx_exact, onnx_graph, onnx_narrow, onnx_qdq
from edgegen.passes import _flow, _plans, _scaling
from edgegen.types import Graph, Model, PrecisionPlan, Target

_CLOSE = 1e-3  # largest difference of a tensor in torch and in ONNX Runtime, as a fraction of its peak


@dataclass(frozen=True)
class Placement:
    """Where an INT8 build rounds. points: torch call (-1 - i: network input i) -> name of the graph node, or input.

    ranges: name -> (low, high) of its 256 steps. layers: paths of layers with INT8 weights. missing: tensors that the
    build rounds and torch has no call for. steps: path of a layer whose weight is stored in 4 bits -> step of its 15
    levels, one an output channel, shaped to go with the weight. levels: the largest integer of the other weights.
    """

    points: dict[int, str]
    ranges: dict[str, tuple[float, float]]
    layers: tuple[str, ...]
    missing: tuple[str, ...]
    steps: Mapping[str, torch.Tensor] = field(default_factory=dict)
    levels: int = _scaling.EIGHT_BITS


def plan_of(target: Target, weights: str = "int8") -> PrecisionPlan:
    """The plan of the target's INT8 build that stores its weights so: one of _plans.WEIGHTS.

    This host's has weights of 7 bits where its processor would cut off larger sums, as its runtimes offer.

    Raises:
        ValueError: another one.
    """
    if weights not in _plans.WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(_plans.WEIGHTS)}, got {weights!r}")
    kind = "u8s7" if target.is_host and onnx_exact.saturates() else "u8s8"
    return PrecisionPlan("int8", kind, weights="" if weights == "int8" else weights)


def placement(
    model: Model, module: nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], plan: PrecisionPlan
) -> Placement:
    """Quantize `module` as ONNX Runtime's INT8 build would, calibrated on `inputs`, and find the places in torch.

    Raises:
        ValueError: the network cannot be exported, or nothing in it can be INT8.
    """
    stage = dataclasses.replace(model.stage, module=module)
    with tempfile.TemporaryDirectory(prefix="edgegen-") as name:
        folder = Path(name)
        for i, spec in enumerate(stage.inputs):
            np.save(folder / f"{spec.name}.npy", np.concatenate([np.asarray(sample[i]) for sample in inputs]))
        try:
            graph = onnx_graph.to_onnx(stage, folder / "float.onnx")
            graph = dataclasses.replace(graph, preprocessing=model.preprocessing)
            made = onnx_qdq.insert_qdq(graph, folder / "int8.onnx", calibration=folder, plan=plan)
        except errors.EdgegenError as error:
            raise ValueError(f"no INT8 graph can be made of {model.name}: {error}") from error
        source, quantized = onnx.load(graph.onnx), onnx.load(made.onnx)
        tensors = _rounded(quantized, {spec.name for spec in stage.inputs} | _outputs(source))
        values = _values(source, graph, sorted(tensors), inputs[0])
    makers = {output: node for node in source.graph.node for output in node.output}
    calls = _flow.record(module, inputs[0], values=True)
    places = {spec.name: -1 - i for i, spec in enumerate(stage.inputs)}
    points, ranges, missing = {}, {}, []
    for tensor, span in tensors.items():
        name = makers[tensor].name if tensor in makers else tensor
        index = places[tensor] if tensor in places else _find(values[tensor], name, calls)
        if index is None:
            missing.append(name)
        else:
            points[index], ranges[name] = name, span
    layers = _layers(quantized, module)
    steps = {path: step for path, step in layers.items() if step is not None}
    levels = onnx_narrow.SEVEN_BITS if plan.format.endswith("s7") else _scaling.EIGHT_BITS
    return Placement(points, ranges, tuple(layers), tuple(missing), steps, levels)


def _outputs(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def _rounded(model: onnx.ModelProto, computed: set[str]) -> dict[str, tuple[float, float]]:
    """Computed tensors that go through QuantizeLinear -> range of their steps; in the order of the graph.

    A graph output keeps its name behind the rounding, so there what is rounded has another.
    """
    consts = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    behind = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    found = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        name = next((n for n in (node.input[0], behind.get(node.output[0], "")) if n in computed), "")
        if name:
            scale, zero = float(consts[node.input[1]]), int(consts[node.input[2]])
            found[name] = (-zero * scale, (255 - zero) * scale)
    return found


def _values(
    model: onnx.ModelProto, graph: Graph, tensors: Sequence[str], sample: Sequence[torch.Tensor]
) -> dict[str, np.ndarray]:
    """Values of the named tensors in the float graph on one input."""
    import onnxruntime

    names = {spec.name for spec in graph.inputs}
    wanted = [name for name in tensors if name not in names]
    kinds = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
    del model.graph.output[:]
    model.graph.output.extend(kinds[name] for name in wanted)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {spec.name: np.asarray(value) for spec, value in zip(graph.inputs, sample, strict=True)}
    return dict(zip(wanted, session.run(wanted, feeds), strict=True)) if wanted else {}


def _find(value: np.ndarray, node: str, calls: Sequence[_flow.Call]) -> int | None:
    """The call whose result has this value; of several (a dropout changes nothing) one in the node's own module."""
    close = _CLOSE * max(float(np.abs(value).max()), 1e-12)
    alike = [call for call in calls if call.value is not None and call.shape == value.shape]
    same = [call for call in alike if call.value is not None and np.abs(call.value.numpy() - value).max() < close]
    own = [call for call in same if call.path == node.rpartition("/")[0]]
    return next((call.index for call in (*own, *same)), None)


def _layers(quantized: onnx.ModelProto, module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Path of each layer whose weight the file stores as integers -> the steps where these have 4 bits, else None.

    A product that a module makes with another's weight (an embedding's table) is no layer, and stays as it is.
    """
    consts = onnx_cost.constants(quantized)
    makers = {name: node for node in quantized.graph.node for name in node.output}
    modules = dict(module.named_modules())
    found: dict[str, torch.Tensor | None] = {}
    for node in quantized.graph.node:
        path, dequantize = node.name.rpartition("/")[0], makers.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type not in onnx_cost.WEIGHTED or dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        weight, layer = onnx_cost.weight_of(node, consts, makers), modules.get(path)
        if weight and layer is not None and "weight" in layer._parameters and path not in found:
            steps = torch.from_numpy(numpy_helper.to_array(consts[dequantize.input[1]]).copy())
            narrow = consts[weight].data_type == onnx.TensorProto.INT4
            found[path] = _scaling.by_output(layer, steps) if narrow else None
    return found


def rounded(x: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """x on the 256 steps of [low, high], which holds 0; differentiable in x, low and high."""
    step = (high - low) / 255
    found: torch.Tensor = _Rounded.apply(x, step, _through(-low / step))
    return found


class _Rounded(torch.autograd.Function):
    """(clamp(x / step + zero, 0, 255) - zero) * step with the quotient rounded, whose gradient is 1: the sum of a dozen
    operations in a few walks over memory, keeping nothing but x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, step, zero)
        return (x / step).round_().clamp_(-zero, 255 - zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (grad,) = grads
        x, step, zero = ctx.saved_tensors
        exact = x / step
        near = exact.round()
        level = near.clamp(-zero, 255 - zero)
        to_x = grad * (level == near)
        # inside, a step more moves the result by the rounding; outside, by the last level
        to_step = torch.dot(grad.flatten(), level.flatten()) - torch.dot(to_x.flatten(), exact.flatten())
        return to_x, to_step, step * (to_x.sum() - grad.sum())


def _through(x: torch.Tensor) -> torch.Tensor:
    """Round; the gradient is 1."""
    return x + (x.round() - x).detach()


def fake_weight(
    layer: Any, weight: torch.Tensor, steps: torch.Tensor | None = None, levels: int = _scaling.EIGHT_BITS
) -> torch.Tensor:
    """The weight on the INT8 grid of its largest magnitudes by output channel; differentiable in the weight.

    steps: of 15 levels, for a weight stored in 4 bits; then differentiable in the steps too.
    """
    if steps is not None:
        return torch.clamp(_through(weight / steps), -onnx_narrow.LEVELS, onnx_narrow.LEVELS) * steps
    steps = _scaling.grid(layer, levels)
    return weight + ((weight / steps).round().clamp(-levels, levels) * steps - weight).detach()


class Rounding(_flow.Counting):
    """Every tensor of a placement is rounded while this is active; ranges may be learned tensors."""

    def __init__(self, points: Mapping[int, str], ranges: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__()
        self.points, self.ranges = points, ranges

    def after(self, index: int, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """The result, rounded where the placement says so."""
        return self.apply(index, out)

    def apply(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """`value` of call (or input) `index`, rounded where the placement says so."""
        if index not in self.points:
            return value
        low, high = (torch.as_tensor(v, dtype=torch.float32) for v in self.ranges[self.points[index]])
        return rounded(value.float(), low, high)


def run(
    module: nn.Module, inputs: Sequence[torch.Tensor], found: Placement,
    ranges: Mapping[str, tuple[Any, Any]] | None = None, *, weights: bool = True,
    steps: Mapping[str, torch.Tensor] | None = None,
) -> Any:  # fmt: skip
    """The network's output as an INT8 build gives it; biases keep their float values."""
    mode = Rounding(found.points, found.ranges if ranges is None else ranges)
    given = [mode.apply(-1 - i, value) for i, value in enumerate(inputs)]
    steps = found.steps if steps is None else steps
    with int8_weights(module, found.layers if weights else (), steps, found.levels), mode:
        return module(*given)


@contextmanager
def int8_weights(
    module: nn.Module, layers: Sequence[str], steps: Mapping[str, torch.Tensor] = MappingProxyType({}),
    levels: int = _scaling.EIGHT_BITS,
) -> Any:  # fmt: skip
    """The named layers compute with rounded weights inside; gradients reach the weights themselves."""
    held = {name: module.get_submodule(name) for name in layers}
    weights = {name: layer.get_parameter("weight") for name, layer in held.items()}
    try:
        for name, layer in held.items():
            value = fake_weight(layer, weights[name], steps.get(name), levels)
            del layer._parameters["weight"]
            layer.__dict__["weight"] = value
        yield
    finally:
        for name, layer in held.items():
            layer.__dict__.pop("weight", None)
            layer._parameters["weight"] = weights[name]
