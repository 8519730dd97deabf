"""Take back the mean shift that INT8 rounding gives to each layer's output, by its bias.

Nagel, van Baalen, Blankevoort, Welling, 2019, arXiv:1906.04721, section 4.2 and appendix D (empirical bias correction):
b' = b - (E[quantized output] - E[float output]) for each channel, layer after layer in the order in which they run, so
that each correction sees the layers before it corrected. Batch norms are folded first. The mean is taken over data, in
the INT8 network of `_simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.passes import _flow, _simulate
from edgegen.passes.equalize import batches
from edgegen.types import Job, Model, PassResult


def correct_bias(model: Model, job: Job, *, samples: int = 32) -> PassResult:
    """Change biases so that the mean output of every INT8 layer is that of the float network.

    Args:
        samples: how many inputs the means are taken over; all are held in memory at once.
    Returns:
        PassResult; `changed` has each layer's largest shift, in units of the standard deviation of its output.
    Raises:
        ValueError: an option out of range, a model without a network, or one that cannot be INT8.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    inputs, source = batches(model, job, samples, "correct_bias")
    result = graph.clone(model.stage.module).eval()
    with torch.no_grad(), training.use_threads(job.threads):
        _flow.fold(result, inputs[0])
        found = _simulate.placement(model, result, inputs, _simulate.plan_of(job.target))
        stacked = [torch.cat(values) for values in zip(*inputs, strict=True)]
        once = set(_flow.layers(result, _flow.record(result, inputs[0])).values())
        names = [name for name in found.layers if name in once]
        wanted = _means(result, names, stacked)
        exact = graph.outputs(result, stacked)
        before = error(exact, graph.flatten(_simulate.run(result, stacked, found)))
        shifts = _corrected(result, names, stacked, found, wanted)
        after = error(exact, graph.flatten(_simulate.run(result, stacked, found)))
    changed = {name: f"mean output shifted back by up to {size:.2g} of its deviation" for name, size in shifts.items()}
    skipped = {
        name: "runs more than once, or shares its weight" if name in found.layers else "is not INT8 in a build"
        for name in graph.layers(result) if name not in changed
    }  # fmt: skip
    notes = {
        "inputs": source, "samples": samples, "largest_shift": max(shifts.values(), default=0.0),
        "output_error_before": before, "output_error_after": after,
    }  # fmt: skip
    return PassResult(model.with_module(result), changed, skipped, notes)


def channel_axis(layer: nn.Module, value: torch.Tensor) -> int:
    """Where the output channels of a layer's result are; a batch axis is there or not."""
    return value.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _means(module: nn.Module, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> dict[str, tuple[Any, Any]]:
    """Mean and standard deviation of each output channel."""
    found: dict[str, tuple[Any, Any]] = {}

    def catch(name: str, layer: nn.Module, out: torch.Tensor) -> None:
        rows = out.movedim(channel_axis(layer, out), 0).flatten(1).double()
        found[name] = rows.mean(1), rows.std(1, correction=0)

    handles = [
        module.get_submodule(name).register_forward_hook(lambda layer, args, out, name=name: catch(name, layer, out))
        for name in names
    ]
    with graph.hooked(handles):
        module(*inputs)
    return found


def _corrected(
    module: nn.Module, names: Sequence[str], inputs: Sequence[torch.Tensor], found: _simulate.Placement,
    wanted: dict[str, tuple[Any, Any]],
) -> dict[str, float]:  # fmt: skip
    """Correct all layers in one run: whatever runs after a layer sees its corrected output."""
    shifts: dict[str, float] = {}
    mode = _Correcting(found.points, found.ranges, module, names, wanted, shifts)
    given = [mode.apply(-1 - i, value) for i, value in enumerate(inputs)]
    with graph.hooked(mode.watch()), _simulate.int8_weights(module, found.layers, levels=found.levels), mode:
        module(*given)
    return shifts


class _Correcting(_simulate.Rounding):
    """Before a layer's result is rounded, its mean is set right, and the layer's bias with it."""

    def __init__(self, points: Any, ranges: Any, module: nn.Module, names: Any, wanted: Any, shifts: Any) -> None:
        super().__init__(points, ranges)
        self.parts = {id(module.get_submodule(name)): name for name in names}
        self.module, self.wanted, self.shifts = module, wanted, shifts
        self.open: list[str] = []

    def watch(self) -> list[Any]:
        """Hooks that tell which layer is running."""
        handles = []
        for name in self.parts.values():
            layer = self.module.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self.open.append(name)))
            handles.append(layer.register_forward_hook(lambda *_: self._leave()))
        return handles

    def _leave(self) -> None:
        self.open.pop()

    def after(self, index: int, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """The result with its mean set right, then rounded."""
        if name in _flow.WEIGHTED and self.open:
            out = self._shifted(self.open[-1], out)
        return self.apply(index, out)

    def _shifted(self, name: str, out: torch.Tensor) -> torch.Tensor:
        layer = self.module.get_submodule(name)
        axis = channel_axis(layer, out)
        mean, deviation = self.wanted[name]
        shift = mean - out.movedim(axis, 0).flatten(1).double().mean(1)
        _flow.bias_of(layer).data.add_(shift.float())
        self.shifts[name] = float((shift.abs() / deviation.clamp_min(1e-6)).max())
        shape = [1] * out.ndim
        shape[axis] = -1
        return out + shift.float().reshape(shape)


def error(exact: Sequence[torch.Tensor], rough: Sequence[torch.Tensor]) -> float:
    """Squared error relative to the square of the exact values."""
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(exact, rough, strict=True))
    return wrong / max(1e-12, sum(float(a.double().square().sum()) for a in exact))
