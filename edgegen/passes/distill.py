"""Train the network to give what its teacher gives.

Hinton et al., 2015, arXiv:1503.02531 for logits; for images the mean absolute difference. Labels and reference images
can be added, inner maps too; without data the inputs are made up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.nn import encoders
from edgegen.nn import losses as nn_losses
from edgegen.passes import _lessons
from edgegen.types import Job, Model, PassResult

LOSSES = ("output", "l2", "perceptual", "reference", "reference_l2", "reference_psnr", "labels", "features")
_TO_REFERENCE = {
    "reference": nn_losses.absolute, "reference_l2": nn_losses.squared, "reference_psnr": nn_losses.decibels,
}  # fmt: skip
FROM_TEACHER = ("output", "l2", "perceptual", "features")


def distill(
    model: Model,
    job: Job,
    *,
    steps: int = 500,
    batch: int = 8,
    lr: float = 1e-3,
    losses: Sequence[str] | Mapping[str, float] = ("output",),
    features: float = 0.0,
    reference: float = 0.0,
    warmup: float = 0.05,
    ema: float = 0.0,
    precision: str = "auto",
    crop: int | None = None,
    temperature: float = 4.0,
    projection: str = "conv",
    encoder: str = "cifar",
    batchnorm: str = "train",
    grad_clip: float = 1.0,
    optimizer: str = "adamw",
    margin: int = 0,
    feature_layers: Sequence[str] = (),
) -> PassResult:
    """Train `model` against `job.teacher` on `job.data` (made-up inputs where there is none).

    Args:
        losses: names, or a table name -> weight, of: output (L1 for images, softened KL for classes), l2, perceptual
            (`encoder`: cifar or mnist), reference (L1 to the sample's reference), reference_l2 (squared),
            reference_psnr (its logarithm for each image: the mean PSNR itself), labels (cross entropy), features (inner
            maps of up to four layers). `features` and `reference` add those two with a weight.
        crop: train on random squares of this many input pixels (not for classification). margin: input pixels at each
            edge of a crop in which the output is not compared with the reference: it is computed from padding there.
        feature_layers: modules whose outputs the loss features compares; none: up to four layers over the depth. A
            teacher that is asked for nothing else runs no further than the last of them.
        temperature: of the softened logits. projection: "conv" or "orthogonal" (V_kD) from student to teacher maps.
        batchnorm: "train" moves the statistics slowly, "frozen" keeps them. optimizer: adamw, adam, sgd or muon.
    Returns:
        PassResult; `notes` has the loss curve, the inputs, the layers compared, and why training stopped early if so.
    Raises:
        ValueError: an option out of range, outputs of teacher and student that do not fit, a loss without its data.
        PassError: the loss was never finite.
    """
    table = _lessons.weights(losses, features, reference, LOSSES)
    _check(model, job, table, batch, crop, temperature, margin)
    if job.data is not None and len(model.stage.inputs) == 1:
        batch_at, source = _lessons.from_data(job.data, batch, job.seed, crop), "data"
    else:
        batch_at, source = _lessons.made_up(model, batch, job.seed)
    with training.use_threads(job.threads):
        lesson = _Lesson(model, job, table, batch_at(0), temperature, projection, encoder, margin,
                         feature_layers)
    try:
        result = training.train(
            lesson.learner, lesson.losses, batch_at, steps=steps, lr=lr, seed=job.seed, ema=ema, precision=precision,
            checkpoint=job.checkpoints / "distill.safetensors" if job.checkpoints else None, progress=job.progress,
            warmup=warmup, grad_clip=grad_clip, batchnorm=batchnorm, optimizer=optimizer, threads=job.threads,
            device=job.device,
        )  # fmt: skip
    finally:
        lesson.close()
    if result.stopped and not result.steps:
        raise PassError(f"distill: {result.stopped}; check the value ranges of the inputs")
    notes = {
        "inputs": source, "losses": table, "steps": result.steps, "precision": result.precision,
        "seconds": round(result.seconds, 3), "loss_first": result.curve[0][1] if result.curve else None,
        "loss_last": result.curve[-1][1] if result.curve else None, "curve": [list(point) for point in result.curve],
        "features": list(lesson.names), "stopped": result.stopped,
    }  # fmt: skip
    changed = dict.fromkeys(graph.layers(lesson.student), "trained")
    return PassResult(model.with_module(lesson.student.eval()), changed, {}, notes)


def _check(
    model: Model, job: Job, table: Mapping[str, float], batch: int, crop: int | None, temperature: float, margin: int
) -> None:
    if model.stage.module is None:
        raise ValueError(f"distill needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if crop is not None and (crop < 1 or model.task == "classification"):
        raise ValueError(f"crop must be at least 1 pixel and is not for classification, got {crop} for {model.task}")
    if margin < 0 or (margin and (crop is None or 2 * margin >= crop)):
        raise ValueError(f"margin must be 0, or less than half of crop, got {margin} with crop {crop}")
    needs = [name for name in table if name in FROM_TEACHER]
    if needs and job.teacher is None:
        raise ValueError(f"losses {', '.join(needs)} need a teacher, and the job has none; use reference or labels")


class _Lesson:
    """Teacher, student and what is learned beside it, with the loss of one batch."""

    def __init__(
        self, model: Model, job: Job, table: Mapping[str, float], first: _lessons.Batch, temperature: float,
        projection: str, encoder: str, margin: int = 0, feature_layers: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.margin = margin
        self.table, self.temperature, self.task = table, temperature, model.task
        low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
        self.low, self.span = low, high - low
        self.student = graph.clone(model.stage.module).to(job.device)
        self.frozen = not any(parameter.requires_grad for parameter in self.student.parameters())
        if self.frozen:  # loaded for inference: then everything learns, and is frozen again afterwards
            self.student.requires_grad_(True)
        inputs = training.place(first["input"], job.device)
        self.teacher: Any = _teacher(job) if any(name in FROM_TEACHER for name in table) else None
        _check_data(table, first)
        if self.teacher is not None:
            _check_fit(self.student, self.teacher, inputs)
        self.encoder: Any = _frozen(encoders.create(encoder), job.device) if "perceptual" in table else None
        self.names: tuple[str, ...] = ()
        self.features: nn_losses.FeatureLoss | None = None
        self.learner = nn.ModuleDict({"student": self.student})
        if "features" in table:
            self._pair(inputs, projection, job.seed, feature_layers)

    def _pair(self, inputs: Sequence[torch.Tensor], projection: str, seed: int, named: Sequence[str]) -> None:
        """Choose the layers to compare and make the projections, with random numbers of their own."""
        widths = nn_losses.named_pairs(self.student.eval(), self.teacher, inputs, named)
        self.names = tuple(widths) or nn_losses.pairs(self.student, self.teacher, inputs)
        if not self.names:
            raise ValueError("no layer of the student has a map that fits one of the teacher under the same name; "
                             "leave out the loss features")  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn_losses.FeatureLoss(self.student, self.teacher, self.names, projection, widths)
        if not {"output", "l2", "perceptual"} & set(self.table):
            self.teacher = _UpTo(self.teacher, _last_called(self.teacher, self.names, inputs))
        self.learner["features"] = self.features

    def losses(self, learner: nn.Module, batch: _lessons.Batch, step: int) -> dict[str, torch.Tensor]:
        """Name -> weighted loss of a batch."""
        found = graph.flatten(self.student(*batch["input"]))
        taught: tuple[torch.Tensor, ...] = found
        if self.teacher is not None:
            with torch.no_grad():
                taught = graph.flatten(self.teacher(*batch["input"]))
        return {name: weight * self._loss(name, found, taught, batch) for name, weight in self.table.items()}

    def _loss(
        self, name: str, found: Sequence[torch.Tensor], taught: Sequence[torch.Tensor], batch: _lessons.Batch
    ) -> torch.Tensor:
        if name == "features" and self.features is not None:
            return self.features()
        if name == "labels":
            return nn_losses.cross_entropy(found[0], batch["label"])
        if name in _TO_REFERENCE:
            return _TO_REFERENCE[name](*self._inner(found[0], batch), self.span)
        parts = [self._compare(name, a, b) for a, b in zip(found, taught, strict=True)]
        return torch.stack(parts).mean()

    def _inner(self, found: torch.Tensor, batch: _lessons.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and reference without the margin: at the edges of a crop the network sees padding, not the image."""
        reference = batch["reference"]
        cut = self.margin * (reference.shape[-1] // batch["input"][0].shape[-1]) if self.margin else 0
        return (found[..., cut:-cut, cut:-cut], reference[..., cut:-cut, cut:-cut]) if cut else (found, reference)

    def _compare(self, name: str, found: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """One output of the student against the teacher's."""
        if name == "perceptual":
            a, b = ((out - self.low) / self.span for out in (found, taught))
            return nn_losses.perceptual(self.encoder, a, b)
        if name == "output" and self.task == "classification":
            return nn_losses.divergence(found, taught, self.temperature)
        return (nn_losses.squared if name == "l2" else nn_losses.absolute)(found, taught, self.span)

    def close(self) -> None:
        """Take the hooks off the student, which is the result, and freeze it again if it was."""
        if self.frozen:
            self.student.requires_grad_(False)
        if self.features is not None:
            self.features.close()


def _last_called(network: nn.Module, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> str:
    """Which of these modules runs last."""
    order: list[str] = []
    parts = [(name, network.get_submodule(name)) for name in names]
    handles = [part.register_forward_hook(lambda *_, name=name: order.append(name)) for name, part in parts]
    graph.outputs(network, inputs)
    for handle in handles:
        handle.remove()
    return order[-1]


class _UpTo(nn.Module):
    """A network that stops after one of its modules; its own outputs are not computed."""

    class _Enough(Exception):
        pass

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        network.get_submodule(name).register_forward_hook(self._stop)  # after the hook that catches the map

    def _stop(self, module: nn.Module, args: Any, out: Any) -> None:
        raise self._Enough

    def forward(self, *inputs: torch.Tensor) -> tuple[()]:
        with contextlib.suppress(self._Enough):
            self.network(*inputs)
        return ()


def _teacher(job: Job) -> nn.Module:
    """A frozen copy of the teacher: hooks and memory layout must not reach the caller's."""
    module = job.teacher.stage.module if job.teacher else None
    if module is None:
        raise ValueError("the teacher has no network (an ONNX file cannot teach); give the torch model")
    return _frozen(graph.clone(module), job.device)


def _frozen(module: nn.Module, device: str) -> nn.Module:
    frozen = module.eval().requires_grad_(False).to(device=device)
    return frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _check_data(table: Mapping[str, float], first: _lessons.Batch) -> None:
    for name, key in (*((name, "reference") for name in _TO_REFERENCE), ("labels", "label")):
        if name in table and first[key] is None:
            raise ValueError(f"loss {name} needs samples with a {key}, and this data has none; leave it out")


def _check_fit(student: nn.Module, teacher: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """One clear line when the two networks cannot be compared."""
    found = [tuple(out.shape[1:]) for out in graph.outputs(student, inputs)]
    wanted = [tuple(out.shape[1:]) for out in graph.outputs(teacher, inputs)]
    if found != wanted:
        raise ValueError(f"outputs of student {found} and teacher {wanted} differ; distill needs equal shapes")
