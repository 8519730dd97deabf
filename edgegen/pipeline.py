"""The only orchestrator: load -> passes -> export -> build -> measure -> bundle."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import (
    bundle,
    data,
    decide,
    files,
    inputs,
    judgement,
    loading,
    measuring,
    onnx_graph,
    quality,
    recipe,
    runlog,
    serial,
    steps,
    summary,
    targets,
    weights,
)
from edgegen.errors import RecipeError
from edgegen.judgement import Bench, Candidate
from edgegen.request import Request, check_out
from edgegen.types import Budget, Bundle, Graph, Job, Measurement, Model, PassResult, Stage, Target

SCREEN_ROUNDS = 8
FINAL_ROUNDS = 25


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


def compress(request: Request, progress: judgement.Progress = quiet) -> Bundle:
    """Take a trained network to a smaller, faster, verified bundle for a target.

    Raises:
        UsageError: bad input, found before anything is written. BudgetError: no candidate meets the budget.
        PassError, RuntimeFailed: a pass failed, or no build of the network runs at all.
    """
    run = open_run(request, progress)
    if (run.out / "manifest.json").is_file():
        return bundle.read(run.out)
    original = export(run, run.model, "original")
    _prepare_feeds(run, original)
    floats = _unquantized(run, "original", original, None)
    evaluations = decide.evaluations(run, floats)
    current, records, pool = run.model, [], floats
    baseline = judgement.fastest(floats, quantized=False)
    graphs = {"original": original}
    for number, group in enumerate(recipe.groups(run.recipe), 1):
        found, current, pool = _group(run, number, group, current, baseline, pool, graphs, evaluations)
        records += found
    pool = decide.with_quantized(run, graphs, baseline, pool, records, evaluations)
    chosen, pool = decide.choose(run, baseline, pool, evaluations)
    final = decide.final_figures(run, baseline, chosen, floats, evaluations)
    report = summary.report(run, final, records, pool)
    model = current if chosen.of != "original" else run.model
    result = decide.write_bundle(run, model, final, report)
    shutil.rmtree(run.folder, ignore_errors=True)
    return result


def open_run(request: Request, progress: judgement.Progress) -> Run:
    """Check every part of a request and open the folder of its run; nothing is written when a check fails."""
    target = targets.load(request.target)
    chosen = recipe.load(request.recipe) if request.recipe else None
    out = request.out or Path("out") / f"{Path(request.model.split(':')[-1]).stem}-{target.name}"
    check_out(out, request.resume)
    options = loading.ModelOptions(**request.model_options)
    model = loading.load_model(
        request.model, weights=request.weights, options=options, latency_only=request.latency_only
    )
    found = inputs.prepare(request, model)
    plan = recipe.with_kept(chosen or default_recipe(model, request), request.kept)
    _check_trainable(plan, model)
    gate, budget = decide.gate_and_budget(request, model, found)
    threads = request.threads or target.threads or measuring.host_threads()
    target = dataclasses.replace(target, threads=threads)
    folder = files.cache_folder() / "runs" / files.key(request.identity(), str(out.absolute()), model_key(model))
    if folder.exists() and not request.resume:
        shutil.rmtree(folder)
    limits = measuring.Limits(memory_bytes=request.max_memory_bytes or None)
    log = runlog.RunLog(folder / "log.jsonl")
    bench = Bench(target, folder, log, limits, progress, seed=request.seed)
    return Run(request, model, target, plan, found, bench, gate, budget, folder, out, progress)


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
    """The model's ONNX graph (from the run's folder when it is there), compared with the torch module on real input."""
    out = run.folder / "graphs" / f"{name.replace(' ', '_')}.onnx"

    def work() -> Any:
        run.progress("export", name, 0.0)
        graph = onnx_graph.to_onnx(model.stage, out, opset=run.target.opset)
        if model.stage.module is not None:
            feeds = _feeds(run, graph)
            onnx_graph.parity(model.stage, graph, feeds)
        return serial.to_json(graph)

    graph = serial.from_json(Graph, run.log.once(f"export {name}", work))
    if not graph.onnx.exists():
        onnx_graph.to_onnx(model.stage, out, opset=run.target.opset)
    return graph


def _feeds(run: Run, graph: Graph) -> dict[str, np.ndarray]:
    """One real sample in every input; random values only under --latency-only."""
    spec = graph.inputs[0]
    if run.data.test is None:
        shape = tuple(int(d) for d in spec.shape)
        low, high = spec.value_range or (-1.0, 1.0)
        values = np.random.default_rng(run.request.seed).uniform(low, high, shape)
        return {spec.name: values.astype(np.float32)}
    return {spec.name: run.data.test[0].input[None].astype(np.float32)}


def _prepare_feeds(run: Run, graph: Graph) -> None:
    run.bench.feeds = _feeds(run, graph)


def _unquantized(run: Run, of: str, graph: Graph, baseline: Candidate | None) -> list[Candidate]:
    """Every unquantized build of a network, timed in one run (together with the baseline, when there is one)."""
    built = [run.bench.build(of, graph, runtime, plan, None) for runtime, plan in run.bench.plans(quantized=False)]
    if baseline is None:
        return run.bench.time(built, None, SCREEN_ROUNDS)
    return run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]


def _group(
    run: Run,
    number: int,
    group: tuple[recipe.Step, ...],
    current: Model,
    baseline: Candidate,
    pool: list[Candidate],
    graphs: dict[str, Graph],
    evaluations: decide.Evaluations | None,
) -> tuple[list[dict[str, Any]], Model, list[Candidate]]:
    """Run one group of structural passes and keep it only if it pays; (records, model, candidates) afterwards."""
    name = " + ".join(step.name for step in group)
    results, candidate_model = _apply(run, number, group, current)
    graph = export(run, candidate_model, f"{number} {name}")
    builds = _unquantized(run, name, graph, baseline)
    best = judgement.fastest(builds, quantized=False)
    if evaluations is not None:
        best = run.bench.score(best, evaluations.select, run.gate, "select")
    before = max(c.speedup.value for c in pool if c.speedup is not None)
    pays = best.speedup is not None and best.speedup.value >= before * judgement.LEAST_GAIN
    broken = judgement.within(best, dataclasses.replace(run.budget, max_latency_ms=None, max_size_bytes=None), run.gate)
    kept_by_user = any(step.keep for step in group)
    verdict, reason = decide.group_verdict(best, before, pays, broken, kept_by_user, run.bench.here)
    records = summary.step_records(group, results, verdict, reason, best, run.gate)
    builds = [best if c.label == best.label else c for c in builds]
    if verdict == "undone":
        return records, current, pool + [c.judged("undone", reason) for c in builds]
    graphs[name] = graph
    return records, candidate_model, pool + builds


def _apply(
    run: Run, number: int, group: tuple[recipe.Step, ...], current: Model
) -> tuple[list[PassResult], Model]:
    results = []
    for step in group:
        title = f"{number} {step.name}"
        job = _job(run, lambda text, share, title=title: run.progress(title, text, share))
        run.progress(title, "starting", 0.0)
        result = steps.run_step(step, current, run.model, job, data_key(run))
        run.progress(title, "done", 1.0)
        current = result.model
        results.append(result)
    return results, current


def data_key(run: Run) -> str:
    """Identity of the training data: every content key in order."""
    return data.fingerprint(run.data.train) if run.data.train is not None else "none"


def _job(run: Run, progress: Callable[[str, float], None]) -> Job:
    def latency(stage: Stage) -> Measurement:
        name = f"candidate {len(list((run.folder / 'graphs').glob('*.onnx')))}"
        graph = export(run, dataclasses.replace(run.model, stages=(stage,)), name)
        best = judgement.fastest(_unquantized(run, name, graph, None))
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
    )
