"""Train a network on images from nothing (or from given weights): what `edgegen train` does.

denoisers: squared error of what they predict at random times (Ho et al., 2020, arXiv:2006.11239), classes left out of
one image in ten (Ho & Salimans, 2022, arXiv:2207.12598). classification: cross entropy. super-resolution and
restoration: absolute error to the reference. Generators that make an image in one run: hinge loss against a
discriminator with spectral norm (Miyato et al., 2018, arXiv:1802.05957), both in turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

from edgegen import __version__, data, files, images, loading, origins, samplers, training, weights
from edgegen.errors import DataError, ModelError
from edgegen.nn import diffusion
from edgegen.nn import losses as nn_losses
from edgegen.passes import _lessons
from edgegen.records import ModelOptions
from edgegen.sources import content_key
from edgegen.types import Model

DROPPED = 0.1  # share of images whose class is left out
RATES = {"denoiser": 5e-4, "classification": 2e-3, "unconditional": 2e-4}
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Order:
    """What to train. start: weights to begin with; lr 0: by kind of network. resume: go on from the checkpoint."""

    model: str
    data: Path
    out: Path
    steps: int = 2000
    batch: int = 32
    lr: float = 0.0
    ema: float = 0.999
    seed: int = 0
    start: Path | None = None
    precision: str = "auto"
    threads: int = 0
    resume: bool = False
    options: ModelOptions = field(default_factory=ModelOptions)
    optimizer: str = "adamw"


@dataclass
class Lesson:
    """What learns, the batch of a step, the loss of it, and what to do with the result before it is written."""

    learner: nn.Module
    batch_at: Callable[[int], Any]
    loss: Callable[[nn.Module, Any, int], Any]
    finish: Callable[[], None] = lambda: None


def train(order: Order, progress: Progress | None = None) -> dict[str, Any]:
    """Train, write the weights to `order.out` and the record with the loss curve beside it; the record.

    Raises:
        ModelError: a model that is a file, or an `out` that is no .safetensors. DataError: data that do not fit the
            task. RecipeError: to be resumed, and the checkpoint is of another command. ValueError: a setting out of
            range.
    """
    if order.out.suffix != ".safetensors":
        raise ModelError(f"--out {order.out}: weights are written as .safetensors")
    model = _fresh(order)
    kind = "denoiser" if samplers.of(model.options) is not None else model.task
    source = data.open_source(order.data)
    lesson = _lesson(model, order, kind, source)
    lr = order.lr or RATES.get(kind, 1e-3)
    checkpoint = order.out.with_suffix(".checkpoint")
    if not order.resume:
        checkpoint.unlink(missing_ok=True)
    result = training.train(
        lesson.learner, lesson.loss, lesson.batch_at, steps=order.steps, lr=lr, seed=order.seed, ema=order.ema,
        checkpoint=checkpoint, progress=progress, precision=order.precision, warmup=min(0.05, 200 / order.steps),
        threads=order.threads, optimizer=order.optimizer, identity=_identity(model, order, source, lr),
    )  # fmt: skip
    lesson.finish()
    weights.save_state(model.stage.module, order.out)
    checkpoint.unlink(missing_ok=True)
    record = {
        "edgegen": __version__, "model": model.name, "origin": dict(model.origin), "task": model.task, "kind": kind,
        "data": str(order.data), "seed": order.seed, "batch": order.batch, "lr": lr, "ema": order.ema,
        "optimizer": order.optimizer,
        "steps": result.steps, "asked": order.steps, "precision": result.precision, "seconds": round(result.seconds, 1),
        "stopped": result.stopped, "weights_sha256": files.sha256(order.out),
        "curve": [list(point) for point in result.curve],
    }  # fmt: skip
    files.write_json(order.out.with_suffix(".json"), record)
    return record


def _fresh(order: Order) -> Model:
    """The network with its factory's own weights, made under the seed, or with those to begin with."""
    if order.start is not None:
        model = loading.load_model(order.model, weights=order.start, options=order.options)
    else:
        model = loading.load_model(order.model, options=order.options, latency_only=True)
    if "train" not in loading.capabilities(model):
        raise ModelError(f"{order.model} is a file with its graph inside; train a built-in name or FILE.py:FACTORY")
    if order.start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(order.seed)
            model = model.with_module(origins.create(model.origin).float())
    model.stage.module.requires_grad_(True)
    options = {key: value for key, value in model.options.items() if key != "latency_only"}
    return dataclasses.replace(model, options=options)


def _identity(model: Model, order: Order, source: data.Source, lr: float) -> dict[str, Any]:
    """What decides the result, under the names of the options: a run is resumed with the same alone.

    Data and networks count by content, not by where they lie. Made before the first step.
    """
    network = files.key({name: value for name, value in model.origin.items() if name != "path"})
    start = weights.state_hash(model.stage.module)[:24] if order.start is not None else "fresh"
    return {
        "model": f"{model.name} {network}", "weights": start, "data": _content(source), "batch": order.batch,
        "steps": order.steps, "lr": lr, "ema": order.ema, "optimizer": order.optimizer, "seed": order.seed,
        "precision": training.resolve_precision(order.precision),
    }  # fmt: skip


def _content(source: data.Source) -> str:
    """Hash of what is learnt from, in its order: inputs, labels and reference images."""
    found = []
    for i in range(len(source)):
        reference = source.reference(i)
        found.append((source.key(i), source.label(i), None if reference is None else content_key(reference)))
    return files.key(found)


def _lesson(model: Model, order: Order, kind: str, source: data.Source) -> Lesson:
    if kind in ("denoiser", "unconditional"):
        return (_denoiser if kind == "denoiser" else _adversary)(model, order, source)
    dataset = data.Dataset(source, model, seed=order.seed)
    first = dataset[0]
    wanted = "class labels (class folders, or integers y)" if kind == "classification" else "reference images (y)"
    if (first.label if kind == "classification" else first.reference) is None:
        raise DataError(f"{order.data}: {kind} learns from {wanted}, and these data have none")
    batch_at = _lessons.from_data(dataset, order.batch, order.seed, None)
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


def _denoiser(model: Model, order: Order, source: Any) -> Lesson:
    levels, real = diffusion.Levels(model.options), _real(model, source, order.batch, order.seed)
    if levels.labels and len(source.labels or ()) > levels.labels:
        raise DataError(f"{source.name} has {len(source.labels)} classes, {model.name} takes {levels.labels}")

    def batch_at(step: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        found, labels = real(step)
        rng = np.random.default_rng([order.seed, step, 1])
        x0 = torch.from_numpy(found)
        places = (rng.permutation(order.batch) + rng.random(order.batch)) / order.batch  # spread evenly over the times
        t = torch.from_numpy(np.floor(places * levels.count)).float()
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        given: tuple[torch.Tensor, ...] = (levels.noised(x0, t, eps), t)
        if levels.labels:
            none = (rng.random(order.batch) < DROPPED) | (labels < 0)
            given = (*given, torch.from_numpy(np.where(none, levels.labels, labels)).float())
        return given, levels.target(x0, t, eps)

    def loss(module: nn.Module, batch: Any, step: int) -> torch.Tensor:
        given, target = batch
        return (module(*given).float() - target).square().mean()

    return Lesson(model.stage.module, batch_at, loss)


def _adversary(model: Model, order: Order, source: Any) -> Lesson:
    """A generator from latents and its discriminator, learning in turns; half of the steps belong to each."""
    real, shape = _real(model, source, order.batch, order.seed), tuple(int(d) for d in model.stage.inputs[0].shape[1:])
    if len(model.stage.inputs) > 1:
        raise ModelError(f"{model.name} takes {len(model.stage.inputs)} inputs; generators that take latents alone can"
                         " be trained here")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        critic = discriminator(int(model.stage.outputs[0].shape[1]), int(model.stage.outputs[0].shape[2]))
    learner = nn.ModuleDict({"generator": model.stage.module, "critic": critic})

    def latents(*key: int) -> torch.Tensor:
        numbers = np.random.default_rng(key).standard_normal((order.batch, *shape), dtype=np.float32)
        return torch.from_numpy(numbers)

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(real(step)[0]), latents(order.seed, step, 1)

    def loss(module: nn.Module, batch: Any, step: int) -> torch.Tensor:
        found, z = batch
        critics = step % 2 == 0
        module["critic"].requires_grad_(critics)  # type: ignore[index]
        made = module["generator"](z)  # type: ignore[index]
        if critics:  # without a gradient the generator's weights stay as they are, and the other way round below
            scores = module["critic"](found).float(), module["critic"](made.detach()).float()  # type: ignore[index]
            return relu(1 - scores[0]).mean() + relu(1 + scores[1]).mean()
        return -module["critic"](made).float().mean()  # type: ignore[index]

    def finish() -> None:
        _measure_norms(model.stage.module, lambda index: latents(order.seed, 7, index))

    return Lesson(learner, batch_at, loss, finish)


def discriminator(channels: int, size: int, width: int = 64) -> nn.Module:
    """(N, C, size, size) to scores (N, 1, 1, 1): halved down to 4x4, then one number."""
    widths, side = [channels], size
    while side > 4:
        widths.append(width * 2 ** (len(widths) - 1))
        side //= 2
    if side != 4:
        raise ModelError(f"images of {size} pixels cannot be halved down to 4; train on a power of two")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 4)), _Gain())


class _Gain(nn.Module):
    """x * 8: with spectral norm alone the scores stay closer than the hinge's margin."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 8.0


@torch.no_grad()
def _measure_norms(generator: nn.Module, latents: Callable[[int], torch.Tensor], batches: int = 32) -> None:
    """Statistics of batch norms anew for averaged weights; leaves eval mode on."""
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    for index in range(batches if norms else 0):
        generator(latents(index))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    generator.eval()
