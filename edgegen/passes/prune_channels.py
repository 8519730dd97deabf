"""Remove whole channels that matter least, everywhere they are coupled.

Fang et al., 2023, DepGraph, arXiv:2301.12900; the scores and their papers are in `_importance`. Removing a ratio r of
all channels leaves about (1 - r)^2 of the parameters, as most layers lose inputs and outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgegen import graph, registry
from edgegen.errors import PassError
from edgegen.passes import _coupling, _importance, _lessons, _removal, distill
from edgegen.passes._groups import Coupled, Key
from edgegen.passes._importance import IMPORTANCE
from edgegen.types import Job, Model, PassResult

SCOPES = ("local", "global")
# pruned against masked, relative to the largest output: sums in another order
TOLERANCE, TOLERANCE_FP32 = 1e-6, 1e-2

# Option sets that `edgegen probe` times before any training.
PROBES = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


def prune_channels(
    model: Model,
    job: Job,
    *,
    ratio: float = 0.3,
    importance: str = "l2",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    min_width: int = 8,
    round_to: int | None = None,
    scope: str = "local",
    heads: bool = False,
    iterations: int = 1,
    recover_steps: int = 0,
    samples: int = 4,
    trace_seconds: float = 120.0,
) -> PassResult:
    """Physically remove a `ratio` of the channels of every coupled group that allows it.

    Args:
        model: one stage with a module. Not modified.
        ratio: fraction of channels to remove, in [0, 1). ratios: layer -> ratio of the group that it writes, instead.
        importance: by weights "l2", "l1" (norm of the filters that write a channel), "group" (l2 over all that write,
            normalise and read it), "fpgm" (distance to the other filters), "random" (a baseline; from job.seed); on
            `samples` inputs (job.data, or made up) "activation" (mean absolute value), "taylor" (change of the output
            to first order) and "output_effect" (measured: one run a channel; for generators).
        layers: only groups in which one of these layers loses outputs; skip: these layers keep their outputs.
        min_width: no layer gets narrower than this many channels.
        round_to: kept widths are rounded to the nearest multiple of it, never below one; None: the target's int8
            width. Layers narrower than it go in steps of `min_width`.
        scope: "local" (the ratio in each group) or "global" (over all groups, by score relative to the group's mean;
            by the score itself for "taylor" and "output_effect").
        heads: whole heads of attention leave, instead of channels inside each head.
        iterations: remove in so many equal parts, scored anew each time; recover_steps: steps of distillation from
            the teacher between them.
    Returns:
        PassResult; `changed` has every layer with another width, `skipped` why the others kept their outputs,
        `notes` the MACs and parameters before and after. Layers that make the model's outputs never lose any.
    Raises:
        ValueError: an option out of range, or a layer name that does not exist.
        PassError: the dependencies cannot be traced.
    """
    wanted = dict(ratios or {})
    _check(model, ratio, wanted, importance, min_width, round_to, scope, iterations, recover_steps, samples)
    _check_names(model, (*layers, *skip, *wanted))
    module = model.stage.module
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    seen = [] if importance in _importance.BY_WEIGHTS else _lessons.some_inputs(model, job, samples)[0]
    multiple = round_to or job.target.width_multiple("int8")
    result = graph.clone(module)
    full: dict[Any, Any] = {}
    pruned_groups: set[Any] = set()
    for turn in range(iterations):
        groups = _coupling.find(result, inputs, seconds=trace_seconds, heads=heads)
        for group in groups:
            group.blocked = group.blocked or _by_name(group, layers, skip) or _removal.misfit(result, group)
            full.setdefault(group.producers, len(group.units))
        open_groups = [group for group in groups if not group.blocked]
        scores = _importance.scores(result, open_groups, importance, job.seed, seen, job.progress)
        left = [1 - _ratio(group, ratio, wanted) * (turn + 1) / iterations for group in open_groups]
        counts = _quota(open_groups, scores, left, [full[group.producers] for group in open_groups],
                        scope, wanted, importance)  # fmt: skip
        plans = [
            _plan(group, score, count, multiple, min_width)
            for group, score, count in zip(open_groups, scores, counts, strict=True)
        ]
        pruned = _verified(result, inputs, [plan for plan in plans if plan.units])
        result = pruned.module.eval() if pruned.plans else result
        pruned_groups |= {plan.group.producers for plan in pruned.plans}
        if recover_steps and pruned.plans and turn < iterations - 1:
            result = _recovered(model.with_module(result), model, job, recover_steps, turn)
    changed = _removal.changes(module, result)
    before, after = graph.cost(module, inputs), graph.cost(result, inputs)
    notes = {
        "macs_before": before.macs, "macs_after": after.macs,
        "params_before": before.params, "params_after": after.params,
        "width_multiple": multiple, "groups": len(groups), "groups_pruned": len(pruned_groups),
    }  # fmt: skip
    skipped = _removal.unchanged(module, result, groups)
    return PassResult(model.with_module(result), changed, skipped, notes, bool(changed))


def _recovered(now: Model, model: Model, job: Job, steps: int, turn: int) -> nn.Module:
    """A short distillation between two iterations."""
    folder = job.checkpoints / f"iteration-{turn + 1}" if job.checkpoints else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    job = dataclasses.replace(job, checkpoints=folder, teacher=job.teacher or model)
    module: nn.Module = distill.distill(now, job, steps=steps).model.stage.module
    return module


@dataclass
class _Plan:
    """The units that one group is to lose."""

    group: Coupled
    units: list[int]


@dataclass
class _Pruned:
    module: nn.Module
    plans: list[_Plan]


def _check(
    model: Model, ratio: float, ratios: Mapping[str, float], importance: str, min_width: int, round_to: int | None,
    scope: str, iterations: int, recover_steps: int, samples: int,
) -> None:  # fmt: skip
    if model.stage.module is None:
        raise ValueError(f"prune_channels needs a network, and {model.name} is an ONNX file; use quantize or cast")
    for name, value in (("ratio", ratio), *((f"ratios of {name}", value) for name, value in ratios.items())):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if importance not in IMPORTANCE:
        raise ValueError(f"importance must be one of {', '.join(IMPORTANCE)}, got {importance!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    for name, number in (("min_width", min_width), ("round_to", round_to), ("iterations", iterations),
                         ("samples", samples)):  # fmt: skip
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if recover_steps < 0 or (recover_steps and iterations < 2):
        raise ValueError("recover_steps trains between iterations, of which there must be at least 2, got "
                         f"{recover_steps} with iterations {iterations}; after the last, use distill")  # fmt: skip


def _check_names(model: Model, names: Sequence[str]) -> None:
    known = list(graph.layers(model.stage.module))
    for name in names:
        if name not in known:
            raise ValueError(f"no layer {name!r} in {model.name}{registry.near(name, known)}; there are: {_few(known)}")


def _ratio(group: Coupled, ratio: float, ratios: Mapping[str, float]) -> float:
    """The ratio of a group: the largest of those given for its layers."""
    return max((ratios[path] for path in group.producers if path in ratios), default=ratio)


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _by_name(group: Coupled, layers: Sequence[str], skip: Sequence[str]) -> str:
    """Why the user's choice of names leaves this group alone, or an empty string."""
    if named := [path for path in group.producers if path in skip]:
        return f"{named[0]} is named in skip" + (", and they are coupled" if len(group.producers) > 1 else "")
    return "" if not layers or set(group.producers) & set(layers) else "not named in layers"


def _quota(
    groups: list[Coupled], scores: list[torch.Tensor], left: Sequence[float], full: Sequence[int], scope: str,
    ratios: Mapping[str, float], importance: str,
) -> list[float]:  # fmt: skip
    """How many units each group should lose before rounding: a share `left` of its `full` number stays.

    In one sum over all groups, what an earlier iteration took too much from one of them counts for the others.
    """
    counts = [len(g.units) - n * share for g, n, share in zip(groups, full, left, strict=True)]
    free = [i for i, group in enumerate(groups) if not set(group.producers) & set(ratios)]
    if scope == "local" or not free:
        return [max(0.0, count) for count in counts]
    by_output = importance in _importance.BY_OUTPUT
    relative = {i: scores[i] if by_output else scores[i] / scores[i].mean().clamp_min(1e-12) for i in free}
    count = round(sum(counts[i] for i in free))
    limit = torch.cat(list(relative.values())).sort().values[count - 1] if count > 0 else -math.inf
    return [float((relative[i] <= limit).sum()) if i in relative else max(0.0, counts[i]) for i in range(len(groups))]


def keep(units: int, remove: float, multiple: int, min_width: int, blocks: int = 1) -> int:
    """How many of `units` stay: the nearest step to units - remove, never below one step or `min_width` channels.

    A unit is `blocks` channels wide. The step makes the width a multiple of `multiple`; where the whole width is below
    that, of `min_width`.
    """
    channels = units * blocks
    step = multiple if channels >= multiple else min_width
    step //= math.gcd(step, blocks)
    kept = max(step, math.floor((units - remove) / step + 0.5) * step, math.ceil(min_width / blocks))
    return min(units, kept)


def _plan(group: Coupled, score: torch.Tensor, count: float, multiple: int, min_width: int) -> _Plan:
    """Pick the units with the smallest scores; equal scores go by position. Sets the group's reason if none goes."""
    units = len(group.units)
    free = [i for i in torch.argsort(score, stable=True).tolist() if i not in group.fixed]
    removed = min(units - keep(units, count, multiple, min_width, group.blocks), len(free))
    if group.fixed:  # fewer could go than asked for: round again, downwards
        removed = units - keep(units, removed, multiple, min_width, group.blocks)
        removed = removed if removed <= len(free) else max(0, removed - multiple)
    if removed == 0:
        width = units * group.blocks
        group.blocked = f"{width} channels stay {width}: ratio, rounding to {multiple} and min_width {min_width}" if (
            count
        ) else "ratio is 0"
    return _Plan(group, sorted(free[:removed]))


def _verified(module: nn.Module, inputs: Sequence[torch.Tensor], plans: list[_Plan]) -> _Pruned:
    """Carry out all plans if the result computes what it should; else only those that do so one by one."""
    probe = _Probe(module, inputs)
    exact = [plan for plan in plans if not plan.group.inexact]
    if exact and probe.wrong(exact):
        exact = [plan for plan in exact if _safe(probe, plan)]
    good = exact + [plan for plan in plans if plan.group.inexact and _safe(probe, plan)]
    if not good:
        return _Pruned(module, [])
    if reason := probe.wrong(good):
        raise PassError(f"prune_channels: every group can be pruned alone, but not all together: {reason}")
    return _Pruned(_removal.remove(module, *_removals(good)), good)


def _safe(probe: _Probe, plan: _Plan) -> bool:
    """Whether a plan works alone; if not, its group gets the reason."""
    why = probe.wrong([plan])
    plan.group.blocked = f"cannot be removed safely: {why}" if why else ""
    return not why


class _Probe:
    """Compares pruned and masked networks, in float64: without norms, float32 errors grow to the size of the output."""

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        double = [x.double() if x.is_floating_point() else x for x in inputs]
        self.module, self.inputs, self.tolerance = graph.clone(module).double(), double, TOLERANCE
        try:
            graph.outputs(self.module, double)
        except RuntimeError:  # a network that makes float32 tensors of its own
            self.module, self.inputs, self.tolerance = module, list(inputs), TOLERANCE_FP32

    def wrong(self, plans: list[_Plan]) -> str:
        """What is wrong with the pruned network; an empty string when it equals the masked one."""
        removals, heads = _removals(plans)
        try:
            got = graph.outputs(_removal.remove(self.module, removals, heads), self.inputs)
            expected = graph.outputs(_removal.mask(self.module, removals), self.inputs)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        exact = not any(plan.group.inexact for plan in plans)
        return _difference(got, expected, self.tolerance if exact else math.inf)


def _removals(plans: list[_Plan]) -> tuple[_removal.Removals, dict[str, tuple[int, int]]]:
    """All indices that the plans take, and the new number and size of the heads."""
    taken: dict[Key, set[int]] = {}
    for plan in plans:
        for unit in plan.units:
            for key, indices in plan.group.units[unit].items():
                taken.setdefault(key, set()).update(indices)
    left = {p.group.heads: (p.group, len(p.group.units) - len(p.units)) for p in plans if p.group.heads}
    heads = {path: (n, group.blocks) if group.whole else (group.blocks, n) for path, (group, n) in left.items()}
    return {key: frozenset(indices) for key, indices in taken.items()}, heads


def _difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> str:
    """What differs between the outputs of the pruned and of the masked network, or an empty string."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return f"outputs became {[tuple(x.shape) for x in got]}, were {[tuple(x.shape) for x in expected]}"
    if not all(torch.isfinite(x).all() for x in got):
        return "outputs are not finite"
    for a, b in zip(got, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        if not error <= tolerance:
            return f"differs from the masked network by {error:.2g} of the largest output"
    return ""
