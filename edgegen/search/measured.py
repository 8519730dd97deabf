"""What a candidate comes to, measured: its recipe is applied, built, timed beside the baseline, trained and scored.

Cheap things first: latency and size need no training, so a candidate over a limit, or slower than one that is better
already, is stopped before the time is spent (successive halving: no training, a quarter of it, all of it).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegen import faults, graph, judgement, recipe, run, run_graphs, run_jobs, steps, teacher, variants
from edgegen.candidates import LEAST_GAIN, Candidate, fastest
from edgegen.errors import EdgegenError, NothingChanged, PassError, UsageError
from edgegen.request import Request
from edgegen.run import Run
from edgegen.search.spaces import Layers, Space, candidate_key, to_recipe
from edgegen.search.store import Figures
from edgegen.types import Budget

SHARES = (0.25, 1.0)  # of the training steps; latency and size are known before the first
FEWEST = 80  # steps of training below which a first, shorter training says nothing that the whole does not
# Curves of training cross: of 25 candidates of edsr that were behind after a quarter, 6 were ahead in the end; of those
# behind by half and more none (search-live.json of commit c2e6b43, 53 trained to the end).
BEHIND = 1.5


@dataclass
class Bench:
    """A run opened once in a worker, in which candidates are measured one after the other.

    reached: key of a recipe without its training -> what it comes to; candidates that differ in training share it.
    """

    run: Run
    baseline: Candidate
    floats: list[Candidate]
    evaluations: teacher.Evaluations | None
    layers: Layers
    kept: frozenset[Path] = frozenset()
    reached: dict[str, Figures] = field(default_factory=dict)


def open_bench(request: Request, progress: judgement.Progress = run.quiet) -> Bench:
    """Load the network and its data, build and time the original, and collect the teacher's outputs.

    Raises:
        UsageError: bad input, or a network that passes cannot change.
    """
    opened = run.open_run(request, progress)
    if opened.model.stage.module is None:
        raise UsageError(f"{request.model} is an ONNX file, which passes cannot reshape; give the torch network")
    original = run_graphs.export(opened, opened.model, "original")
    opened.bench.feeds = run_graphs.feeds(opened, original)
    floats = run_jobs.unquantized(opened, "original", original, None)
    baseline = fastest(floats)
    evaluations = teacher.evaluations(opened, floats)
    kept = frozenset(path for part in ("builds", "graphs") for path in (opened.folder / part).glob("*"))
    return Bench(opened, baseline, floats, evaluations, layers_of(opened.model.stage.module), kept)


def layers_of(module: Any) -> dict[str, str]:
    """Name -> class of each convolution and linear layer, in order."""
    return {name: type(part).__name__ for name, part in module.named_modules() if isinstance(part, graph.WEIGHTED)}


def objective(
    bench: Bench, space: Space, budget: Budget, done: Callable[[], Sequence[Figures]]
) -> Callable[[Mapping[str, int]], Figures]:
    """choices -> Figures, in the bench. done: the figures of all candidates that are finished, for early stopping."""

    def measured(choices: Mapping[str, int]) -> Figures:
        made = to_recipe(space, choices, bench.layers)
        return _answered(bench, lambda: _measured(bench, made, budget, done))

    return measured


def reach(bench: Bench, made: recipe.Recipe) -> Figures:
    """Latency and size of a candidate without any training, for the ends of a space; quality is not looked at."""
    return _answered(bench, lambda: _untrained(bench, made))


def _answered(bench: Bench, work: Callable[[], Figures]) -> Figures:
    """What `work` finds; that a candidate cannot be made or run is a result, and so is a fault of ours in one."""
    try:
        return work()
    except EdgegenError as error:
        return Figures(failure=" ".join(str(error).split())[:500])
    except Exception as error:  # noqa: BLE001 - hours of search must not be lost to a fault in one candidate
        return Figures(failure=faults.told(error))
    finally:
        _tidy(bench)


def _untrained(bench: Bench, made: recipe.Recipe) -> Figures:
    """Latency and size before any training; built and timed once."""
    key = candidate_key(shortened(made, 0.0))
    if key not in bench.reached:
        bench.reached[key] = _figures(_best(bench, made, 0.0))
    return bench.reached[key]


def _measured(
    bench: Bench, made: recipe.Recipe, budget: Budget, done: Callable[[], Sequence[Figures]]
) -> Figures:
    """As far as it is worth it: untrained for latency and size, then trained a quarter, then wholly."""
    trained = [step for step in made.steps if step.name in recipe.ROUNDS]
    best = None if trained else _best(bench, made, 1.0)
    found = _untrained(bench, made) if best is None else _figures(best)
    if over := _over(found, budget):
        return dataclasses.replace(found, stopped=over)
    length = sum(int(_steps(step)) for step in trained)
    for share in SHARES if length >= FEWEST else SHARES[-1:]:
        best = _scored(bench, _best(bench, made, share, found.runtime) if trained or best is None else best)
        drop = best.drop if best.drop is not None and math.isfinite(best.drop) else None
        if best.verdict:
            return dataclasses.replace(found, failure=best.reason)
        rungs = (*found.rungs, (share, drop if drop is not None else math.inf))
        found = dataclasses.replace(_figures(best), drop=drop, rungs=rungs)
        if share < 1.0 and (why := beaten(found, share, done())):
            return dataclasses.replace(found, stopped=why)
    return found


def _over(figures: Figures, budget: Budget) -> str:
    """Which limit of latency or size is broken, in words; "" when none."""
    if budget.max_latency_ms is not None and figures.latency_ms > budget.max_latency_ms:
        return f"latency {figures.latency_ms:.3g} ms is over --max-latency {budget.max_latency_ms:g} ms"
    if budget.max_size_bytes is not None and figures.size_bytes > budget.max_size_bytes:
        return f"size {figures.size_bytes / 1e6:.3g} MB is over --max-size {budget.max_size_bytes / 1e6:g} MB"
    return ""


def beaten(mine: Figures, share: float, others: Sequence[Figures]) -> str:
    """Why no more training is spent: a finished one is faster, and was clearly better after as much of it; else ""."""
    drop = dict(mine.rungs)[share]
    for other in others:
        theirs = dict(other.rungs).get(share)
        if theirs is None or other.failure or other.stopped:
            continue
        clearly = theirs < drop and BEHIND * theirs <= drop
        if other.ratio < mine.ratio / LEAST_GAIN and clearly and other.size_bytes <= mine.size_bytes:
            told = f"its {drop:.3g} after {share:.0%} of the training"
            return f"slower and larger than one that had a drop of {theirs:.3g} to {told}"
    return ""


def _steps(step: recipe.Step) -> float:
    return float(step.options.get("steps", recipe.options_of(step.name)["steps"]))


def train_shared(bench: Bench, made: recipe.Recipe) -> None:
    """Train the supernet of a recipe, whose result all candidates take from the cache; nothing where it has none."""
    opened = dataclasses.replace(bench.run, recipe=made)
    told = functools.partial(opened.progress, "supernet")
    for step in made.steps[:1]:
        if step.name == "train_supernet":
            steps.run_step(step, opened.model, opened.model, run_jobs.job_of(opened, told), run.data_key(opened))


def shortened(made: recipe.Recipe, share: float) -> recipe.Recipe:
    """The recipe with that share of its training steps; without them for 0, and then without a supernet's too."""
    kept = []
    for step in made.steps:
        if step.name == "train_supernet" and share <= 0:
            step = step.model_copy(update={"options": {**step.options, "steps": 0}})
        if step.name in recipe.ROUNDS and share < 1.0:
            if share <= 0:
                continue
            step = step.model_copy(update={"options": {**step.options, "steps": max(1, int(share * _steps(step)))}})
        kept.append(step)
    return made.model_copy(update={"steps": tuple(kept)})


def _best(bench: Bench, made: recipe.Recipe, share: float, only: str = "") -> Candidate:
    """The fastest build that the recipe asks for: of its float builds, or of its INT8 builds where it quantizes.

    only: a runtime, for builds in that one alone: training changes the weights and not which runtime is fastest.
    """
    short = shortened(made, share)
    opened = dataclasses.replace(bench.run, recipe=short)
    current = opened.model
    for step in (one for one in short.steps if one.name not in recipe.PRECISION_PASSES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingChanged)  # then it comes to the same as one without the pass
            job = run_jobs.job_of(opened, functools.partial(opened.progress, step.name))
            current = steps.run_step(step, current, opened.model, job, run.data_key(opened)).model
    title = "original" if current is opened.model else f"candidate {run.model_key(current)[:12]}"
    exported = run_graphs.export(opened, current, title)
    if not any(step.name == "quantize" for step in short.steps):
        whole = title == "original"
        return fastest(bench.floats if whole else run_jobs.unquantized(opened, title, exported, bench.baseline, only))
    planned = variants.planned(opened, {title: (current, exported)})["quantize"]
    judged = bench.evaluations if share else None
    pool = variants.with_quantized(opened, {title: exported}, planned, bench.baseline, [], judged, only)
    alive = [c for c in pool if c.quantized and c.latency is not None and not c.verdict]
    if not alive:
        raise PassError(f"no INT8 build runs: {'; '.join(c.reason for c in pool if c.verdict) or 'none is offered'}")
    return min(alive, key=lambda c: c.latency.value if c.latency else math.inf)


def _scored(bench: Bench, best: Candidate) -> Candidate:
    if bench.evaluations is None:
        return best
    return bench.run.bench.score(best, bench.evaluations.select, bench.run.gate, "select")


def _tidy(bench: Bench) -> None:
    """Remove the builds and graphs of candidates; those of the original stay."""
    for part in ("builds", "graphs"):
        folder = bench.run.folder / part
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path not in bench.kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _figures(best: Candidate) -> Figures:
    latency, ratio, artifact = best.latency, best.ratio, best.artifact
    if latency is None or ratio is None or artifact is None or not math.isfinite(latency.value):
        raise UsageError(f"{best.label} has no latency: {best.reason or best.unknown}")
    return Figures(
        latency.value, ratio.value, None, artifact.size_bytes, latency.status, f"{best.runtime} {best.graph.plan.label}"
    )


def unreachable(budget: Budget, ends: Sequence[tuple[str, Figures]]) -> str:
    """Why no candidate can meet a limit, with the nearest one; "" when some end of the space meets it.

    ends: (what it is told as, figures) of the extreme candidates. Quality is not judged here.
    """
    alive = [(name, found) for name, found in ends if not found.failure]
    for limit, unit, value in (
        (budget.max_latency_ms, "ms", lambda f: f.latency_ms),
        (budget.max_size_bytes and budget.max_size_bytes / 1e6, "MB", lambda f: f.size_bytes / 1e6),
    ):
        if limit is None or not alive:
            continue
        values = [value(found) for _, found in alive]
        if min(values) > limit:
            name, found = min(alive, key=lambda end: value(end[1]))
            return (
                f"no candidate of this space comes under {limit:g} {unit}: it reaches {min(values):.3g} to"
                f" {max(values):.3g} {unit}; nearest: {name or 'no change'} with {found.latency_ms:.3g} ms,"
                f" {found.size_bytes / 1e6:.3g} MB ({found.status}, untrained)"
            )
    return ""
