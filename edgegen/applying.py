"""The passes of a group in turn; one that changes the structure is timed, and undone where it does not pay.

That is seen before anything is trained: training changes weights, not how long they take.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgegen import architecture, decide, recipe, steps, summary
from edgegen.candidates import Candidate, fastest
from edgegen.errors import RuntimeFailed
from edgegen.run import Run, data_key
from edgegen.run_graphs import export
from edgegen.run_jobs import job_of, unquantized
from edgegen.types import Model, PassResult


@dataclass(frozen=True)
class Applied:
    """One pass and its result; undone: why it was put back, or empty."""

    step: recipe.Step
    result: PassResult
    undone: str = ""


def applied(
    run: Run, number: int, group: Sequence[recipe.Step], start: Model, baseline: Candidate, best: Candidate
) -> tuple[list[Applied], Model]:
    """Every pass of a group with what became of it, and the model that they make: `start` where none is left.

    number: of the group. best: the fastest build so far. The last pass is judged with its group, and nothing is put
    back where the recipe keeps a pass of the group, or the size is limited too.
    """
    done: list[Applied] = []
    current = start
    asked = any(step.keep for step in group) or run.budget.max_size_bytes is not None
    for place, step in enumerate(group):
        if current is start and any(one.undone for one in done) and step.name in recipe.RECOVERS:
            why = "the passes before it are undone: there is nothing to recover"
            done.append(Applied(step, PassResult(current, {}, {"network": why}), why))
            continue
        title = f"{number} {step.name}"
        run.progress(title, "starting", 0.0)
        job = job_of(run, functools.partial(run.progress, title))
        result = steps.run_step(step, current, run.model, job, data_key(run))
        run.progress(title, "done", 1.0)
        undone = ""
        if place + 1 < len(group) and _other_structure(run, current, result.model):
            result, best, undone = _timed(run, f"{number}.{place + 1} {step.name} not trained", result, baseline, best)
        if undone and not asked:
            done.append(Applied(step, result, undone))
            continue
        current = result.model
        done.append(Applied(step, result))
    return done, current


def records(done: Sequence[Applied], status: str, reason: str, network: str = "") -> list[dict[str, Any]]:
    """One record a pass, in order: those that are left share status and reason."""
    left = [one for one in done if not one.undone]
    shared = summary.step_records([one.step for one in left], [one.result for one in left], status, reason, network)
    rest = iter(shared)
    return [record for one in done for record in (
        summary.step_records([one.step], [one.result], "undone", one.undone) if one.undone else [next(rest)]
    )]  # fmt: skip


def _other_structure(run: Run, before: Model, after: Model) -> bool:
    old, new = (architecture.describe(model.stage.module, run.model.stage.module) for model in (before, after))
    return old != new


def _timed(
    run: Run, name: str, result: PassResult, baseline: Candidate, best: Candidate
) -> tuple[PassResult, Candidate, str]:
    """(result with its gain among the notes, the fastest build now, why the pass does not pay or empty).

    name: of this network alone: graphs are files of that name.
    Timed in the runtime of the fastest build; in all of them before it is said that none gains, or none takes it.
    """
    try:
        graph = export(run, result.model, name)
    except RuntimeFailed as error:
        return result, best, str(error)
    failure, found, status, reason = "", None, "undone", ""
    for only in (best.runtime, ""):
        try:
            found = fastest(unquantized(run, name, graph, baseline, only))
        except RuntimeFailed as error:
            failure = str(error)
            continue
        status, reason = decide.group_verdict(found, best.gain, "", False, run.bench.measures)
        if status != "undone":
            break
    if found is None:
        return result, best, failure
    result = replace(result, notes={**result.notes, "gain": found.gain, "gain_before": best.gain})
    if status == "undone":
        return result, best, reason + decide.cause(run, found, best)
    return result, found, ""
