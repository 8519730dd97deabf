"""Train a denoiser to make its images in a few steps, or in one.

progressive: Salimans & Ho, 2022, arXiv:2202.00512: each round learns two of the teacher's steps as one. pairs:
regression from points of the teacher's paths to where they end (Kang et al., 2024, arXiv:2405.05967). consistency: two
neighbouring points of a path must lead to the same image (Song et al., 2023, arXiv:2303.01469; without an averaged
target, as in Song & Dhariwal, 2023, arXiv:2310.14189). distribution: the student's images are to be distributed as
the teacher's (Yin et al., 2024, arXiv:2405.14867; see _matching).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from edgegen import graph, samplers, training
from edgegen.errors import PassError
from edgegen.nn import diffusion, encoders
from edgegen.nn import losses as nn_losses
from edgegen.passes import _denoising, _lessons, _matching
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

RUNS = ({"steps": 1}, {"steps": 2}, {"steps": 4})  # the shape stays: what `edgegen probe` says of them is arithmetic
METHODS = ("progressive", "pairs", "consistency", "distribution")
Batch = tuple[torch.Tensor, ...]


def distill_steps(
    model: Model,
    job: Job,
    *,
    method: str = "progressive",
    steps: int = 4,
    train: int = 600,
    batch: int = 16,
    lr: float = 2e-4,
    ema: float = 0.99,
    pairs: int = 256,
    perceptual: float = 0.0,
    encoder: str = "cifar",
    precision: str = "auto",
) -> PassResult:
    """Fewer steps for the same images; the new sampler goes into the model's options, guidance into its weights.

    Args:
        method: progressive (then sampled by ddim), pairs, consistency or distribution (then by consistency).
        steps: of the result's sampler.
        train: training steps; of progressive in each round, and a round halves the steps.
        pairs: paths that the method pairs makes before it trains: DDIM with the teacher's number of steps (or the next
            multiple of `steps`), spread evenly, and its guidance.
        perceptual: weight of a distance of `encoder` (cifar or mnist) maps beside the squared error; for pairs.
    Returns:
        PassResult; `notes` has the rounds with their loss curves, and why training stopped early if so. Nothing changes
        in a network without a sampler, or in one that takes as few steps already. A later round of progressive that
        cannot begin leaves the result of the one before, and its number of steps.
    Raises:
        ValueError: an option out of range, a teacher that does not fit. PassError: the loss was never finite.
    """
    _check(method, steps, train, batch, pairs, perceptual)
    settings = samplers.of(model.options)
    if settings is None or model.stage.module is None:
        return _denoising.untouched(model, "the network makes its output in one run; there is no sampler to shorten")
    if samplers.nfe(settings) <= steps:
        return _denoising.untouched(model, f"the sampler runs the network {samplers.nfe(settings)} times already")
    job = dataclasses.replace(job, device=distributed.own_device(job.device))
    origin = job.teacher if job.teacher is not None and samplers.of(job.teacher.options) else model
    started = samplers.of(origin.options) or settings
    _check_fit(settings, started)
    teacher = _denoising.Teacher(_frozen(origin.stage.module, job.device), started)
    counts = _rounds(started["steps"], steps) if method == "progressive" else [steps]
    student, learned = graph.clone(model.stage.module), 0
    rounds: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        lesson: _Lesson | _matching.Matching
        if method == "distribution":
            lesson = _matching.Matching(model, student, teacher, started, count, batch, job.seed)
        else:
            lesson = _Lesson(model, job, teacher, started, method, count, batch, pairs, perceptual, encoder)
        student.requires_grad_(True)
        result = lesson.train(
            student, steps=train, lr=lr, seed=job.seed, ema=ema, precision=precision,
            checkpoint=job.checkpoints / f"steps-{number}-{count}.safetensors" if job.checkpoints else None,
            progress=job.progress, warmup=0.05, threads=job.threads, device=job.device,
        )  # fmt: skip
        if result.stopped and not result.steps and not rounds:
            raise PassError(f"distill_steps: {result.stopped}; lower lr, or use another method")
        rounds.append({**_lessons.told(result), "trained": result.steps, "steps": count, "images": lesson.source})
        if not result.steps:  # what the rounds before it learned is kept
            break
        learned = count
        teacher = _denoising.Teacher(_frozen(student, job.device), {**started, "guidance": 1.0})
    student.requires_grad_(False)
    loop = {"name": "ddim" if method == "progressive" else "consistency", "steps": learned, "clip": settings["clip"]}
    made = dataclasses.replace(model.with_module(student.eval()), options={**model.options, "sampler": loop})
    stopped = "; ".join(f"{point['steps']} steps: {point['stopped']}" for point in rounds if point["stopped"])
    notes = {"method": method, "nfe_before": samplers.nfe(settings), "nfe": learned, "rounds": rounds}
    notes["stopped"] = stopped
    return PassResult(made, dict.fromkeys(graph.layers(student), "trained"), {}, notes)


def _check(method: str, steps: int, train: int, batch: int, pairs: int, perceptual: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("steps", steps), ("train", train), ("batch", batch), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if perceptual < 0 or (perceptual and method != "pairs"):
        raise ValueError(f"perceptual must be 0 or more and is for method pairs, got {perceptual} for {method}")


def _check_fit(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a teacher whose times, noise, classes or output mean something else than the student's."""
    for fact in samplers._core.OF_NETWORK:
        if ours[fact] != theirs[fact]:
            raise ValueError(f"teacher and student must have the same {fact}: {theirs[fact]} and {ours[fact]}")


def _rounds(start: int, steps: int) -> list[int]:
    """Numbers of steps of the students: halved from round to round, the first teacher taking at most `start`."""
    counts = [steps]
    while 4 * counts[0] <= start:
        counts.insert(0, 2 * counts[0])
    return counts


def _frozen(module: nn.Module, device: str) -> nn.Module:
    return graph.clone(module).eval().requires_grad_(False).to(device)


class _Lesson:
    """The batches and the loss of one round."""

    def __init__(
        self, model: Model, job: Job, teacher: _denoising.Teacher, settings: dict[str, Any], method: str, steps: int,
        size: int, pairs: int, perceptual: float, encoder: str,
    ) -> None:  # fmt: skip
        self.teacher, self.levels, self.method, self.seed = teacher, diffusion.Levels(settings), method, job.seed
        self.perceptual, self.size = perceptual, size
        self.encoder, self.device = encoders.create(encoder).to(job.device) if perceptual else None, job.device
        finer = {"progressive": 2 * steps, "consistency": max(settings["steps"], 2 * steps), "pairs": steps}[method]
        self.times = _denoising.times(settings, finer)
        self.steps = steps
        if method == "pairs":
            self.batch_at, self.source = self._paths(model, settings, pairs), f"{pairs} paths of the teacher"
        else:
            self.images, self.source = _denoising.images(model, size, job.seed, job.data, job.teacher)
            self.batch_at = self._noised

    def train(self, student: nn.Module, **how: Any) -> training.TrainResult:
        """Train the student in place; how: as in `training.train`."""
        return training.train(student, self.loss, self.batch_at, **how)

    def _noised(self, step: int) -> Batch:
        """(x, place on the grid of times, label) of images with noise put on them; the label is the image's own."""
        rng = np.random.default_rng([self.seed, step])
        found, labels = self.images(step)
        x0 = torch.from_numpy(found)
        stride = 2 if self.method == "progressive" else 1
        places = torch.from_numpy(rng.integers((len(self.times) - 1) // stride, size=self.size) * stride)
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        told = () if labels is None else (torch.from_numpy(labels).float(),)
        return (self.levels.noised(x0, self.times[places], eps), places, *told)

    def _paths(self, model: Model, settings: dict[str, Any], pairs: int) -> Callable[[int], Batch]:
        """Points of the teacher's paths at the student's times, with the images where they end."""
        shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
        rng = np.random.default_rng([self.seed, 3])
        x = torch.from_numpy(rng.standard_normal((pairs, *shape), dtype=np.float32)).to(self.device)
        labels = torch.from_numpy(rng.integers(self.levels.labels, size=pairs)).float() if self.levels.labels else None
        label = None if labels is None else labels.to(self.device)
        finer = max(1, round(settings["steps"] / self.steps))
        grid = _denoising.times(settings, finer * self.steps)
        points = []
        for place in range(len(grid) - 1):
            if place % finer == 0:
                points.append(x)
            t, end = (torch.full((pairs,), float(grid[i]), device=x.device) for i in (place, place + 1))
            x = self.teacher.step(x, t, end, label)
        starts, x = torch.stack(points).cpu(), x.cpu()

        def at(step: int) -> Batch:
            rng = np.random.default_rng([self.seed, step])
            places, chosen = (torch.from_numpy(rng.integers(n, size=self.size)) for n in (self.steps, pairs))
            told = () if labels is None else (labels[chosen],)
            return (starts[places, chosen], places, *told, x[chosen])

        return at

    def loss(self, student: nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Squared error of the image that the student sees, weighted as an error of v."""
        x, places = batch[0], batch[1]
        label = batch[2] if self.levels.labels else None
        t = self.times.to(x.device)[places]
        found = self.levels.image(_denoising.call(student, x, t, label).float(), x, t)
        with torch.no_grad():
            wanted = batch[-1] if self.method == "pairs" else self._target(student, x, places, label)
        sigma = self.levels.at(t, x)[1]
        losses = {"image": ((found - wanted) / sigma.clamp_min(0.05)).square().mean()}
        if self.encoder is not None:
            pair = [(side.clamp(-1, 1) + 1) / 2 for side in (found, wanted)]
            losses["perceptual"] = self.perceptual * nn_losses.perceptual(self.encoder, *pair)
        return losses

    def _target(
        self, student: nn.Module, x: torch.Tensor, places: torch.Tensor, label: torch.Tensor | None
    ) -> torch.Tensor:
        """The image that the student should see: what makes one DDIM step end where the teacher's two steps do, or
        what the student itself sees one step of the teacher further on."""
        grid = self.times.to(x.device)
        near = self.teacher.step(x, grid[places], grid[places + 1], label)
        if self.method == "consistency":
            t = grid[places + 1].clamp_min(0)
            seen = self.levels.image(_denoising.call(student, near, t, label).float(), near, t)
            return torch.where((grid[places + 1] < 0).view(-1, 1, 1, 1), near, seen)
        far = self.teacher.step(near, grid[places + 1], grid[places + 2], label)
        (alpha, sigma), (alpha_end, sigma_end) = (
            self.levels.at(grid[places], x), _denoising.ends(self.levels, grid[places + 2], x))  # fmt: skip
        share = sigma_end / sigma
        return (far - share * x) / (alpha_end - share * alpha)
