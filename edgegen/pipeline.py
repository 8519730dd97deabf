"""The only orchestrator: load -> passes -> export -> build -> measure -> bundle."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from typing import Any

from edgegen import (
    applying,
    bundle,
    decide,
    delivery,
    files,
    finishing,
    judgement,
    planning,
    recipe,
    recovery,
    serial,
    summary,
    teacher,
    variants,
)
from edgegen.candidates import Candidate, fastest, within
from edgegen.errors import BundleError, RuntimeFailed, UsageError
from edgegen.request import Request
from edgegen.run import Run, open_run, quiet
from edgegen.run_graphs import export, feeds
from edgegen.run_jobs import unquantized
from edgegen.types import Bundle, Graph, Model


def compress(request: Request, progress: judgement.Progress = quiet) -> Bundle:
    """Take a trained network to a smaller, faster, verified bundle for a target.

    Raises:
        UsageError: bad input, found before anything is written. BudgetError: no candidate meets the budget.
        PassError, RuntimeFailed: a pass failed, or no build of the network runs at all.
    """
    run = open_run(request, progress)
    if (run.out / "manifest.json").is_file():
        return _finished(run)
    try:
        result = _compressed(run)
    except UsageError:  # the same request would end in the same way: there is nothing to resume
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    shutil.rmtree(run.folder, ignore_errors=True)
    return result


def _finished(run: Run) -> Bundle:
    """The bundle that is there, when it is this request's; another request's bundle is not passed off as its result."""
    file = run.out / "request.json"
    told = serial.from_json(Request, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    mine, theirs = run.request.identity(), told.identity() if told is not None else {}
    changed = [name for name in mine if name != "out" and files.key(mine[name]) != files.key(theirs.get(name))]
    changed += [name for name in _changed_behind_names(run) if name not in changed]
    if changed:
        raise BundleError(
            f"--out {run.out}: holds the finished bundle of a request with another {', '.join(changed)}; choose another"
            " folder, or remove it"
        )
    return bundle.read(run.out)


def _changed_behind_names(run: Run) -> list[str]:
    """What a finished bundle was made from and is another now: an edited recipe, other photos, retrained weights."""
    if missing := [name for name in ("report.json", "recipe.toml") if not (run.out / name).is_file()]:
        raise BundleError(f"--out {run.out}: the bundle there lacks {', '.join(missing)}; remove it and start again")
    report = bundle.read(run.out).report()
    same = {
        "recipe": (run.out / "recipe.toml").read_text(encoding="utf-8") == recipe.to_toml(run.recipe),
        "data": report["data"] == summary.data(run),
        "weights": report["provenance"]["weights sha256"] == run.model.provenance.weights_sha256,
    }
    return [name for name, kept in same.items() if not kept]


def _compressed(run: Run) -> Bundle:
    started = time.monotonic()
    predicted = planning.plan_of(run)
    original = export(run, run.model, "original")
    variants.planned(run, {"original": (run.model, original)})  # refuses wrong options before anything is trained
    run.bench.feeds = feeds(run, original)
    floats = unquantized(run, "original", original, None)
    baseline = fastest(floats)
    work = Work(networks={"original": (run.model, original)}, pool=floats)
    evaluations = teacher.evaluations(run, floats)
    for number, group in enumerate(recipe.groups(run.recipe), 1):
        _group(run, work, number, group, baseline, evaluations)
    work.records += variants.add_rewritten(run, work.networks, baseline, work.pool)
    graphs = {name: graph for name, (_, graph) in work.networks.items()}
    plans = variants.planned(run, work.networks)
    pool = variants.with_quantized(run, graphs, plans.get("quantize", {}), baseline, work.pool, evaluations)
    kept = {step.name: step.options for step in run.recipe.steps if step.keep and step.name in recipe.PRECISION_PASSES}
    precisions = ("int8" if name == "quantize" else options.get("precision", "fp16") for name, options in kept.items())
    demand = decide.Demand(frozenset(work.demanded), frozenset(precisions))
    final, pool = decide.settle(run, baseline, pool, floats, evaluations, demand)
    final = finishing.finished(run, final, evaluations, time.monotonic() - started)
    chosen = final.chosen
    records = summary.prepared(work.records, list(work.networks), chosen)
    records += summary.precision_records(run, chosen, pool, plans)
    content = summary.report(run, final, records, pool) | _cost(run, predicted, time.monotonic() - started)
    return delivery.deliver(run, work.networks[chosen.of][0], final, content)


def _cost(run: Run, predicted: planning.Plan, seconds: float) -> dict[str, Any]:
    """What the run took, beside what its plan had said."""
    told = {"seconds": predicted.seconds, "memory_bytes": predicted.memory_bytes, "disk_bytes": predicted.disk_bytes}
    cost = {"predicted": told, "used": planning.used(run, seconds), "resumed": run.log.resumed}
    return {"duration_s": round(seconds, 1), "cost": cost}


@dataclass
class Work:
    """What a run has so far. networks: name -> (model, graph), the original and every kept variant, in order.

    demanded: networks that hold what --keep asked for; empty: it asked for nothing.
    """

    networks: dict[str, tuple[Model, Graph]]
    pool: list[Candidate]
    records: list[dict[str, Any]] = field(default_factory=list)
    demanded: set[str] = field(default_factory=set)


def _group(
    run: Run,
    work: Work,
    number: int,
    group: tuple[recipe.Step, ...],
    baseline: Candidate,
    evaluations: teacher.Evaluations | None,
) -> None:
    """Run one group of structural passes and keep it only if it pays on the target and keeps the budget."""
    alive = [c for c in work.pool if not c.verdict]
    ahead, start = max(alive, key=lambda c: c.gain), list(work.networks.values())[-1][0]
    done, current = applying.applied(run, number, group, start, baseline, ahead)
    left = [one for one in done if not one.undone]
    results, group = [one.result for one in left], tuple(one.step for one in left)
    if not left:
        work.records += applying.records(done, "undone", "")
        return
    passes = " + ".join(step.name for step in group)
    name = passes if number == 1 else f"{passes} ({number})"  # a recipe may have the same passes twice
    try:
        graph = export(run, current, f"{number} {passes}")
        builds = unquantized(run, name, graph, baseline)
        best = fastest(builds)
    except RuntimeFailed as error:  # a network that no runtime takes is a result, not the end
        work.records += applying.records(done, "undone", str(error))
        return
    if evaluations is not None:
        best = run.bench.score(best, evaluations.select, run.gate, "select")
    quality_alone = dataclasses.replace(run.budget, max_latency_ms=None, max_size_bytes=None)
    broken = best.reason if best.verdict else within(best, quality_alone, run.gate)
    smaller = run.budget.max_size_bytes is not None and _least_size(builds) < 0.98 * _least_size(alive)
    forced = any(step.keep for step in group)
    if all(step.name in recipe.PREPARING_PASSES for step in group):
        status, reason = decide.preparing_verdict(broken, forced)
        builds = [c.judged("not chosen", "made for INT8: as a float build it has nothing to gain") for c in builds]
    else:
        status, reason = decide.group_verdict(best, ahead.gain, broken, forced, run.bench.measures, smaller)
        if status in ("undone", "forced") and not broken:
            reason += decide.cause(run, best, ahead)
        if unfinished := recovery.open_ends(group, results):
            advice = recovery.advice(unfinished, recovery.step_seconds(run, current))
            status, reason = decide.unrecovered(status, reason, advice, evaluations is not None and not broken)
    work.records += applying.records(done, status, reason, name)
    builds = [best if c.key == best.key else c for c in builds]
    work.pool += [c.judged("undone", reason) for c in builds] if status == "undone" else builds
    if status != "undone":
        work.networks[name] = (current, graph)
        if forced or work.demanded:
            work.demanded = {name} if forced else {*work.demanded, name}


def _least_size(builds: list[Candidate]) -> float:
    return min((c.artifact.size_bytes for c in builds if c.artifact is not None), default=math.inf)
