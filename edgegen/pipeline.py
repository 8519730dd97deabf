"""The only orchestrator: load -> passes -> export -> build -> measure -> bundle."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass, field
from typing import Any

from edgegen import bundle, decide, delivery, judgement, recipe, steps, summary, variants
from edgegen.judgement import Candidate
from edgegen.request import Request
from edgegen.run import Run, data_key, export, feeds, job_of, open_run, quiet, unquantized
from edgegen.types import Bundle, Graph, Model, PassResult


def compress(request: Request, progress: judgement.Progress = quiet) -> Bundle:
    """Take a trained network to a smaller, faster, verified bundle for a target.

    Raises:
        UsageError: bad input, found before anything is written. BudgetError: no candidate meets the budget.
        PassError, RuntimeFailed: a pass failed, or no build of the network runs at all.
    """
    run = open_run(request, progress)
    if (run.out / "manifest.json").is_file():
        return bundle.read(run.out)
    started = time.monotonic()
    original = export(run, run.model, "original")
    run.bench.feeds = feeds(run, original)
    floats = unquantized(run, "original", original, None)
    baseline = judgement.fastest(floats)
    work = Work(networks={"original": (run.model, original)}, pool=floats)
    evaluations = decide.evaluations(run, floats)
    for number, group in enumerate(recipe.groups(run.recipe), 1):
        _group(run, work, number, group, baseline, evaluations)
    work.records += variants.add_rewritten(run, work.networks, baseline, work.pool)
    graphs = {name: graph for name, (_, graph) in work.networks.items()}
    plans = variants.planned(run, work.networks)
    pool = variants.with_quantized(run, graphs, plans.get("quantize", {}), baseline, work.pool, evaluations)
    chosen, pool = decide.choose(run, baseline, pool, evaluations)
    final = decide.final_figures(run, baseline, chosen, floats, evaluations)
    records = work.records + summary.precision_records(run, chosen, pool, plans)
    result = delivery.deliver(run, work.networks[chosen.of][0], final, records, pool, time.monotonic() - started)
    shutil.rmtree(run.folder, ignore_errors=True)
    return result


@dataclass
class Work:
    """What a run has so far. networks: name -> (model, graph), the original and every kept variant, in order."""

    networks: dict[str, tuple[Model, Graph]]
    pool: list[Candidate]
    records: list[dict[str, Any]] = field(default_factory=list)


def _group(
    run: Run,
    work: Work,
    number: int,
    group: tuple[recipe.Step, ...],
    baseline: Candidate,
    evaluations: variants.Evaluations | None,
) -> None:
    """Run one group of structural passes and keep it only if it pays on the target and keeps the budget."""
    name = " + ".join(step.name for step in group)
    current = list(work.networks.values())[-1][0]
    results, current = _apply(run, number, group, current)
    graph = export(run, current, f"{number} {name}")
    builds = unquantized(run, name, graph, baseline)
    best = judgement.fastest(builds)
    if evaluations is not None:
        best = run.bench.score(best, evaluations.select, run.gate, "select")
    before = max(c.gain for c in work.pool if not c.verdict)
    quality_alone = dataclasses.replace(run.budget, max_latency_ms=None, max_size_bytes=None)
    broken = judgement.within(best, quality_alone, run.gate)
    forced = any(step.keep for step in group)
    status, reason = decide.group_verdict(best, before, broken, forced, run.bench.here)
    work.records += summary.step_records(group, results, status, reason, best)
    if status == "undone":
        work.pool += [c.judged("undone", reason) for c in builds]
        return
    work.networks[name] = (current, graph)
    work.pool += [best if c.label == best.label else c for c in builds]


def _apply(
    run: Run, number: int, group: tuple[recipe.Step, ...], current: Model
) -> tuple[list[PassResult], Model]:
    results = []
    for step in group:
        title = f"{number} {step.name}"
        job = job_of(run, lambda text, share, title=title: run.progress(title, text, share))
        run.progress(title, "starting", 0.0)
        result = steps.run_step(step, current, run.model, job, data_key(run))
        run.progress(title, "done", 1.0)
        current = result.model
        results.append(result)
    return results, current


