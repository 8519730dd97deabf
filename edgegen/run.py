"""One run of `compress`: what stays the same during it, how it is opened, and how it exports and times a network."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import (
    __version__,
    bundle,
    data,
    files,
    inputs,
    judgement,
    loading,
    measuring,
    onnx_graph,
    operator_times,
    profiling,
    program,
    quality,
    recipe,
    registry,
    resizing,
    rewriting,
    runlog,
    samplers,
    serial,
    targets,
    weights,
)
from edgegen import graph as layers
from edgegen.candidates import Candidate, fastest
from edgegen.devices import _spec as devices
from edgegen.errors import ModelError, RecipeError
from edgegen.judgement import Bench
from edgegen.nn import cached, diffusion
from edgegen.request import Request, check_out
from edgegen.types import Budget, Graph, Job, Measurement, Model, Stage, Target

SCREEN_ROUNDS = 8
FINAL_ROUNDS = 20
CACHED_LATENTS = 8  # whose way a partial graph is calibrated on: many steps of few images


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
    model = _model(request)
    for size in request.resolutions[1:]:  # what a further size cannot take is refused here, before any work
        inputs.prepare(request, resizing.at(model, size))
    found = inputs.prepare(request, model)
    plan = recipe.with_kept(chosen or default_recipe(model, request), request.kept)
    _check_trainable(plan, model)
    gate, budget = gate_and_budget(request, model, found)
    threads = request.threads or target.threads or measuring.host_threads()
    more = target.thorough_runtimes if request.thorough else ()
    target = dataclasses.replace(target, threads=threads, runtimes=(*target.runtimes, *more))
    folder = files.cache_folder() / "runs" / _identity(request, out, model, target, plan, found)
    if folder.exists() and not request.resume:
        shutil.rmtree(folder)
    limits = measuring.Limits(memory_bytes=request.max_memory_bytes or None)
    log = runlog.RunLog(folder / "log.jsonl")
    bench = Bench(target, folder, log, limits, progress, seed=request.seed, device=request.device)
    return Run(request, model, target, plan, found, bench, gate, budget, folder, out, progress)


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
    request: Request, out: Path, model: Model, target: Target, plan: recipe.Recipe, found: inputs.RunData
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
    return files.key(request.identity(), request.max_memory_bytes, str(out.absolute()), *content, __version__)


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


def model_key(model: Model) -> str:
    """Identity of a model's weights, whatever it was loaded from."""
    stage = model.stage
    if stage.module is not None:
        return weights.state_hash(stage.module)
    return files.sha256(Path(str(stage.onnx)))


def export(run: Run, model: Model, name: str) -> Graph:
    """The model's ONNX graph (from the run's folder when it is there), compared with the torch module on real input.

    With cached blocks, a full graph and a partial one.
    """
    out, settings = run.folder / "graphs" / f"{name.replace(' ', '_')}.onnx", samplers.of(model.options)
    identity = ["export", name, model_key(model)]
    if settings is None or not samplers.cached(settings):
        graph = _exported(run, model.stage, out, identity, lambda graph: feeds(run, graph))
        return dataclasses.replace(graph, preprocessing=model.preprocessing, sampler=settings)
    try:
        full, partial = cached.stages(model.stage, settings)
    except ValueError as error:
        raise ModelError(f"{model.name}: {error}; set the sampler's cache_every to 1") from error
    identity.append(files.key(settings))
    graph = _exported(run, full, out, identity, lambda graph: feeds(run, graph))
    between, samples = out.with_name(f"{out.stem}.partial.onnx"), out.with_name(f"{out.stem}.samples")
    if not samples.exists():
        found = cached.runs(model.stage.module, settings)
        latents = _latents(run, feeds(run, graph)[graph.inputs[0].name], CACHED_LATENTS)
        _write_inputs(samples, samplers.trajectory(
            settings, found, latents, run.request.calibration_images, naive=run.request.calibration == "naive"
        ))  # fmt: skip
    told = lambda graph: judgement.partial_feeds(dataclasses.replace(graph, samples=samples))  # noqa: E731
    beside = _exported(run, partial, between, [*identity, "partial"], told)
    return dataclasses.replace(graph, sampler=settings, partial=dataclasses.replace(beside, samples=samples))


def _exported(
    run: Run, stage: Stage, out: Path, identity: list[str], given: Callable[[Graph], dict[str, np.ndarray]]
) -> Graph:
    """One stage as a graph, compared with its module on what `given` says."""

    def work() -> Any:
        run.progress("export", out.stem, 0.0)
        graph = onnx_graph.to_onnx(stage, out, opset=run.target.opset)
        if stage.module is not None:
            onnx_graph.parity(stage, graph, given(graph))
            if wants_program(run.target):
                graph = dataclasses.replace(graph, program=program.save(stage, out.with_suffix(".pt2")))
        return serial.to_json(graph)

    graph = serial.from_json(Graph, run.log.once(files.key(*identity), work))
    if not graph.onnx.exists():
        onnx_graph.to_onnx(folded(stage), out, opset=run.target.opset)
    if graph.program is not None and not graph.program.exists():
        program.save(folded(stage), graph.program)
    return graph


def folded(stage: Stage) -> Stage:
    """The stage with weights that parametrizations and hooks compute (weight norm, spectral norm) as plain weights."""
    if stage.module is None:
        return stage
    module = layers.clone(stage.module)
    return dataclasses.replace(stage, module=module) if rewriting.fold_module(module) else stage


def wants_program(target: Target) -> bool:
    """Whether a runtime of the target converts from a torch program."""
    return any(getattr(registry.module("runtimes", name), "NEEDS_PROGRAM", False) for name in target.runtimes)


def feeds(run: Run, graph: Graph) -> dict[str, np.ndarray]:
    """One real sample in every input; random values only under --latency-only."""
    spec = graph.inputs[0]
    if run.data.test is None:
        shape = tuple(int(d) for d in spec.shape)
        low, high = spec.value_range or (-1.0, 1.0)
        values = np.random.default_rng(run.request.seed).uniform(low, high, shape).astype(np.float32)
    else:
        values = run.data.test[0].input[None].astype(np.float32)
    settings = samplers.of(run.model.options)
    return {spec.name: values} if settings is None else samplers.feeds(settings, values)


def calibration_folder(run: Run) -> Path:
    """The calibration samples as one memory-mappable .npy an input; random only under --latency-only."""
    folder = run.folder / "calibration"
    spec = run.model.stage.inputs[0]
    file = folder / f"{spec.name}.npy"
    if not file.exists():
        if samplers.of(run.model.options) is not None:
            _write_trajectory(run, folder)
        elif run.data.calibration is None:
            values = np.concatenate([run.bench.feeds[spec.name]] * 4)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(file, values, allow_pickle=False)
        else:
            data.write_calibration(run.data.calibration, folder, spec.name, run.request.calibration_images)
    return folder


def _write_trajectory(run: Run, folder: Path) -> None:
    """Inputs of a denoiser along its own way from noise to image (under --calibration naive: at its first step)."""
    settings, count = samplers.of(run.model.options), run.request.calibration_images
    if settings is None:
        return
    latents = _latents(run, run.bench.feeds["sample"], min(count, 32))
    runner = diffusion.runner(run.model.stage.module)
    found = samplers.trajectory(settings, runner, latents, count, naive=run.request.calibration == "naive")
    _write_inputs(folder, found)


def _latents(run: Run, otherwise: np.ndarray, count: int) -> np.ndarray:
    """The first latents of the calibration data, or what there is without any."""
    if run.data.calibration is None:
        return otherwise
    return np.stack([run.data.calibration[i].input for i in range(min(count, len(run.data.calibration)))])


def _write_inputs(folder: Path, found: Mapping[str, np.ndarray]) -> None:
    """One .npy file an input."""
    with files.whole(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, values in found.items():
            np.save(temporary / f"{name}.npy", values, allow_pickle=False)


def unquantized(run: Run, of: str, graph: Graph, baseline: Candidate | None) -> list[Candidate]:
    """Every unquantized build of a network, timed in one run (together with the baseline, when there is one)."""
    plans = run.bench.plans(quantized=False)
    # An FP16 build looks at activations: what FP16 cannot hold stays in FP32 (see fp16_lint).
    samples = calibration_folder(run) if any(plan.precision == "fp16" for _, plan in plans) else None
    built = [
        run.bench.build(of, graph, runtime, plan, samples if plan.precision == "fp16" else None)
        for runtime, plan in plans
    ]
    if baseline is None:
        return run.bench.time(built, None, SCREEN_ROUNDS)
    return run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]


def data_key(run: Run) -> str:
    """Identity of the training data: every content key in order."""
    return run.data.train.digest if run.data.train is not None else "none"


def job_of(run: Run, progress: Callable[[str, float], None] = lambda text, fraction: None) -> Job:
    """What a pass may look at; `latency` takes any stage, of the whole network or of a part with inputs of its own."""

    def latency(stage: Stage) -> Measurement:
        shapes = [list(spec.shape) for spec in stage.inputs]
        name = f"candidate {files.key(weights.state_hash(stage.module), shapes)[:12]}"
        own = run if shapes == [list(spec.shape) for spec in run.model.stage.inputs] else _apart(run, stage, name)
        graph = export(own, dataclasses.replace(own.model, stages=(stage,)), name)
        best = fastest(unquantized(own, name, graph, None))
        if best.latency is None:
            raise RecipeError(f"{name} cannot be timed")
        return best.latency

    return Job(
        target=run.target,
        data=run.data.train,
        teacher=run.model,
        budget=run.budget,
        seed=run.request.seed,
        threads=run.target.threads,
        progress=progress,
        latency=latency,
        operators=(lambda probes: _operators(run, probes, progress)) if run.bench.measures else None,
    )


def _apart(run: Run, stage: Stage, name: str) -> Run:
    """The run for a stage with other inputs than the network's: random ones, and a folder of its own."""
    low = {spec.name: spec.value_range or (-1.0, 1.0) for spec in stage.inputs}
    rng = np.random.default_rng(run.request.seed)
    given = {spec.name: rng.uniform(*low[spec.name], [int(d) for d in spec.shape]).astype(np.float32)
             for spec in stage.inputs}  # fmt: skip
    folder = run.folder / "apart" / name.replace(" ", "_")
    bench = dataclasses.replace(run.bench, folder=folder, feeds=given)
    alone = dataclasses.replace(run.model, stages=(stage,), options={})
    nothing = inputs.RunData(None, None, None, None, {})
    return dataclasses.replace(run, model=alone, data=nothing, bench=bench, folder=folder)


def _operators(
    run: Run, probes: Sequence[Mapping[str, Any]], progress: Callable[[str, float], None]
) -> list[Measurement]:
    """Small networks in the runtime and precision of the original's best unquantized build (from the log)."""
    best = fastest(unquantized(run, "original", export(run, run.model, "original"), None))
    pair = (best.runtime, best.graph.plan.precision)
    version = profiling.version_of(best.runtime, best.artifact.versions) if best.artifact else ""
    device = run.bench.device or "local"
    return operator_times.times(probes, run.target, pair, version, device=device, progress=progress)
