"""Remove whole channels with the smallest weights, everywhere they are coupled.

Fang et al., 2023, DepGraph, arXiv:2301.12900; scores as in Li et al., 2017, Pruning Filters, arXiv:1608.08710. Removing
a ratio r of all channels leaves about (1 - r)^2 of the parameters, as most layers lose inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgegen import graph, registry
from edgegen.errors import PassError
from edgegen.passes import _coupling, _removal
from edgegen.passes._coupling import Coupled
from edgegen.types import Job, Model, PassResult

IMPORTANCE = ("l2", "l1", "group", "random")
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
    min_width: int = 8,
    round_to: int | None = None,
    scope: str = "local",
    trace_seconds: float = 120.0,
) -> PassResult:
    """Physically remove a `ratio` of the channels of every coupled group that allows it.

    Args:
        model: one stage with a module. Not modified.
        ratio: fraction of channels to remove, in [0, 1).
        importance: "l2" or "l1" norm of the filters that write a channel, "group" (l2 over all that write, normalise
            and read it) or "random" (a baseline; from job.seed).
        layers: only groups in which one of these layers loses outputs; skip: these layers keep their outputs.
        min_width: no layer gets narrower than this many channels.
        round_to: kept widths are rounded to the nearest multiple of it, never below one; None: the target's int8
            width. Layers narrower than it go in steps of `min_width`.
        scope: "local" (the ratio in each group) or "global" (over all groups, by score relative to the group's mean).
    Returns:
        PassResult; `changed` has every layer with another width, `skipped` why the others kept their outputs,
        `notes` the MACs and parameters before and after. Layers that make the model's outputs never lose any.
    Raises:
        ValueError: an option out of range, or a layer name that does not exist.
        PassError: the dependencies cannot be traced.
    """
    _check(model, ratio, importance, (*layers, *skip), min_width, round_to, scope)
    module = model.stage.module
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    groups = _coupling.find(module, inputs, seconds=trace_seconds)
    multiple = round_to or job.target.width_multiple("int8")
    for group in groups:
        group.blocked = group.blocked or _by_name(group, layers, skip)
    open_groups = [group for group in groups if not group.blocked]
    scores = _scores(module, open_groups, importance, job.seed)
    plans = [
        _plan(group, score, count, multiple, min_width)
        for group, score, count in zip(open_groups, scores, _quota(open_groups, scores, ratio, scope), strict=True)
    ]
    pruned = _verified(module, inputs, [plan for plan in plans if plan.units])
    result = pruned.module.eval() if pruned.plans else graph.clone(module)
    changed = _changes(module, result)
    before, after = graph.cost(module, inputs), graph.cost(result, inputs)
    notes = {
        "macs_before": before.macs, "macs_after": after.macs,
        "params_before": before.params, "params_after": after.params,
        "width_multiple": multiple, "groups": len(groups), "groups_pruned": len(pruned.plans),
    }  # fmt: skip
    return PassResult(model.with_module(result), changed, _skipped(module, result, groups), notes, bool(changed))


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
    model: Model, ratio: float, importance: str, names: Sequence[str], min_width: int, round_to: int | None, scope: str
) -> None:
    if model.stage.module is None:
        raise ValueError(f"prune_channels needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
    if importance not in IMPORTANCE:
        raise ValueError(f"importance must be one of {', '.join(IMPORTANCE)}, got {importance!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    for name, value in (("min_width", min_width), ("round_to", round_to)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    known = list(graph.layers(model.stage.module))
    for name in names:
        if name not in known:
            raise ValueError(f"no layer {name!r} in {model.name}{registry.near(name, known)}; there are: {_few(known)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _by_name(group: Coupled, layers: Sequence[str], skip: Sequence[str]) -> str:
    """Why the user's choice of names leaves this group alone, or an empty string."""
    if named := [path for path in group.producers if path in skip]:
        return f"{named[0]} is named in skip" + (", and they are coupled" if len(group.producers) > 1 else "")
    return "" if not layers or set(group.producers) & set(layers) else "not named in layers"


def _scores(module: nn.Module, groups: list[Coupled], importance: str, seed: int) -> list[torch.Tensor]:
    """One score a unit for every group: the norm of the weights that belong to it."""
    generator = torch.Generator().manual_seed(seed)
    if importance == "random":
        return [torch.rand(len(group.units), generator=generator) for group in groups]
    power = 1 if importance == "l1" else 2
    return [_norms(module, group, power, importance == "group") for group in groups]


def _norms(module: nn.Module, group: Coupled, power: int, everything: bool) -> torch.Tensor:
    """(sum |w|^p)^(1/p) over the filters that write a unit; with `everything` also over norms and readers."""
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for key in group.keys:
        part = _removal.part_at(module, key[0])
        slices = _removal.weight_slices(part, key[1])
        if slices is None or not (everything or (key[1] == "out" and isinstance(part, graph.WEIGHTED))):
            continue
        channel = slices.double().pow(power).sum(1)
        total += torch.stack([channel[list(unit.get(key, ()))].sum() for unit in group.units])
    return total.pow(1 / power)


def _quota(groups: list[Coupled], scores: list[torch.Tensor], ratio: float, scope: str) -> list[float]:
    """How many units each group should lose before rounding."""
    if scope == "local" or not groups:
        return [len(group.units) * ratio for group in groups]
    relative = [score / score.mean().clamp_min(1e-12) for score in scores]
    count = round(sum(map(len, relative)) * ratio)
    limit = torch.cat(relative).sort().values[count - 1] if count else -math.inf
    return [float((score <= limit).sum()) for score in relative]


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
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = graph.outputs(_removal.mask(self.module, removals), self.inputs)
        exact = not any(plan.group.inexact for plan in plans)
        return _difference(got, expected, self.tolerance if exact else math.inf)


def _removals(plans: list[_Plan]) -> tuple[_removal.Removals, dict[str, int]]:
    """All indices that the plans take, and the new head sizes."""
    taken: dict[_coupling.Key, set[int]] = {}
    for plan in plans:
        for unit in plan.units:
            for key, indices in plan.group.units[unit].items():
                taken.setdefault(key, set()).update(indices)
    heads = {p.group.heads: len(p.group.units) - len(p.units) for p in plans if p.group.heads}
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


def _changes(module: nn.Module, pruned: nn.Module) -> dict[str, str]:
    """Layer -> its widths before and after, for every layer or parameter with another shape."""
    changed = {}
    for path, part in module.named_modules():
        other = pruned.get_submodule(path)
        shapes = [tuple(p.shape) for p in part.parameters(recurse=False)]
        if shapes == [tuple(p.shape) for p in other.parameters(recurse=False)]:
            continue
        if isinstance(part, graph.WEIGHTED):
            sides = [(side, _removal.width(part, side), _removal.width(other, side)) for side in ("in", "out")]
            changed[path] = ", ".join(f"{side} {a} -> {b}" for side, a, b in sides if a != b)
        else:
            for name, a in part.named_parameters(recurse=False):
                b = getattr(other, name)
                if a.shape != b.shape:  # a bare parameter goes by its own name, a norm by the module's
                    own = f"{path}.{name}".lstrip(".") if any(part.children()) else path
                    changed[own] = f"{'x'.join(map(str, a.shape))} -> {'x'.join(map(str, b.shape))}"
    return changed


def _skipped(module: nn.Module, pruned: nn.Module, groups: list[Coupled]) -> dict[str, str]:
    """Every convolution and linear layer that kept all its outputs -> why."""
    reasons = {path: group.blocked for group in groups for path in group.producers}
    parts = {path: (part, pruned.get_submodule(path)) for path, part in graph.layers(module).items()}
    return {
        path: reasons.get(path) or "its channels are coupled to layers that stay"
        for path, (a, b) in parts.items()
        if _removal.width(a, "out") == _removal.width(b, "out")
    }
