"""One run of `compress`: what stays the same during it, and how it is opened from what the user asks."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgegen import (
    __version__,
    architecture,
    bundle,
    files,
    inputs,
    judgement,
    loading,
    measuring,
    quality,
    recipe,
    resizing,
    runlog,
    samplers,
    serial,
    steps,
    targets,
    training,
)
from edgegen.devices import _spec as devices
from edgegen.errors import ModelError, RecipeError
from edgegen.judgement import Bench
from edgegen.request import Request, check_out
from edgegen.types import Budget, Model, Target

SCREEN_ROUNDS = 8
FINAL_ROUNDS = 20


def quiet(step: str, text: str, fraction: float) -> None:
    """A progress callback that shows nothing."""


@dataclass
class Run:
    """Everything that stays the same during one run of `compress`."""

    request: Request
    model: Model
    target: Target
    recipe: recipe.Recipe
    data: inputs.RunData
    bench: Bench
    gate: quality.Gate
    budget: Budget
    folder: Path
    out: Path
    progress: judgement.Progress
    train_device: str = "cpu"

    @property
    def log(self) -> runlog.RunLog:
        """The log of finished work."""
        return self.bench.log


def open_run(request: Request, progress: judgement.Progress) -> Run:
    """Check every part of a request and open the folder of its run; nothing is written when a check fails."""
    target = targets.load(request.target)
    chosen = recipe.load(request.recipe) if request.recipe else None
    out = request.out or Path("out") / f"{Path(request.model.split(':')[-1]).stem}-{target.name}"
    check_out(out, request.resume)
    if request.device:
        devices.parse(request.device)
    train_device = training.chosen_device(request.train_device)
    model = _model(request)
    plan = recipe.with_kept(chosen or default_recipe(model, request), request.kept)
    request = _with_samples(request, model, plan)
    if request.features:  # weights that are not here are told before any work
        quality.features(model, request.features)
    for size in request.resolutions[1:]:  # what a further size cannot take is refused here, before any work
        inputs.prepare(request, resizing.at(model, size))
    found = inputs.prepare(request, model)
    _check_trainable(plan, model)
    gate, budget = gate_and_budget(request, model, found)
    threads = request.threads or target.threads or measuring.host_threads()
    more = target.thorough_runtimes if request.thorough else ()
    target = dataclasses.replace(target, threads=threads, runtimes=(*target.runtimes, *more))
    folder = files.cache_folder() / "runs" / _identity(
        request, out, model, target, plan, found, *([] if train_device == "cpu" else [train_device])
    )
    if folder.exists() and not request.resume:
        shutil.rmtree(folder)
    limits = measuring.Limits(memory_bytes=request.max_memory_bytes or None)
    log = runlog.RunLog(folder / "log.jsonl")
    bench = Bench(target, folder, log, limits, progress, seed=request.seed, device=request.device)
    return Run(request, model, target, plan, found, bench, gate, budget, folder, out, progress, train_device)


def _with_samples(request: Request, model: Model, plan: recipe.Recipe) -> Request:
    """The request with as many samples as a denoiser of a few steps is judged on, where the user states no number."""
    fewer = samplers.of(model.options) is not None and any(step.name == "distill_steps" for step in plan.steps)
    if request.samples or not fewer:
        return request
    return dataclasses.replace(request, samples=inputs.DEFAULT_SAMPLES["few steps"])


def _model(request: Request) -> Model:
    """The network behind --model; a folder is a bundle, whose compressed network is taken."""
    if Path(request.model).is_dir():
        if request.weights is not None or request.model_options:
            raise ModelError(f"{request.model} is a bundle, which states its weights and its input; leave those out")
        return _sized(bundle.load_model(Path(request.model)), request)
    stated = request.model_options
    if request.resolutions:
        stated = resizing.options_for(request.model, stated, request.resolutions[0])
    options = loading.ModelOptions(**stated)
    found = loading.load_model(
        request.model, weights=request.weights, options=options, latency_only=request.latency_only
    )
    return _sized(found, request)


def _sized(model: Model, request: Request) -> Model:
    return resizing.at(model, request.resolutions[0]) if request.resolutions else model


def _identity(
    request: Request, out: Path, model: Model, target: Target, plan: recipe.Recipe, found: inputs.RunData, *more: str
) -> str:
    """Key of a run's folder: what lies behind the names counts, so that a changed file never meets old work."""
    parts = {name: getattr(found, name) for name in ("train", "select", "test", "calibration")}
    digests = {name: part.digest for name, part in parts.items() if part is not None}
    real = getattr(found.select, "source", None) if model.task == "unconditional" else None
    images = [real.key(i) for i in range(len(real))] if real is not None else []
    loop = samplers.of(model.options)
    content = [dict(model.origin), model_key(model), loop, recipe.to_toml(plan), serial.to_json(target), digests]
    content.append(images)
    # The memory limit too: what failed for lack of memory is logged as failed.
    return files.key(request.identity(), request.max_memory_bytes, str(out.absolute()), *content, *more, __version__)


def gate_and_budget(request: Request, model: Model, found: inputs.RunData) -> tuple[quality.Gate, Budget]:
    """The gate of the task and the budget with its default filled in; a classifier's is at least one image."""
    labelled = found.select is not None and found.select[0].label is not None
    gate = quality.gate(model, labelled, request.quality_unit)
    if model.task == "unconditional" and found.test is not None:
        gate = dataclasses.replace(gate, unit=f"{gate.unit}, N = {len(found.test)}")
    allowed = request.budget.max_quality_drop
    if request.min_psnr is not None:
        if model.task != "image-to-image" or allowed is not None or not 0 < request.min_psnr <= quality.CEILING_DB:
            raise RecipeError(
                f"--min-psnr {request.min_psnr:g}: is for image-to-image ({model.name} is for {model.task}), between 0"
                f" and {quality.CEILING_DB:g} dB, in place of --max-quality-drop; give that one instead"
            )
        allowed = quality.CEILING_DB - request.min_psnr
    if allowed is None:
        allowed = gate.default
    if model.task == "classification" and found.select is not None:
        image = 100.0 / min(len(found.select), len(found.test))
        if 0 < allowed < image:  # a budget finer than one image would be decided by chance
            said = f"{gate.unit} (asked: {allowed:g}; one image of this data is {image:g})"
            gate = dataclasses.replace(gate, unit=said)
            allowed = image
    return gate, dataclasses.replace(request.budget, max_quality_drop=allowed)


def default_recipe(model: Model, request: Request) -> recipe.Recipe:
    """`balanced` where passes can train the network, else `post-training`."""
    trainable = "train" in loading.capabilities(model) and not request.latency_only
    return recipe.load("balanced" if trainable else "post-training")


def _check_trainable(plan: recipe.Recipe, model: Model) -> None:
    structural = [step.name for group in recipe.groups(plan) for step in group]
    if structural and "train" not in loading.capabilities(model):
        raise RecipeError(
            f"{structural[0]} needs a torch network; {model.name} comes as {model.origin.get('kind')}, which allows"
            " post-training passes only: use --recipe post-training"
        )
    for step in plan.steps:
        if step.teacher:
            steps.teacher_of(step, model)


def model_key(model: Model) -> str:
    """Identity of a model's network, whatever it was loaded from."""
    stage = model.stage
    if stage.module is not None:
        return architecture.identity(stage.module)
    return files.sha256(Path(str(stage.onnx)))


def data_key(run: Run) -> str:
    """Identity of the training data: every content key in order."""
    return run.data.train.digest if run.data.train is not None else "none"
