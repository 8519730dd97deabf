"""Round weights up or down so that each layer's output is reproduced, not each weight.

AdaRound: Nagel, Amjad, van Baalen, Louizos, Blankevoort, 2020, Up or Down? Adaptive Rounding for Post-Training
Quantization, arXiv:2004.10568, section 3: min ||f(Wx) - f(W~x~)||^2 + l f_reg(V), W~ = s (floor(W / s) + h(V)), h a
stretched sigmoid, the regularisation pulling h to 0 or 1 as its exponent falls. Layer after layer: x from the float
network, x~ from the one whose earlier layers are rounded already. The weights end on the grid of the builds (for
INT8 largest magnitude / 127 for each output channel), so every runtime finds the same integers again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from edgegen import graph, onnx_narrow, registry, training
from edgegen.passes import _flow, _scaling, _simulate
from edgegen.passes.correct_bias import channel_axis, error
from edgegen.passes.equalize import batches
from edgegen.types import Job, Model, PassResult

_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched beyond 0 and 1, so that it reaches them
_BETA = (20.0, 2.0)  # exponent of the regularisation, first and last
_FREE = 0.2  # share of the steps without regularisation


def round_adaptively(
    model: Model,
    job: Job,
    *,
    samples: int = 32,
    steps: int = 500,
    lr: float = 1e-2,
    batch: int = 8,
    regularisation: float = 0.01,
    need: float = 45.0,
    weights: str = "int8",
    layers: Sequence[str] = (),
) -> PassResult:
    """Choose the rounding of the weights of the layers that need it.

    Args:
        samples: how many inputs; each layer's inputs and outputs for all of them are in memory at once.
        steps, lr, batch: Adam on the rounding variables of one layer; inputs in one step.
        need: layers whose output keeps this signal to noise ratio in dB under rounding to nearest are left to that.
        weights: how the build stores them: int8, or int4 (15 levels; `quantize` must ask for the same).
        layers: only these, whatever they need; none: all that need it.
    Returns:
        PassResult; `changed` has each layer's ratio for rounding to nearest and for the chosen rounding.
    Raises:
        ValueError: an option out of range, an unknown layer, a model without a network or one that cannot be INT8.
    """
    if min(samples, steps, batch) < 1 or not lr > 0 or not regularisation >= 0:
        raise ValueError(
            f"samples, steps, batch and lr must be positive and regularisation 0 or more, got {samples}, {steps},"
            f" {batch}, {lr}, {regularisation}"
        )
    plan = _simulate.plan_of(job.target, weights)
    inputs, source = batches(model, job, samples, "round_adaptively")
    exact = graph.clone(model.stage.module).eval()
    with training.use_threads(job.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        with torch.no_grad():
            _flow.fold(exact, inputs[0])
        flags = [parameter.requires_grad for parameter in exact.parameters()]
        exact.requires_grad_(False)
        rough = graph.clone(exact)
        with torch.no_grad():
            found = _simulate.placement(model, exact, inputs[:1], plan)
        names, skipped = _candidates(model, exact, inputs[0], found.layers, layers)
        stacked = [torch.cat(values) for values in zip(*inputs, strict=True)]
        changed: dict[str, str] = {}
        for number, (name, relu) in enumerate(names.items()):
            job.progress(name, number / len(names))
            task = _Task(name, exact, rough, stacked, relu, found)
            nearest = task.quality(task.nearest())
            chosen = None
            if nearest < need or layers:
                chosen = task.solve(steps, lr, batch, regularisation)
            told = _settle(task, nearest, chosen, changed)
            if told:
                skipped[name] = told
    for name in names:  # what was rounded to nearest for the layers behind it keeps its float weights: a build rounds
        if name not in changed:
            weight = exact.get_submodule(name).get_parameter("weight")
            rough.get_submodule(name).get_parameter("weight").data = weight.data.clone()
    if not changed:
        rough = graph.clone(model.stage.module).eval()
    else:
        for parameter, flag in zip(rough.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return PassResult(model.with_module(rough), changed, skipped, {"inputs": source, "samples": samples})


def _candidates(
    model: Model, module: nn.Module, sample: Sequence[torch.Tensor], eight: Sequence[str], asked: Sequence[str]
) -> tuple[dict[str, bool], dict[str, str]]:
    """({layer: whether a ReLU alone follows it} in the order in which they run, {other layer: why not})."""
    every = graph.layers(module)
    for name in asked:
        if name not in every:
            raise ValueError(f"layers: no layer {name!r} in {model.name}{registry.near(name, tuple(every))}")
    with torch.no_grad():
        calls = _flow.record(module, sample)
    chosen = {}
    for index, path in _flow.layers(module, calls).items():
        if path in eight and (not asked or path in asked):
            users = calls[index].users
            chosen[path] = len(users) == 1 and users[0] >= 0 and calls[users[0]].name == "relu"
    why = {name: "not asked for" if asked and name not in asked else "is not INT8 in a build, or runs more than once"
           for name in every if name not in chosen}
    return chosen, why


def _settle(task: _Task, nearest: float, chosen: torch.Tensor | None, changed: dict[str, str]) -> str:
    """Put the better rounding into the rough network; why it is rounding to nearest, or "" and a line in `changed`."""
    found = task.quality(chosen) if chosen is not None else -math.inf
    better = chosen is not None and found > nearest
    task.layer.weight.data = chosen if chosen is not None and better else task.nearest()
    if better:
        kind = "INT8" if task.steps is None else "INT4"
        told = f"{nearest:.1f} dB rounded to nearest, {found:.1f} dB as chosen"
        changed[task.name] = f"weights on the {kind} grid: {told}"
        return ""
    tried = f", the chosen one {found:.1f}" if chosen is not None else ""
    return f"rounding to nearest keeps {nearest:.1f} dB{tried}"


class _Task:
    """One layer: what goes into it in the rough network, and what comes out in the exact one."""

    def __init__(
        self, name: str, exact: nn.Module, rough: nn.Module, inputs: Sequence[torch.Tensor], relu: bool,
        found: _simulate.Placement,
    ) -> None:  # fmt: skip
        self.name, self.layer, self.relu = name, rough.get_submodule(name), relu
        self.steps, self.levels = found.steps.get(name), found.levels
        self.grid = _scaling.grid(self.layer, self.levels) if self.steps is None else self.steps
        self.limit = self.levels if self.steps is None else onnx_narrow.LEVELS
        caught: dict[str, torch.Tensor] = {}
        handles = [
            self.layer.register_forward_pre_hook(lambda _, args: caught.update(x=args[0])),
            exact.get_submodule(name).register_forward_hook(lambda _, args, out: caught.update(y=out)),
        ]
        with graph.hooked(handles), torch.no_grad():
            rough(*inputs)
            exact(*inputs)
        self.x, y = caught["x"], caught["y"]
        self.y = y.relu() if relu else y

    def output(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with another weight."""
        out = torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        return out.relu() if self.relu else out

    def quality(self, weight: torch.Tensor) -> float:
        """Signal to noise ratio of the output in dB."""
        with torch.no_grad():
            return -10 * math.log10(max(1e-20, error([self.y], [self.output(weight, self.x)])))

    def nearest(self) -> torch.Tensor:
        """The weight on its grid, each to the nearest point."""
        return _scaling.snapped(self.layer, self.steps, self.levels)

    def solve(self, steps: int, lr: float, batch: int, strength: float) -> torch.Tensor:
        """The weight on its grid with the rounding that reproduces the output best."""
        scaled = self.layer.get_parameter("weight").data / self.grid
        floor = scaled.floor().clamp(-self.limit, self.limit)
        share = ((scaled - floor).clamp(1e-3, 1 - 1e-3) - _LOW) / (_HIGH - _LOW)
        variable = torch.log(share / (1 - share)).requires_grad_(True)
        optimizer = torch.optim.Adam([variable], lr=lr)
        for step in range(steps):
            rows = torch.randint(len(self.x), (min(batch, len(self.x)),))
            up = (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
            wrong = self.output((floor + up).clamp(-self.limit, self.limit) * self.grid, self.x[rows]) - self.y[rows]
            loss = wrong.square().movedim(channel_axis(self.layer, wrong), 0).flatten(1).mean(1).sum()
            late = (step / steps - _FREE) / (1 - _FREE)
            if late > 0:
                beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + math.cos(late * math.pi))
                loss = loss + strength * (1 - (2 * up - 1).abs() ** beta).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (floor + (variable.detach() > 0)).clamp(-self.limit, self.limit) * self.grid
