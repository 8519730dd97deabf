"""How far each layer is factorized: by a ratio, by energy, by how far the outputs move, or by time on the target.

Every layer has a menu of choices, the cheapest first; all of them have fewer MACs and parameters than the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgegen import graph
from edgegen.passes import _refit, _swap
from edgegen.passes._swap import Place
from edgegen.types import Job, Model, PassResult

FITS = ("outputs", "weights")
BY = ("ratio", "energy", "drop", "latency")
_LEVELS = 6  # choices of a layer that are tried by running the network


@dataclass(frozen=True)
class Choice:
    """One way to factorize a layer. kept: share of the energy that it keeps, 0..1. make: the block with its weights."""

    text: str
    params: int
    macs: int
    kept: Callable[[], float]
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Menu:
    """The choices for one layer, the cheapest first."""

    place: Place
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Rule:
    """What decides; see `factorize_svd` for the meaning of the figures."""

    by: str
    ratio: float
    energy: float
    drop: float

    def check(self) -> None:
        """Raise ValueError for a figure out of range."""
        _swap.check_choice("by", self.by, BY)
        _swap.check_share("ratio", self.ratio)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], got {self.energy}")
        if not self.drop > 0:
            raise ValueError(f"drop must be above 0, got {self.drop}")


def multiple(round_to: int | None, job: Job) -> int:
    """What ranks are multiples of. Raises ValueError: below 1."""
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    return round_to or job.target.width_multiple("int8")


def steps(most: int, multiple: int) -> list[int]:
    """Ranks to offer, rising: multiples of `multiple` up to `most`; at most 64 of them."""
    count = most // multiple
    stride = max(1, math.ceil(count / 64))
    return [multiple * index for index in range(1, count + 1) if index % stride == 0 or index == 1]


def menu(place: Place, choices: Sequence[Choice]) -> Menu:
    """The choices that cost less than the layer itself, the cheapest first."""
    good = [choice for choice in choices if choice.macs < place.macs and choice.params < place.params]
    return Menu(place, tuple(sorted(good, key=lambda choice: (choice.params, choice.macs))))


def choose(
    menus: Sequence[Menu], rule: Rule, module: nn.Module, inputs: _swap.Inputs, job: Job
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Layer -> what to put there, and why other layers stay.

    Raises:
        ValueError: by latency without a way to measure it.
    """
    empty = {m.place.name: "no rank that the target likes has fewer MACs" for m in menus if not m.choices}
    menus = [m for m in menus if m.choices]
    if rule.by == "drop":
        found, skipped = _by_drop(menus, rule.drop, module, inputs, job)
    elif rule.by == "latency":
        found, skipped = _by_latency(menus, rule.ratio, job)
    else:
        pick = _by_ratio if rule.by == "ratio" else _by_energy
        found, skipped = {}, {}
        for number, entry in enumerate(menus):
            job.progress(entry.place.name, number / len(menus))
            picked = pick(entry, rule.ratio if rule.by == "ratio" else rule.energy)
            if isinstance(picked, str):
                skipped[entry.place.name] = picked
            else:
                found[entry.place.name] = picked
    return found, {**empty, **skipped}


def carry_out(
    model: Model, module: nn.Module, menus: Sequence[Menu], rule: Rule, inputs: _swap.Inputs, job: Job,
    skipped: Mapping[str, str], notes: Mapping[str, Any], *, fit: str = "weights",
) -> PassResult:  # fmt: skip
    """Choose, replace, and tell; with fit "outputs" the last layer of each block is fitted to the layer's outputs."""
    chosen, stay = choose(menus, rule, module, inputs, job)
    parts = {name: choice.make() for name, choice in chosen.items()}
    if fit == "outputs":
        _refit.refit(module, parts, inputs, job.seed)
    new, refused = _swap.replace(module, parts, inputs[0])
    places = {entry.place.name: entry.place for entry in menus}
    changed = {
        name: f"{choice.text}, parameters {places[name].params} -> {choice.params}"
        for name, choice in chosen.items() if name not in refused
    }  # fmt: skip
    return _swap.result(model, module, new, inputs, changed, {**skipped, **stay, **refused}, {"by": rule.by, **notes})


def _by_ratio(entry: Menu, ratio: float) -> Choice | str:
    """The most that leaves (1 - ratio) of the parameters; where not even the least does, the least."""
    if ratio == 0:
        return "ratio is 0"
    fitting = [choice for choice in entry.choices if choice.params <= (1 - ratio) * entry.place.params]
    return fitting[-1] if fitting else entry.choices[0]


def _by_energy(entry: Menu, energy: float) -> Choice | str:
    """The cheapest that keeps the energy, by bisection: more rank keeps more."""
    low, high = 0, len(entry.choices) - 1
    if entry.choices[high].kept() < energy:
        return f"the greatest rank that saves MACs keeps {entry.choices[high].kept():.3f} of the energy, not {energy:g}"
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if entry.choices[middle].kept() >= energy else (middle + 1, high)
    return entry.choices[low]


def _levels(choices: Sequence[Choice]) -> list[Choice]:
    """At most `_LEVELS` choices from the most expensive to the cheapest, spread evenly."""
    count = min(_LEVELS, len(choices))
    at = {round(index * (len(choices) - 1) / max(1, count - 1)) for index in range(count)}
    return [choices[index] for index in sorted(at, reverse=True)]


def _by_drop(
    menus: Sequence[Menu], drop: float, module: nn.Module, inputs: _swap.Inputs, job: Job
) -> tuple[dict[str, Choice], dict[str, str]]:
    """The greedy order of (MACs saved a distance added), as far as the network's outputs stay within `drop`.

    Distances of single layers on two samples, added up, give the order; what is taken is decided on the real network.
    """
    trial, wanted = graph.clone(module).eval(), _swap.outputs(module, inputs)
    levels = {entry.place.name: _levels(entry.choices) for entry in menus}
    errors: dict[str, list[float]] = {}
    for number, (name, choices) in enumerate(levels.items()):
        job.progress(f"sensitivity of {name}", 0.8 * number / len(levels))
        errors[name] = [_moved(trial, {name: choice}, wanted[:2], inputs[:2]) for choice in choices]
    moves = _order({entry.place.name: entry.place.macs for entry in menus}, levels, errors)

    def after(taken: Sequence[tuple[str, int]]) -> dict[str, Choice]:
        return {name: levels[name][level] for name, level in taken}  # a later move of a layer replaces its first

    low, high = 0, len(moves)
    while low < high:  # distances grow with the moves, but for chance
        middle = (low + high + 1) // 2
        fits = _moved(trial, after(moves[:middle]), wanted, inputs) <= drop
        low, high = (middle, high) if fits else (low, middle - 1)
    taken, closed = moves[:low], set[str]()
    for name, level in moves[low:]:  # what comes later may still fit
        if name in closed:
            continue
        job.progress(f"more of {name}", 0.9)
        if _moved(trial, after([*taken, (name, level)]), wanted, inputs) <= drop:
            taken.append((name, level))
        else:
            closed.add(name)
    found = after(taken)
    return found, {
        name: f"alone it moves the outputs by {error[0]:.2g}, and the budget of {drop:g} went to others"
        for name, error in errors.items() if name not in found
    }  # fmt: skip


def _order(
    dense: Mapping[str, int], levels: Mapping[str, Sequence[Choice]], errors: Mapping[str, Sequence[float]]
) -> list[tuple[str, int]]:
    """All moves (layer, level), each the one that saves most MACs for the distance that it adds."""
    at: dict[str, int] = dict.fromkeys(levels, -1)
    moves: list[tuple[str, int]] = []
    while True:
        best: tuple[float, str] | None = None
        for name, level in at.items():
            if level + 1 == len(levels[name]):
                continue
            macs, error = (levels[name][level].macs, errors[name][level]) if level >= 0 else (dense[name], 0.0)
            worth = (macs - levels[name][level + 1].macs) / max(errors[name][level + 1] - error, 1e-12)
            best = (worth, name) if best is None or worth > best[0] else best
        if best is None:
            return moves
        at[best[1]] += 1
        moves.append((best[1], at[best[1]]))


def _moved(
    trial: nn.Module, choices: Mapping[str, Choice], wanted: _swap.Inputs, inputs: _swap.Inputs
) -> float:
    """Distance of the outputs with these layers factorized; the layers come back."""
    old = {name: _swap.put(trial, name, choice.make()) for name, choice in choices.items()}
    try:
        return _swap.distance(wanted, _swap.outputs(trial, inputs))
    except (AttributeError, RuntimeError, TypeError):  # `_swap.replace` would refuse it
        return math.inf
    finally:
        for name, layer in old.items():
            _swap.put(trial, name, layer)


def _by_latency(menus: Sequence[Menu], ratio: float, job: Job) -> tuple[dict[str, Choice], dict[str, str]]:
    """The greatest rank whose layer, alone on the target, takes at most (1 - ratio) of the dense layer's time."""
    if job.latency is None:
        raise ValueError('by = "latency" needs a target that can be measured, and this job has none; use by = "ratio"')
    found, skipped = {}, {}
    for number, entry in enumerate(menus):
        name = entry.place.name
        job.progress(f"timing {name}", number / len(menus))
        dense = job.latency(_swap.alone(entry.place, entry.place.layer))
        if dense.status != "measured":
            skipped[name] = f"not measured: {dense.reason}"
            continue
        low, high, fastest = 0, len(entry.choices) - 1, math.inf
        picked: Choice | None = None
        while low <= high:
            middle = (low + high) // 2
            time = job.latency(_swap.alone(entry.place, entry.choices[middle].make()))
            fastest = min(fastest, time.value) if time.status == "measured" else fastest
            if time.status == "measured" and time.value <= (1 - ratio) * dense.value and time.value < dense.value:
                picked, low = entry.choices[middle], middle + 1
            else:
                high = middle - 1
        if picked is not None:
            found[name] = picked
        else:
            best = f"{fastest:.3g} ms at best, {dense.value:.3g} ms as it is"
            skipped[name] = f"not fast enough on {job.target.name}: {best}"
    return found, skipped
