"""From a request to the data of a run: what passes learn from, what decisions are made on, what is reported on.

Three parts that share no image (by content): train, select, test. `select` decides between candidates; `test` gives the
figures of the report, and can only reject a candidate. Calibration images are taken from train.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import calibration_sets, data, registry, samplers
from edgegen.errors import DataError
from edgegen.request import Request
from edgegen.types import Model

# Without a number from the user: enough for a KID at its usual subset size, and for a point of top-1.
# A denoiser runs many times for each of them; a few-step one makes other images of the same latents, so that KID alone
# can tell, and with 200 it never does.
DEFAULT_SAMPLES = {"unconditional": 2000, "denoiser": 200, "few steps": 2000, "classification": 5000}

# Along its own way from noise to image, or (to compare with) noise at the first time alone.
DENOISER_CALIBRATION = ("trajectory", "naive")


@dataclass(frozen=True)
class RunData:
    """train/select/test/calibration are `data.Dataset`; None under --latency-only, but for calibration where images are
    given. sources: text for the report.

    fresh: other latents of an unconditional generator, for select and for test: where there are no real images, the
    teacher's samples from them are the reference.
    """

    train: Any
    select: Any
    test: Any
    calibration: Any
    sources: dict[str, str]
    broken: tuple[str, ...] = ()
    fresh: tuple[Any, Any] | None = None


def prepare(request: Request, model: Model) -> RunData:
    """Open, check and split the data that the request names.

    Raises:
        DataError: no data for a task that needs it, unreadable data, or calibration that overlaps the evaluation data.
    """
    if request.latency_only:
        return _unjudged(request, model)
    if why := _not_judged(model):
        raise DataError(f"{model.name} {why}, so that its quality is not judged alone: give --latency-only")
    if model.task == "unconditional":
        return _latents(request, model)
    train_source, eval_source, names = _sources(request, model)
    train = data.Dataset(train_source, model, seed=request.seed)
    if eval_source is None:
        train, select, test = data.split(train, (0.6, 0.2, 0.2), seed=request.seed)
    else:
        held_out = data.Dataset(eval_source, model, seed=request.seed)
        if shared := data.overlap(train, held_out):
            raise DataError(
                f"{shared} images are both in the training and in the evaluation data; give data that do not overlap"
            )
        select, test = data.split(held_out, (0.5, 0.5), seed=request.seed)
    if not (len(train) and len(select) and len(test)):
        raise DataError(
            f"{names['train']} and {names['evaluation']}: too few different images, got {len(train)} to learn from,"
            f" {len(select)} to decide on and {len(test)} to report on; each needs at least one: give more images"
        )
    limit = request.samples or DEFAULT_SAMPLES.get(model.task, 200)
    select, test = _limited(select, limit, request.seed), _limited(test, limit, request.seed)
    calibration = _calibration(request, model, train, (select, test))
    broken = tuple(train_source.broken) + (tuple(eval_source.broken) if eval_source is not None else ())
    return RunData(train, select, test, calibration, names, broken)


def _unjudged(request: Request, model: Model) -> RunData:
    """The data of --latency-only: calibration on the images that are given, or on latents; else random values."""
    if request.eval_data is not None:
        raise DataError(f"--eval-data {request.eval_data}: --latency-only judges no quality; leave out one of the two")
    random = RunData(None, None, None, None, {"calibration": "random values (--latency-only)"})
    if request.calibration == "random":
        return random
    if model.task == "unconditional":
        if samplers.of(model.options) is not None:  # its steps are walked from one latent alone: large ones take long
            return random
        latents = data.Dataset(None, model, seed=request.seed, length=request.calibration_images)
        names = {"calibration": request.calibration or "latents N(0, 1)"}
        return RunData(None, None, None, _calibration(request, model, latents, ()), names)
    if request.data is None and not request.calibration:
        return random
    source = data.open_source(request.data) if request.data is not None else None
    train = data.Dataset(source, model, seed=request.seed) if source is not None else None
    calibration = _calibration(request, model, train, ())
    names = {"calibration": str(request.calibration or request.data)}
    return RunData(None, None, None, calibration, names, tuple(source.broken) if source is not None else ())


def _sources(request: Request, model: Model) -> tuple[Any, Any, dict[str, str]]:
    if request.data is not None:
        held_out = data.open_source(request.eval_data) if request.eval_data is not None else None
        names = {"train": str(request.data), "evaluation": str(request.eval_data or f"held-out part of {request.data}")}
        return data.open_source(request.data), held_out, names
    chosen = str(model.options.get("calibration", ""))
    if not chosen:
        raise DataError(
            f"{model.name} needs data: give --data FOLDER (images, an archive of them, or .npz with x and y);"
            " or --latency-only for timing without quality"
        )
    held_out = calibration_sets.load_split(chosen, "eval")
    if request.eval_data is not None:
        held_out = data.open_source(request.eval_data)
    names = {"train": f"calibration set {chosen}, training part", "evaluation": str(request.eval_data or chosen)}
    return calibration_sets.load_split(chosen, "train"), held_out, names


def _not_judged(model: Model) -> str:
    """Why there is no measure of a network's quality; empty where there is one."""
    given, made = model.stage.inputs, model.stage.outputs[0].shape
    if samplers.of(model.options) is not None:
        return "" if made[1] in (1, 3) else f"makes latents of {made[1]} channels, which need a decoder to be images"
    if model.options.get("latents") == "styles":
        return "takes styles, which its mapping makes and N(0, 1) does not"
    if len(given) > 1:
        return f"takes {', '.join(spec.name for spec in given)}"
    return f"gives {made}, which is no image" if model.task == "unconditional" and len(made) != 4 else ""


def _latents(request: Request, model: Model) -> RunData:
    kind = "denoiser" if samplers.of(model.options) is not None else "unconditional"
    number = request.samples or DEFAULT_SAMPLES[kind]
    if number < 2:
        raise DataError(f"--samples {number}: KID needs at least two samples; the default is 2000")
    path = request.eval_data or request.data
    real = data.open_source(path) if path is not None else None
    if real is not None and real.kind != "images":
        raise DataError(f"{path}: holds {real.kind}; an unconditional generator is compared with images")
    learned = _learned(request, real)
    train, select, test = (
        data.Dataset(real if part else learned, model, seed=4 * request.seed + part, length=number) for part in range(3)
    )
    if real is not None:
        select, test = data.split_real([select, test], request.seed)
    both = data.Dataset(None, model, seed=4 * request.seed + 3, length=2 * number)
    fresh = (both.subset(range(number)), both.subset(range(number, 2 * number)))
    calibration = _calibration(request, model, train, (select, test))
    reference = str(path) if real is not None else "samples of the teacher from other latents"
    taught = f"latents N(0, 1), real images of {request.data}" if learned is not None else "latents N(0, 1)"
    names = {"train": taught, "evaluation": f"latents N(0, 1), against {reference}"}
    return RunData(train, select, test, calibration, names, tuple(real.broken) if real is not None else (), fresh)


def _learned(request: Request, judged: Any) -> Any:
    """The real images that passes of a generator may learn from: those of --data, where --eval-data gives others.

    Raises:
        DataError: not images, or images that the result is judged on.
    """
    if request.data is None or request.eval_data is None:
        return None
    source = data.open_source(request.data)
    if source.kind != "images":
        raise DataError(f"{request.data}: holds {source.kind}; an unconditional generator learns from images")
    held_out = {judged.key(i) for i in range(len(judged))}
    if shared := sum(source.key(i) in held_out for i in range(len(source))):
        raise DataError(
            f"{shared} images are both in the training and in the evaluation data; give data that do not overlap"
        )
    return source


def _calibration(request: Request, model: Model, train: Any, held_out: tuple[Any, ...]) -> Any:
    if samplers.of(model.options) is not None:
        if request.calibration not in ("", *DENOISER_CALIBRATION):
            raise DataError(
                f"--calibration {request.calibration}: a denoiser calibrates on its own inputs; give"
                f" {' or '.join(DENOISER_CALIBRATION)}"
            )
        chosen = train
    elif request.calibration:
        if request.calibration == "random":
            raise DataError(
                "--calibration random: random values calibrate ranges that no real image has; give real images, or"
                " --latency-only for timing alone (the bundle is then stamped as not for accuracy)"
            )
        known = request.calibration in registry.names("calibration")
        if not known and not Path(request.calibration).exists():
            registry.check("calibration", request.calibration)
        source = (
            calibration_sets.load_split(request.calibration, "train")
            if known
            else data.open_source(Path(request.calibration))
        )
        if model.task == "unconditional" and source.kind != "latents":
            raise DataError(f"--calibration {request.calibration}: holds {source.kind}, {model.name} takes latents")
        chosen = data.Dataset(source, model, seed=request.seed)
        shared = sum(data.overlap(chosen, part) for part in held_out)
        if shared:
            raise DataError(
                f"--calibration {request.calibration}: {shared} of its images are also in the evaluation data;"
                " calibrate on other images"
            )
    else:
        chosen = train
    return _limited(chosen, request.calibration_images, request.seed)


def _limited(dataset: Any, number: int, seed: int) -> Any:
    return dataset.select(number, seed) if len(dataset) > number else dataset
