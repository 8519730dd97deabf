"""Remove the channels that buy the most milliseconds for the least importance, until a latency holds.

Li et al., 2022, EfficientFormer, arXiv:2206.01191, section 4.2: a table of measured latencies, and greedy slimming by
importance a millisecond. Here the table is of the operators that occur (`_clock`), the channels are the coupled groups
of `prune_channels`, and the latency of what comes out is measured: where it misses the limit, more goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.passes import _clock, _coupling, _importance, _lessons, _removal, _slim, prune_channels
from edgegen.passes._groups import Coupled
from edgegen.passes._importance import IMPORTANCE
from edgegen.types import Job, Measurement, Model, PassResult, Stage

ON_TARGET = True
"""What it removes depends on times of the target: kept results are of this target alone."""
BY_BUDGET = ("max_latency", "ratio")
"""Options without which the job's limit of latency decides."""
SHARE = 0.5  # of the latency, where nobody states a limit
NOT_PROBED = "it measures the target itself; its shapes are those of prune_channels"


def slim_to_latency(
    model: Model,
    job: Job,
    *,
    max_latency: float | None = None,
    ratio: float | None = None,
    most: float = 0.75,
    importance: str = "taylor",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    min_width: int = 8,
    round_to: int | None = None,
    widths: int = 3,
    corrections: int = 2,
    samples: int = 4,
    trace_seconds: float = 120.0,
) -> PassResult:
    """Remove channels until the best unquantized build takes at most `max_latency`.

    Without it and `ratio`, the limit is that of the job's budget (`--max-latency`), else half of the network's latency.

    Args:
        model: one stage with a module. Not modified.
        max_latency: ms; of a denoiser for one image, over all its steps. ratio: without it, the share of the network's
            own latency that may stay, in (0, 1).
        most: share of its channels that a group may lose, in (0, 1): no part of the network becomes a bottleneck.
        importance: as in `prune_channels`; "taylor" and "output_effect" compare groups in units of the output, the
            others relative to the mean of each group.
        layers, skip, min_width, round_to: as in `prune_channels`.
        widths: at how many widths each operator is measured, in and out, from the narrowest to its own.
        corrections: how often more is removed when the measured latency is over the limit.
    Returns:
        PassResult; `notes`: original_ms, limit_ms, predicted_ms, latency_ms and its status, table_error (predicted /
        measured - 1), reached, and where the table lies; of a denoiser in ms of one run, with `runs`: how many of them
        an image takes. Without measurements, times are shares of the MACs, and the status is "predicted".
    Raises:
        ValueError: an option out of range, a layer name that does not exist, a limit that the narrowest network does
            not reach either, or max_latency where there is no latency.
        PassError: the dependencies cannot be traced.
    """
    _check(model, max_latency, ratio, most, importance, min_width, round_to, widths, corrections, samples)
    prune_channels._check_names(model, (*layers, *skip))
    module = model.stage.module
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    groups = _coupling.find(module, inputs, seconds=trace_seconds)
    for group in groups:
        group.blocked = group.blocked or prune_channels._by_name(group, layers, skip) or _removal.misfit(module, group)
    open_groups = [group for group in groups if not group.blocked]
    if not open_groups:
        return PassResult(model, {}, _removal.unchanged(module, module, groups), {"reached": False})
    scores = _scores(model, job, open_groups, importance, samples)
    menus = _slim.menus(open_groups, scores, round_to or job.target.width_multiple("int8"), min_width, most)
    original = _latency(job, model.stage)
    runs = original.conditions.get("image_ms", original.value) / original.value
    if max_latency is not None and not math.isfinite(original.value):
        raise ValueError(f"max_latency needs a target with latencies, and there are none: {original.reason}; use ratio")
    measured = math.isfinite(original.value)
    if max_latency is None and ratio is None and measured:
        max_latency = job.budget.max_latency_ms
    limit = max_latency / runs if max_latency else (ratio or SHARE) * (original.value if measured else 1.0)
    if original.value <= limit:
        why = f"the network takes {original.value:.3g} ms a run, within {limit:.3g} ms"
        skipped = dict.fromkeys(graph.layers(module), why)
        notes = {"original_ms": original.value, "limit_ms": limit, "reached": True, "runs": runs}
        return PassResult(model, {}, skipped, notes)
    found = _clock.layers_of(module, inputs)
    job.progress("timing the operators", 0.1)
    clock = _clock.clock(found, _slim.widths(found, menus, widths), original.value, job)
    end = _until(model, job, inputs, menus, _slim.Slimming(found, clock, menus), limit, corrections)
    before, after = graph.cost(module, inputs), graph.cost(end.module, inputs)
    notes = {
        **end.notes, "original_ms": original.value if math.isfinite(original.value) else None, "limit_ms": limit,
        "runs": runs if math.isfinite(runs) else None,
        "macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
        "params_after": after.params, **clock.notes,
    }  # fmt: skip
    changed = _removal.changes(module, end.module)
    return PassResult(
        model.with_module(end.module), changed, _removal.unchanged(module, end.module, groups), notes, bool(changed)
    )


def _check(
    model: Model, max_latency: float | None, ratio: float | None, most: float, importance: str, min_width: int,
    round_to: int | None, widths: int, corrections: int, samples: int,
) -> None:  # fmt: skip
    if model.stage.module is None:
        raise ValueError(f"slim_to_latency needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if max_latency is not None and not (max_latency > 0 and math.isfinite(max_latency)):
        raise ValueError(f"max_latency must be above 0 ms, got {max_latency}")
    for name, share in (("ratio", ratio), ("most", most)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {share}")
    if importance not in IMPORTANCE:
        raise ValueError(f"importance must be one of {', '.join(IMPORTANCE)}, got {importance!r}")
    least = (("min_width", min_width, 1), ("round_to", round_to, 1), ("widths", widths, 2), ("samples", samples, 1),
             ("corrections", corrections, 0))  # fmt: skip
    for name, number, low in least:
        if number is not None and number < low:
            raise ValueError(f"{name} must be at least {low}, got {number}")


def _latency(job: Job, stage: Stage) -> Measurement:
    """What the target says about one run of a stage; "not measured" with the reason where it says nothing.

    Operators are timed by run, so a denoiser's latency is too; its image's is kept as condition "image_ms".
    """
    if job.latency is None:
        return Measurement("latency", "ms", math.nan, status="not measured", reason="this job measures nothing")
    found = job.latency(stage)
    if "ms_per_run" not in found.conditions:
        return found
    once = float(found.conditions["ms_per_run"])
    return dataclasses.replace(found, value=once, conditions={**found.conditions, "image_ms": found.value})


def _scores(
    model: Model, job: Job, groups: Sequence[Coupled], importance: str, samples: int
) -> list[torch.Tensor]:
    """One score a unit, comparable between groups.

    Raises:
        ValueError: a score that is no number.
    """
    seen = [] if importance in _importance.BY_WEIGHTS else _lessons.some_inputs(model, job, samples)[0]
    found = _importance.scores(model.stage.module, groups, importance, job.seed, seen, job.progress)
    for group, score in zip(groups, found, strict=True):
        if not torch.isfinite(score).all():
            raise ValueError(f"the {importance} importance of {group.root} is not finite; the weights hold NaN or inf")
    if importance in _importance.BY_OUTPUT:
        return found
    return [score / score.mean().clamp_min(1e-12) for score in found]


@dataclasses.dataclass
class _End:
    module: nn.Module
    notes: dict[str, Any]


def _until(
    model: Model, job: Job, inputs: Sequence[torch.Tensor], menus: list[_slim.Menu], state: _slim.Slimming,
    limit: float, corrections: int,
) -> _End:  # fmt: skip
    """Slim, measure, and slim to less where the measurement is over the limit.

    Raises:
        ValueError: the narrowest network is predicted to take more than the limit.
    """
    aim, end = limit, None
    for turn in range(corrections + 1):
        job.progress(f"slimming to {aim:.3g} ms", 0.4 + 0.6 * turn / (corrections + 1))
        module = _slimmed(model.stage.module, inputs, menus, state, aim)
        if module is None:
            break
        predicted = state.total
        stage = model.with_module(module).stage
        got = _latency(job, stage)
        known = math.isfinite(got.value)
        end = _End(module, {
            "predicted_ms": predicted, "latency_ms": got.value if known else None, "corrections": turn,
            "status": got.status if known else "predicted", "reached": not known or got.value <= limit,
            "table_error": predicted / got.value - 1 if known else None,
        })  # fmt: skip
        if end.notes["reached"]:
            return end
        aim *= 0.98 * limit / got.value
    if end is None:
        unit = "of the MACs" if state.clock.relative else "ms"
        raise ValueError(
            f"the limit of {limit:.3g} {unit} is out of reach: the narrowest network is predicted to take"
            f" {state.total:.3g} {unit}; allow more, a larger `most`, a smaller min_width"
            f" (or round_to), or remove blocks first (prune_blocks); where INT8 is to bring the rest, state a ratio"
        )
    return end


def _slimmed(
    module: nn.Module, inputs: Sequence[torch.Tensor], menus: list[_slim.Menu], state: _slim.Slimming, aim: float
) -> nn.Module | None:
    """The network at `aim` ms, equal to its masked twin; groups that cannot go safely stay. None: out of reach."""
    while True:
        state.restart()
        if not state.slim(aim):
            return None
        plans = [
            prune_channels._Plan(menu.group, sorted(menu.order[: menu.units - kept]))
            for menu, kept in zip(menus, state.kept, strict=True) if kept < menu.units
        ]  # fmt: skip
        pruned = prune_channels._verified(module, inputs, plans)
        if len(pruned.plans) == len(plans):
            return pruned.module.eval()
        for menu in menus:
            menu.levels = [] if menu.group.blocked else menu.levels
