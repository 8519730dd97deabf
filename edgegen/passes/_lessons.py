"""Batches for distillation: from a dataset, or made up where there is none. Each is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgegen import graph, samplers, training
from edgegen.passes import _denoising
from edgegen.types import Job, Model, TensorSpec

EVALUATED = 4  # batches that an evaluation in training looks at
Batch = dict[str, Any]  # "input": tuple of tensors, "reference": tensor or None, "label": int64 tensor or None


def from_data(data: Any, size: int, seed: int, crop: int | None, views: int = 0) -> Callable[[int], Batch]:
    """Random batches without replacement inside an epoch; items are augmented and cropped from (seed, step, place).

    views: from (seed, item, one of so many) instead; then a batch has "view": item * views + which, int64 (N,).
    """
    if samplers.of(getattr(getattr(data, "model", None), "options", {})) is not None:
        return _denoising.batches(data.model, size, seed, data)[0]
    count = len(data)

    @lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def at(step: int) -> Batch:
        samples, seen = [], []
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, count)
            rng, item = np.random.default_rng([seed, step, place]), int(order(epoch)[index])
            if views:
                which = int(rng.integers(views))
                seen.append(item * views + which)
                rng = np.random.default_rng([seed, item, which, 3])
            sample = data.train_item(item, rng)
            samples.append((*_cropped(sample.input, sample.reference, crop, rng), sample.label))
        inputs, references, labels = zip(*samples, strict=True)
        return {
            "input": (torch.from_numpy(np.stack(inputs)),),
            "reference": None if references[0] is None else torch.from_numpy(np.stack(references)),
            "label": None if labels[0] is None else torch.tensor(labels, dtype=torch.int64),
            **({"view": torch.tensor(seen)} if views else {}),
        }

    return at


def _cropped(
    image: np.ndarray, reference: np.ndarray | None, crop: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The same random square of input (C, H, W) and reference; the reference may be a multiple of the input's size."""
    if crop is None or image.ndim != 3:
        return image, reference
    height, width = image.shape[1:]
    tall, wide = min(crop, height), min(crop, width)
    y, x = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    if reference is not None:
        n = reference.shape[1] // height
        reference = reference[:, y * n : (y + tall) * n, x * n : (x + wide) * n]
    return image[:, y : y + tall, x : x + wide], reference


def made_up(model: Model, size: int, seed: int) -> tuple[Callable[[int], Batch], str]:
    """Inputs where there is no data: latents N(0, 1), or smooth random images with noise; and which it is, in words."""
    if samplers.of(model.options) is not None:
        return _denoising.batches(model, size, seed)
    specs = model.stage.inputs
    images = [spec for spec in specs if _is_image(spec)]

    def at(step: int) -> Batch:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        inputs = tuple(
            graph.normalise(_images(spec, size, generator), model.preprocessing)
            if _is_image(spec)
            else graph.example_input(spec, generator, batch=size, preprocessing=model.preprocessing)
            for spec in specs
        )
        return {"input": inputs, "reference": None, "label": None}

    return at, "self-generated: " + ("smooth random images with noise" if images else "random latents N(0, 1)")


def batches(
    model: Model, job: Job, size: int, crop: int | None = None, views: int = 0
) -> tuple[Callable[[int], Batch], str]:
    """Batches of the job's data, or made up where there is none or it has one of several inputs; and which, in words.

    Those of a denoiser are noised images: real ones where the data has any, else its teacher's. views: as in
    `from_data`.

    Raises:
        ValueError: views of what is no data.
    """
    denoises = samplers.of(model.options) is not None
    from_samples = job.data is not None and len(model.stage.inputs) == 1 and not denoises
    if views and (not from_samples or model.task == "unconditional"):
        raise ValueError("views are of the samples of a data set, and what is drawn each time has none: leave them out")
    if denoises:
        return _denoising.batches(model, size, job.seed, job.data, job.teacher)
    if from_samples:
        return from_data(job.data, size, job.seed, crop, views), "data"
    return made_up(model, size, job.seed)


def some_inputs(model: Model, job: Job, samples: int) -> tuple[list[tuple[torch.Tensor, ...]], str]:
    """Inputs of one sample each to look at, and where they are from."""
    batch_at, source = batches(model, job, 1)
    return [batch_at(step)["input"] for step in range(samples)], source


def held_out(batch_at: Callable[[int], Batch], first: int, device: str) -> list[Batch]:
    """Four batches from `first` on, the end of training: other draws, crops and made-up inputs than it learned from."""
    return [training.place(batch_at(first + number), device) for number in range(EVALUATED)]


def told(result: training.TrainResult) -> dict[str, Any]:
    """How training went, for a pass' notes: steps, seconds, the loss curve as [step, loss], why it stopped early."""
    curve = [list(point) for point in result.curve]
    return {
        "steps": result.steps, "seconds": round(result.seconds, 3), "stopped": result.stopped, "curve": curve,
        "loss_first": curve[0][1] if curve else None, "loss_last": curve[-1][1] if curve else None,
    }  # fmt: skip


def _is_image(spec: TensorSpec) -> bool:
    return spec.value_range is not None and len(spec.shape) == 4 and spec.dtype.startswith("float")


def _images(spec: TensorSpec, size: int, generator: torch.Generator) -> torch.Tensor:
    """Sums of noise at five scales, each image with its own mix, brought to the value range."""
    channels, height, width = (
        graph.FREE_SIZE if isinstance(length, str) else int(length) for length in spec.shape[1:]
    )
    total = torch.zeros(size, channels, height, width)
    for scale in (1, 2, 4, 8, 16):
        shape = (size, channels, max(1, height // scale), max(1, width // scale))
        noise = torch.randn(shape, generator=generator)
        weight = torch.rand(size, 1, 1, 1, generator=generator) * scale**0.5
        total += weight * F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)
    low, high = spec.value_range or (0.0, 1.0)
    mean, spread = total.mean((1, 2, 3), keepdim=True), total.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    centre = torch.rand(size, channels, 1, 1, generator=generator) * 0.6 + 0.2
    return ((total - mean) / spread * 0.2 + centre).clamp(0, 1) * (high - low) + low


def weights(losses: Any, features: float, reference: float, known: Sequence[str]) -> dict[str, float]:
    """Loss name -> weight from a table or a list of names; `features` and `reference` are short for two of them.

    Raises:
        ValueError: an unknown name, a weight that is not above 0, no loss at all.
    """
    table = dict(losses) if hasattr(losses, "keys") else {str(name): 1.0 for name in losses}
    table |= {name: value for name, value in (("features", features), ("reference", reference)) if value}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"unknown loss {name!r}; there are: {', '.join(known)}")
        if not value > 0:
            raise ValueError(f"the weight of loss {name} must be above 0, got {value}")
    if not table:
        raise ValueError(f"losses must name at least one of {', '.join(known)}")
    return {name: float(value) for name, value in table.items()}
