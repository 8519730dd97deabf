"""What a network learns from images, and how: the batch of a step, its loss, the end of the training.

denoisers: squared error of what they predict at random times (Ho et al., 2020, arXiv:2006.11239), classes left out of
one image in ten (Ho & Salimans, 2022, arXiv:2207.12598). classification: cross entropy. super-resolution and
restoration: absolute error to the reference. Generators that make an image in one run: hinge loss against a
discriminator with spectral norm (Miyato et al., 2018, arXiv:1802.05957), both in turns; where the generator draws
classes, the discriminator sees them by projection (Miyato & Koyama, 2018, arXiv:1802.05637).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot, relu

from edgegen import data, images
from edgegen.errors import DataError
from edgegen.nn import diffusion
from edgegen.nn import losses as nn_losses
from edgegen.nn.discriminators import Critic
from edgegen.passes import _lessons
from edgegen.types import Model


@dataclass
class Lesson:
    """What learns, the batch of a step, the loss of it, and what to do with the result before it is written."""

    learner: nn.Module
    batch_at: Callable[[int], Any]
    loss: Callable[[nn.Module, Any, int], Any]
    finish: Callable[[], None] = lambda: None


def of(model: Model, source: data.Source, kind: str, batch: int, seed: int) -> Lesson:
    """The lesson of a network: kind is "denoiser" or its task; everything drawn is a function of the seed.

    Raises:
        DataError: data that do not fit the task.
    """
    if kind in ("denoiser", "unconditional"):
        return (_denoiser if kind == "denoiser" else _adversary)(model, source, batch, seed)
    dataset = data.Dataset(source, model, seed=seed)
    first = dataset[0]
    wanted = "class labels (class folders, or integers y)" if kind == "classification" else "reference images (y)"
    if (first.label if kind == "classification" else first.reference) is None:
        raise DataError(f"{source.name}: {kind} learns from {wanted}, and these data have none")
    batch_at = _lessons.from_data(dataset, batch, seed, None)
    low, high = model.stage.outputs[0].value_range or (0.0, 1.0)

    def loss(module: nn.Module, batch: Any, step: int) -> torch.Tensor:
        made = module(*batch["input"])
        if kind == "classification":
            return nn_losses.cross_entropy(made, batch["label"])
        return nn_losses.absolute(made, batch["reference"], high - low)

    return Lesson(model.stage.module, batch_at, loss)


def _real(model: Model, source: Any, size: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """step -> (images (size, C, H, W) in the output's range, labels or -1), a function of (seed, step)."""
    if source.kind != "images":
        raise DataError(f"{source.name}: holds {source.kind}; a generator learns from images")
    spec = model.stage.outputs[0]
    channels, height, width = (int(d) for d in spec.shape[1:])

    def at(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = [int(i) for i in np.random.default_rng([seed, step]).integers(len(source), size=size)]
        fitted = [images.fit(images.with_channels(source.image(i), channels), height, width) for i in chosen]
        told = [source.label(i) for i in chosen]
        labels = np.array([-1 if label is None else label for label in told], np.float32)
        return np.stack([images.scaled(image, spec.value_range or (-1.0, 1.0)) for image in fitted]), labels

    return at


def _denoiser(model: Model, source: data.Source, batch: int, seed: int) -> Lesson:
    levels, real = diffusion.Levels(model.options), _real(model, source, batch, seed)
    if levels.labels and len(source.labels or ()) > levels.labels:
        raise DataError(f"{source.name} has {len(source.labels)} classes, {model.name} takes {levels.labels}")

    def batch_at(step: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        found, labels = real(step)
        rng = np.random.default_rng([seed, step, 1])
        x0 = torch.from_numpy(found)
        places = (rng.permutation(batch) + rng.random(batch)) / batch  # spread evenly over the times
        t = torch.from_numpy(np.floor(places * levels.count)).float()
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        given: tuple[torch.Tensor, ...] = (levels.noised(x0, t, eps), t)
        if levels.labels:
            given = (*given, levels.told(labels, rng))
        return given, levels.target(x0, t, eps)

    def loss(module: nn.Module, batch: Any, step: int) -> torch.Tensor:
        given, target = batch
        return (module(*given).float() - target).square().mean()

    return Lesson(model.stage.module, batch_at, loss)


def _adversary(model: Model, source: data.Source, batch: int, seed: int) -> Lesson:
    """A generator from latents and its discriminator, learning in turns; half of the steps belong to each."""
    real, drawn, classes = _real(model, source, batch, seed), _drawn(model, batch), _classes(model)
    if classes and len(source.labels) != classes:
        has = f"{len(source.labels)} classes" if source.labels else "no class labels (class folders, or integers y)"
        raise DataError(f"{source.name} has {has}, and {model.name} draws images of {classes} classes: give it as many,"
                        " or other sizes with --config where the network has any")  # fmt: skip
    channels, height, width = (int(d) for d in model.stage.outputs[0].shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(channels, (height, width), classes=classes)
    learner = nn.ModuleDict({"generator": model.stage.module, "critic": critic})

    def batch_at(step: int) -> tuple[Any, Any]:
        found, labels = real(step)
        return (torch.from_numpy(found), torch.from_numpy(labels).long()), drawn(seed, step, 1)

    def loss(module: nn.Module, batch: Any, step: int) -> torch.Tensor:
        (found, labels), (z, asked) = batch
        critics = step % 2 == 0
        module["critic"].requires_grad_(critics)  # type: ignore[index]
        made = module["generator"](*z)  # type: ignore[index]
        if critics:  # without a gradient the generator's weights stay as they are, and the other way round below
            scores = [module["critic"](*seen) for seen in ((found, labels), (made.detach(), asked))]  # type: ignore[index]
            return relu(1 - scores[0]).mean() + relu(1 + scores[1]).mean()
        return -module["critic"](made, asked).mean()  # type: ignore[index]

    def finish() -> None:
        _measure_norms(model.stage.module, lambda index: drawn(seed, 7, index)[0])

    return Lesson(learner, batch_at, loss, finish)


def _classes(model: Model) -> int:
    """How many classes a generator draws; 0: it is not told any."""
    return int(model.options.get("labels", 0))


def _drawn(model: Model, batch: int) -> Callable[..., tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """key -> (what the generator takes, the class that is asked for; 0 where there are none), a function of the key."""
    shape, classes = tuple(int(d) for d in model.stage.inputs[0].shape[1:]), _classes(model)
    more = model.stage.inputs[1:]

    def at(*key: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        rng = np.random.default_rng(key)
        z = torch.from_numpy(rng.standard_normal((batch, *shape), dtype=np.float32))
        if not classes or [spec.name for spec in more] != ["label"]:
            noise = [rng.standard_normal((batch, *(int(d) for d in one.shape[1:])), dtype=np.float32) for one in more]
            asked = z[:, -classes:].argmax(1) if classes else torch.zeros(batch, dtype=torch.int64)
            return (z, *map(torch.from_numpy, noise)), asked
        asked = torch.from_numpy(rng.integers(classes, size=batch))
        return (z, asked if more[0].dtype == "int64" else one_hot(asked, classes).float()), asked

    return at


@torch.no_grad()
def _measure_norms(generator: nn.Module, latents: Callable[[int], tuple[torch.Tensor, ...]], batches: int = 32) -> None:
    """Statistics of batch norms anew for averaged weights; leaves eval mode on."""
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    for index in range(batches if norms else 0):
        generator(*latents(index))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    generator.eval()
