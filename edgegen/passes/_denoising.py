"""What passes for denoisers share: images to put noise on, one step of the probability flow, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgegen import graph, samplers
from edgegen.nn import diffusion
from edgegen.passes._reals import Reals, reals
from edgegen.types import Model, PassResult

POOL, AT_MOST_STEPS = 256, 20  # images that the denoiser makes itself to learn from, and steps for each


def images(
    model: Model, size: int, seed: int, data: Any = None, teacher: Model | None = None
) -> tuple[diffusion.Images, str]:
    """step -> images in the network's range with their classes, and where they are from, in words.

    Real ones where the data has any; else a pool that its teacher makes (a pruned student makes no images to learn
    from), or without one the denoiser itself: so no data are needed. A network of classes learns from those of the data
    alone, as a class that is not an image's own teaches nothing.
    """
    classes = (samplers.of(model.options) or {}).get("labels", 0)
    if (real := reals(data, model, default=(-1.0, 1.0))) is not None:
        labels = data.real_labels() if classes else None
        if not classes or labels is not None:
            return lambda step: _real(real, labels, size, [seed, step, 2]), f"{real.count} real images, noised"
    maker = _artist(model, teacher)
    whose = "the denoiser itself" if maker is model else "its teacher"
    settings = samplers.of(maker.options) or {}
    fewer = {**settings, "steps": min(settings["steps"], AT_MOST_STEPS), "timesteps": [], "seed": seed}
    count = min(POOL, 4 * size)
    shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
    latents = np.random.default_rng([seed, 1]).standard_normal((count, *shape), dtype=np.float32)
    asked = np.arange(count) % classes if classes else None
    found = samplers.generate(fewer, diffusion.runner(maker.stage.module), latents, asked)
    said = f"{len(found)} images of {whose}, noised" + ("; the real ones have no classes" if real is not None else "")

    def at(step: int) -> tuple[np.ndarray, np.ndarray | None]:
        chosen = np.random.default_rng([seed, step, 2]).integers(len(found), size=size)
        return found[chosen].astype(np.float32), None if asked is None else asked[chosen]

    return at, said


def _real(real: Reals, labels: np.ndarray | None, size: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Some real images and their classes."""
    return real.drawn(size, seed), None if labels is None else labels[real.chosen(size, seed)]


def _artist(model: Model, teacher: Model | None) -> Model:
    """The teacher where it makes images like the model's, else the model."""
    if teacher is None or len(teacher.stages) != 1 or teacher.stage.module is None:
        return model
    theirs, ours = samplers.of(teacher.options), samplers.of(model.options) or {}
    same = teacher.stage.inputs[0].shape == model.stage.inputs[0].shape
    return teacher if same and theirs is not None and theirs["labels"] == ours.get("labels") else model


def batches(
    model: Model, size: int, seed: int, data: Any = None, teacher: Model | None = None
) -> tuple[Callable[[int], dict[str, Any]], str]:
    """Batches of inputs at random times for passes that compare outputs (see `_lessons`)."""
    made, said = images(model, size, seed, data, teacher)
    at = diffusion.lessons(model.options, made, size, seed)
    return lambda step: {"input": at(step), "reference": None, "label": None}, said


def untouched(model: Model, why: str, **notes: Any) -> PassResult:
    """The result of a pass that finds nothing to do, with the reason for every layer."""
    names = graph.layers(model.stage.module) if model.stage.module is not None else ["network"]
    return PassResult(model, {}, dict.fromkeys(names, why), notes)


class Teacher:
    """A frozen denoiser as `image(x, t, label)`, with the guidance of its settings built in.

    At a time between two steps of its own sampler, guidance is as in the step from the one to the other.
    """

    def __init__(self, module: nn.Module, settings: Mapping[str, Any]) -> None:
        self.module, self.levels, self.settings = module, diffusion.Levels(settings), settings
        self.weight, self.clip = float(settings["guidance"]), float(settings["clip"])
        self.visited = torch.tensor([level.t for level in samplers.levels(settings)[:-1]])

    @torch.no_grad()
    def image(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """The estimate of the image in x at times t."""
        made = call(self.module, x, t, label)
        if self.weight != 1 and label is not None and (chosen := self.guided(t)).any():
            free = call(self.module, x, t, torch.full_like(label, self.levels.labels))
            made = torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), free + self.weight * (made - free), made)
        x0 = self.levels.image(made.float(), x, t)
        return x0.clamp(-self.clip, self.clip) if self.clip else x0

    def guided(self, t: torch.Tensor) -> torch.Tensor:
        """Whether there is guidance at times t (N,)."""
        reached = self.visited.to(t.device)[None] >= t[:, None] - 1e-3  # float32 of the same time
        began = (reached.sum(1) - 1).clamp_min(0)
        return samplers.guided(self.settings, self.visited.to(t.device)[began], began)

    def step(self, x: torch.Tensor, t: torch.Tensor, end: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """One DDIM step from times t to times `end`; below 0 is the image."""
        x0 = self.image(x, t, label)
        (alpha, sigma), (alpha_end, sigma_end) = self.levels.at(t, x), ends(self.levels, end, x)
        return alpha_end * x0 + sigma_end * (x - alpha * x0) / sigma


def ends(levels: diffusion.Levels, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) where times below 0 are free of noise."""
    alpha, sigma = levels.at(t.clamp_min(0), like)
    done = (t < 0).view(-1, *[1] * (like.ndim - 1))
    return torch.where(done, torch.ones_like(alpha), alpha), torch.where(done, torch.zeros_like(sigma), sigma)


def call(module: nn.Module, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """Run a denoiser with or without labels."""
    return module(x, t) if label is None else module(x, t, label)


def times(settings: Mapping[str, Any], steps: int) -> torch.Tensor:
    """Times of so many evenly spread steps, falling, and -1 for the image."""
    visited = samplers.levels(samplers.complete({**settings, "steps": steps, "timesteps": [], "spacing": "trailing"}))
    return torch.tensor([*(level.t for level in visited[:-1]), -1.0])
