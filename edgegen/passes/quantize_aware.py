"""Train a network with the rounding of its INT8 build inside, against its float teacher, and hand the scales over.

Jacob et al., 2018, arXiv:1712.05877, section 3 (training with simulated quantization, batch norms folded); Esser et
al., 2020, LSQ, arXiv:1902.08153, and Jain et al., 2020, TQT, arXiv:1903.08066 (ranges learned by gradient, as
logarithms); Hinton et al., 2015, arXiv:1503.02531 (the teacher's outputs as targets). Rounding is at the very tensors
where ONNX Runtime's Q/DQ build rounds (`_simulate`). Afterwards it is taken off: the result is a plain float network
whose weights lie on their INT8 grid, and `plan.scales` has the learned ranges, which the Q/DQ writer takes instead of
calibrating. No module with rounding in it is ever exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.nn import losses as nn_losses
from edgegen.passes import _flow, _lessons, _scaling, _simulate
from edgegen.passes.correct_bias import error
from edgegen.passes.equalize import batches
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult, PrecisionPlan

_RATE_OF_RANGES = 10.0  # they are logarithms, as steps are: lr is the share by which a range moves


def quantize_aware(
    model: Model,
    job: Job,
    *,
    steps: int = 500,
    batch: int = 8,
    lr: float = 1e-4,
    samples: int = 32,
    output: float = 1.0,
    labels: float = 0.0,
    reference: float = 0.0,
    reference_psnr: float = 0.0,
    weights: str = "int8",
    crop: int | None = None,
    temperature: float = 4.0,
    learn_ranges: bool = True,
    precision: str = "fp32",
    warmup: float = 0.05,
    grad_clip: float = 1.0,
    optimizer: str = "adamw",
) -> PassResult:
    """Train `model` as an INT8 build against `job.teacher` (itself in float, where there is none).

    Args:
        samples: how many inputs the first ranges are calibrated on.
        output, labels, reference, reference_psnr: weights of the difference to the teacher's output, of the cross
            entropy to labels, of the difference to reference images and of its PSNR in bel; 0: without.
        weights: how the build stores them: int8, or int4, whose steps are learned too (Esser et al.); `quantize` must
            ask for the same.
        crop: train on random squares of this many input pixels (not for classification).
        temperature: of softened logits. learn_ranges: or keep those of calibration.
        precision: of the training: fp32; bf16 rounds coarser than INT8 does, so it blurs what is learned.
    Returns:
        PassResult; its model's plan has the ranges, and its weights are the best of ten looks at the losses on batches
        that are not learned from. Where the error only rose (and the teacher's output alone was asked for), the model
        as it was. `notes` has the loss curve and the INT8 network's output error on the samples before and after,
        relative to the teacher.
    Raises:
        ValueError: an option out of range, a loss without its data, a network that cannot be INT8.
        PassError: the loss was never finite.
    """
    wanted = {"output": output, "labels": labels, "reference": reference, "reference_psnr": reference_psnr}
    _check(model, batch, samples, steps, wanted, crop, temperature)
    plan = _simulate.plan_of(job.target, weights)
    job = dataclasses.replace(job, device=distributed.own_device(job.device))
    inputs, _ = batches(model, job, samples, "quantize_aware")
    batch_at, source = _lessons.batches(model, job, batch, crop)
    with training.use_threads(job.threads):
        lesson = _Lesson(model, job, inputs, batch_at(0), wanted, plan, temperature, learn_ranges)
        before = lesson.error(inputs)

    def judged(learner: nn.Module) -> float:  # what is asked for, and not of what is learned from or calibrated on
        parts = [lesson.losses(learner, batch, steps) for batch in _lessons.held_out(batch_at, steps, job.device)]
        return sum(float(loss) for found in parts for loss in found.values()) / len(parts)

    result = training.train(
        lesson.learner, lesson.losses, batch_at, steps=steps, lr=lr, seed=job.seed, precision=precision,
        checkpoint=job.checkpoints / "quantize_aware.safetensors" if job.checkpoints else None, progress=job.progress,
        warmup=warmup, grad_clip=grad_clip, batchnorm="frozen", optimizer=optimizer, threads=job.threads,
        device=job.device, rates=lesson.rates(), evaluate=judged,
    )  # fmt: skip
    if result.stopped and not result.steps:
        raise PassError(f"quantize_aware: {result.stopped}; check the value ranges of the inputs")
    with training.use_threads(job.threads):
        lesson.to_cpu()
        after = lesson.error(inputs)
        network, ranges = lesson.finished()
    scales = tuple((name, *ranges[name]) for name in lesson.found.points.values())
    changed = {name: _told(name, lesson.found) for name in graph.layers(network)}
    notes = {
        "inputs": source, **_lessons.told(result), "ranges": len(scales),
        "calibrated_by_the_build": list(lesson.found.missing),
        "output_error_before": before, "output_error_after": after, "best_step": result.best_step,
    }  # fmt: skip
    alone = not labels and not reference and not reference_psnr
    if after > before and alone:  # it has reached what its float teacher allows already
        why = f"the INT8 output's error rose from {before:.3g} to {after:.3g}: left as it was; try a smaller lr"
        return PassResult(model, {}, dict.fromkeys(graph.layers(network), why), notes)
    learned = dataclasses.replace(model.plan, scales=scales)
    return PassResult(dataclasses.replace(model.with_module(network), plan=learned), changed, {}, notes)


def _told(name: str, found: _simulate.Placement) -> str:
    if name not in found.layers:
        return "trained, stays in float"
    return f"trained, weights on the {'INT4' if name in found.steps else 'INT8'} grid"


def _check(
    model: Model, batch: int, samples: int, steps: int, wanted: Mapping[str, float], crop: int | None,
    temperature: float,
) -> None:  # fmt: skip
    if min(batch, samples, steps) < 1 or not temperature > 0:
        raise ValueError(
            f"batch, samples, steps and temperature must be positive, got {batch}, {samples}, {steps}, {temperature}"
        )
    if min(wanted.values()) < 0 or not any(wanted.values()):
        told = ", ".join(f"{name} {weight}" for name, weight in wanted.items())
        raise ValueError(f"weights of losses must be 0 or more, and one of them above, got {told}")
    if crop is not None and (crop < 1 or model.task == "classification"):
        raise ValueError(f"crop must be at least 1 pixel, and not for classification, got {crop} for {model.task}")


class _Learner(nn.Module):
    """The network with rounding inside, and the ranges: parameters are shares of the first ranges, as logarithms."""

    def __init__(self, network: nn.Module, found: _simulate.Placement, learn: bool) -> None:
        super().__init__()
        self.paths = list(found.steps)
        for i, step in enumerate(found.steps.values()):
            self.register_buffer(f"first_step_{i}", step, persistent=False)
            self.register_parameter(f"step_{i}", nn.Parameter(torch.zeros_like(step), requires_grad=learn))
        self.network, self.found = network, found
        self.names = list(found.ranges)
        for name, column in (("low", 0), ("high", 1)):
            first = torch.tensor([found.ranges[point][column] for point in self.names])
            self.register_buffer(f"first_{name}", first, persistent=False)
            self.register_parameter(name, nn.Parameter(torch.zeros(len(self.names)), requires_grad=learn))

    def ranges(self) -> dict[str, tuple[Any, Any]]:
        """Name of the tensor -> (low, high), with gradients."""
        low = self.get_buffer("first_low") * self.get_parameter("low").exp()
        high = self.get_buffer("first_high") * self.get_parameter("high").exp()
        return {name: (low[i], high[i]) for i, name in enumerate(self.names)}

    def steps(self) -> dict[str, torch.Tensor]:
        """Layer whose weight is stored in 4 bits -> steps of its channels, with gradients."""
        return {path: self.get_buffer(f"first_step_{i}") * self.get_parameter(f"step_{i}").exp()
                for i, path in enumerate(self.paths)}  # fmt: skip

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The INT8 network's output."""
        return _simulate.run(self.network, inputs, self.found, self.ranges(), steps=self.steps())

    def train(self, mode: bool = True) -> _Learner:
        """The network itself stays in eval mode: dropped paths would shift the places where it is rounded."""
        super().train(mode)
        self.network.eval()
        return self


class _Lesson:
    """Student with rounding inside, teacher, and what is asked of the student."""

    def __init__(
        self, model: Model, job: Job, inputs: Any, first: _lessons.Batch, wanted: Mapping[str, float],
        plan: PrecisionPlan, temperature: float, learn: bool,
    ) -> None:  # fmt: skip
        teacher = job.teacher.stage.module if job.teacher is not None else model.stage.module
        if teacher is None:
            raise ValueError("the teacher has no network (an ONNX file cannot teach); give the torch model")
        for name, needs in (("labels", "label"), ("reference", "reference"), ("reference_psnr", "reference")):
            if wanted[name] and first[needs] is None:
                raise ValueError(f"the loss {name} needs samples with a {needs}, and this data has none; leave it at 0")
        self.task, self.temperature, self.wanted = model.task, temperature, wanted
        low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
        self.span = high - low
        network = graph.clone(model.stage.module).eval()
        with torch.no_grad():
            _flow.fold(network, inputs[0])
            self.found = _simulate.placement(model, network, inputs, plan)
        self.flags = [parameter.requires_grad for parameter in network.parameters()]
        network.requires_grad_(True)
        self.learner = _Learner(network, self.found, learn).to(job.device)
        self.teacher = graph.clone(teacher).eval().requires_grad_(False).to(job.device)

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate."""
        learned = [name for name, parameter in self.learner.named_parameters(recurse=False) if parameter.requires_grad]
        return dict.fromkeys(learned, _RATE_OF_RANGES)

    def losses(self, learner: nn.Module, batch: _lessons.Batch, step: int) -> dict[str, torch.Tensor]:
        """Name -> weighted loss of a batch."""
        found = graph.flatten(learner(*batch["input"]))
        total = {}
        if self.wanted["output"]:
            with torch.no_grad():
                taught = graph.flatten(self.teacher(*batch["input"]))
            parts = [self._compare(a, b) for a, b in zip(found, taught, strict=True)]
            total["output"] = torch.stack(parts).mean()
        if self.wanted["labels"]:
            total["labels"] = nn_losses.cross_entropy(found[0], batch["label"])
        if self.wanted["reference"]:
            total["reference"] = nn_losses.absolute(found[0], batch["reference"], self.span)
        if self.wanted["reference_psnr"]:
            total["reference_psnr"] = nn_losses.decibels(found[0], batch["reference"], self.span)
        return {name: self.wanted[name] * loss for name, loss in total.items()}

    def _compare(self, found: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        if self.task == "classification":
            return nn_losses.divergence(found, taught, self.temperature)
        return nn_losses.absolute(found, taught, self.span)

    def to_cpu(self) -> None:
        """Where results are compared and written."""
        self.learner.cpu().eval()
        self.teacher.cpu()

    def error(self, inputs: Any) -> float:
        """Squared error of the INT8 network's outputs, relative to the teacher's square."""
        device = next(self.teacher.parameters()).device
        wrong = power = 0.0
        with torch.no_grad():
            for sample in inputs:
                given = [x.to(device) for x in sample]
                exact = graph.flatten(self.teacher(*given))
                size = sum(float(out.double().square().sum()) for out in exact)
                wrong += error(exact, graph.flatten(self.learner(*given))) * max(1e-12, size)
                power += size
        return wrong / max(1e-12, power)

    def finished(self) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
        """The float network with its INT8 weights on their grid, and the learned ranges."""
        network = self.learner.network.eval()
        with torch.no_grad():
            steps = self.learner.steps()
            for name in self.found.layers:
                layer = network.get_submodule(name)
                layer.get_parameter("weight").data = _scaling.snapped(layer, steps.get(name), self.found.levels)
            ranges = {name: (float(low), float(high)) for name, (low, high) in self.learner.ranges().items()}
        for parameter, flag in zip(network.parameters(), self.flags, strict=True):
            parameter.requires_grad_(flag)
        return network, ranges
