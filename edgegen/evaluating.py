"""The quality of finished bundles: one against data, or two against each other on the same inputs.

Inputs go through the built artifact in blocks of 64; what the metrics need of a block (features, logits, the figures of
each image) is kept in the cache under the hash of artifact, inputs, extractor and settings. So memory does not grow
with the number of images, a run that was cut off goes on, and several processes share one evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgegen import data, registry
from edgegen.errors import BundleError, DataError, UsageError
from edgegen.evaluation_figures import Result, result
from edgegen.evaluation_work import Settings, Subject, Task, Work, referenced, subject, takes
from edgegen.metrics import _blocks, _extractors
from edgegen.types import Model

__all__ = ["Result", "Settings", "evaluate"]

DEFAULT_N = 2048
DEFAULTS = {
    "classification": ("top1", "agreement"),
    "unconditional": ("psnr", "bad_images"),
    "": ("psnr", "ssim", "perceptual", "brightness_shift", "colour_shift", "bad_images"),
}
SETS = ("kid", "fid", "precision", "recall", "spectrum")  # with real images
Progress = Callable[[str, str, float], None]


def evaluate(paths: list[Path], settings: Settings, progress: Progress) -> Result:
    """Figures of one bundle, or of two on the same inputs with the differences' paired intervals.

    Raises:
        BundleError: not a bundle. DataError: no data where they are needed, or an extractor that a metric cannot use.
        UsageError: metrics that do not fit.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"evaluate takes one bundle, or two to compare, got {len(paths)}")
    subjects = [subject(path) for path in paths]
    _check_same(subjects)
    model = subjects[0].model
    dataset, real = _dataset(model, settings), _real(model, settings)
    chosen, left_out = _metrics(model, dataset, settings, real, len(subjects))
    features = None
    if any(takes(name) == "features" for name in chosen) or "perceptual" in chosen:
        features = _extractors.load(settings.features or str(model.options.get("features", "cifar")))
    if "perceptual" in chosen and (why := registry.module("metrics", "perceptual").lacks_maps(
        features, [int(d) for d in model.stage.outputs[0].shape[1:]]
    )):  # fmt: skip
        if settings.metrics:
            raise DataError(f"metric perceptual: {why}")
        chosen, left_out = tuple(name for name in chosen if name != "perceptual"), {**left_out, "perceptual": why}
    share = _blocks.share_of(settings.shard)
    task = Task(subjects, dataset, real, chosen, settings, features)
    made = task.blocks()
    with contextlib.ExitStack() as stack:
        made.fill(Work(task, stack), share, lambda text, part: progress("evaluate", text, part))
    reference = task.reference_blocks()
    if reference is not None:
        reference.fill(task.reference_block, share, lambda text, part: progress("real images", text, part))
    if share.count > 1 and not share.together:
        return Result((), complete=False)
    return dataclasses.replace(result(task, made, reference), left_out=left_out)


def _check_same(subjects: list[Subject]) -> None:
    """Two bundles must take the same inputs and give outputs of one kind."""
    if len(subjects) < 2:
        return
    a, b = (s.model for s in subjects)
    same = a.task == b.task and a.preprocessing == b.preprocessing
    shapes = [(m.stage.inputs[0].shape, m.stage.outputs[0].shape) for m in (a, b)]
    if not same or shapes[0] != shapes[1]:
        raise BundleError(
            f"{subjects[0].path} is {a.task} {shapes[0]}, {subjects[1].path} is {b.task} {shapes[1]}; only networks of"
            " the same task, input, preprocessing and output can be compared"
        )


def _dataset(model: Model, settings: Settings) -> Any:
    """The samples: latents, or those of --data."""
    if model.task == "unconditional":
        return data.Dataset(None, model, seed=settings.seed, length=settings.n or DEFAULT_N)
    if settings.data is None:
        raise DataError(f"{model.name} ({model.task}) needs inputs: give --data FOLDER, an archive of one, or .npz")
    return data.Dataset(data.open_source(settings.data), model, seed=settings.seed, length=settings.n or None)


def _real(model: Model, settings: Settings) -> Any:
    """The source of real images to compare sets with; None where none are given.

    Raises:
        UsageError: given twice, or for a network that makes no images. DataError: no images.
    """
    path = settings.real
    if model.task == "unconditional":
        if path is not None and settings.data is not None:
            raise UsageError(f"{model.name} takes no inputs: --data and --real are both real images, give one of them")
        path = path or settings.data
    if path is None:
        return None
    shape = model.stage.outputs[0].shape
    if len(shape) != 4 or shape[1] not in (1, 3) or any(isinstance(size, str) for size in shape[1:]):
        raise UsageError(f"{model.name} gives {shape}, no images (N, 1 or 3, H, W) of one size; leave out real images")
    source = data.open_source(path)
    if source.kind != "images":
        raise DataError(f"{path}: holds {source.kind}; what is generated is compared with images")
    return source


def _metrics(
    model: Model, dataset: Any, settings: Settings, real: Any, bundles: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The metrics that were asked for, or those of the task that the data allow; and why those left out are so.

    Raises:
        UsageError: an unknown metric, or one that needs what is not there; says what.
    """
    sets = SETS if real is not None or model.task == "unconditional" else ()
    asked = settings.metrics or (*sets, *DEFAULTS.get(model.task, DEFAULTS[""]))
    lacking = {}
    for name in asked:
        registry.check("metrics", name)
        lacking[name] = _lacks(name, model, dataset, real, bundles)
    if settings.metrics:
        for name, why in lacking.items():
            if why:
                raise UsageError(f"metric {name}: {why}")
    found = tuple(dict.fromkeys(name for name in asked if not lacking[name]))
    if not found and bundles == 1:
        why = "; ".join(sorted({text for text in lacking.values() if text}))
        raise UsageError(f"nothing to measure on {model.name}: {why}")
    return found, {name: why for name, why in lacking.items() if why}


def _lacks(name: str, model: Model, dataset: Any, real: Any, bundles: int) -> str:
    """Why a metric cannot be had here; empty when it can."""
    kind, classifier = takes(name), model.task == "classification"
    if classifier != (kind in ("labels", "corruptions", "logits")):
        return f"is not for {model.task}"
    if kind in ("labels", "corruptions"):
        if not dataset.labelled:
            return "needs labels; give --data with a folder for each class, or .npz with y"
        if kind == "corruptions" and dataset.source.kind != "images":
            return "needs images that can be corrupted; the data are arrays"
    if kind == "logits" and bundles == 1:
        return "compares two bundles; give two"
    if kind in ("features", "spectra") and name != "inception_score" and real is None:
        option = "--data" if model.task == "unconditional" else "--real"
        return f"needs real images; give {option} with images of the kind that is generated"
    if kind == "pairs" and name != "bad_images" and bundles == 1 and not referenced(dataset):
        return "needs reference images; give an .npz with x and y, or a second bundle to compare with"
    return ""
