"""Train a network on images from nothing (or from given weights): what `edgegen train` does; how is in `lessons`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgegen import __version__, data, files, lessons, loading, origins, samplers, training, weights
from edgegen.errors import ModelError, RecipeError, UsageError
from edgegen.records import ModelOptions
from edgegen.sources import content_key
from edgegen.types import Model

RATES = {"denoiser": 5e-4, "classification": 2e-3, "unconditional": 2e-4}
LOOKED = 1024  # samples whose content tells data apart: reading millions of them would take longer than some trainings
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
    device: str = "auto"


def train(order: Order, progress: Progress | None = None) -> dict[str, Any]:
    """Train, write the weights to `order.out` and the record with the loss curve beside it; the record.

    Raises:
        ModelError: a model that is a file, or an `out` that is no .safetensors. DataError: data that do not fit the
            task. UsageError: a device that is not here. RecipeError: a setting out of range; to be resumed, and the
            checkpoint is of another command.
    """
    try:
        return _trained(order, progress)
    except UsageError:
        raise
    except ValueError as error:  # of `training`, which passes use too: there it is a pass that was set wrongly
        raise RecipeError(str(error)) from error


def _trained(order: Order, progress: Progress | None) -> dict[str, Any]:
    if order.out.suffix != ".safetensors":
        raise ModelError(f"--out {order.out}: weights are written as .safetensors")
    device = training.chosen_device(order.device)
    model = _fresh(order)
    kind = "denoiser" if samplers.of(model.options) is not None else model.task
    source = data.open_source(order.data)
    lesson = lessons.of(model, source, kind, order.batch, order.seed)
    lr = order.lr or RATES.get(kind, 1e-3)
    checkpoint = order.out.with_suffix(".checkpoint")
    if not order.resume:
        checkpoint.unlink(missing_ok=True)
    result = training.train(
        lesson.learner, lesson.loss, lesson.batch_at, steps=order.steps, lr=lr, seed=order.seed, ema=order.ema,
        checkpoint=checkpoint, progress=progress, precision=order.precision, warmup=min(0.05, 200 / order.steps),
        threads=order.threads, optimizer=order.optimizer, device=device,
        identity=_identity(model, order, source, lr),
    )  # fmt: skip
    lesson.finish()
    weights.save_state(model.stage.module, order.out)
    checkpoint.unlink(missing_ok=True)
    record = {
        "edgegen": __version__, "model": model.name, "origin": dict(model.origin), "task": model.task, "kind": kind,
        "data": str(order.data), "seed": order.seed, "batch": order.batch, "lr": lr, "ema": order.ema,
        "optimizer": order.optimizer, "device": device,
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
    """Hash of what is learnt from: how many; input, label and reference of up to `LOOKED` of them, evenly spread."""
    found: list[Any] = [len(source)]
    for i in np.linspace(0, len(source) - 1, min(len(source), LOOKED)).astype(int).tolist():
        reference = source.reference(i)
        found.append((source.key(i), source.label(i), None if reference is None else content_key(reference)))
    return files.key(found)
