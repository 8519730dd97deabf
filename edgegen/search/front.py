"""The front of a search: front.json, the recipe of each point, a page with the picture; and a point by its limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen import files, recipe
from edgegen.errors import BudgetError, UsageError
from edgegen.report import tradeoff
from edgegen.search import strategies, working
from edgegen.search.spaces import Layers, Space, to_recipe, values
from edgegen.search.store import DONE, Figures, Row
from edgegen.types import Budget

SCHEMA = 1


class Point(BaseModel):
    """One point. choices: gene -> value. latency_ms, ratio (to the baseline), drop, size_bytes: as the search found.

    recipe: a file beside front.json. bundle: a folder beside it, "" without one; measured: figures of its report, which
    were found on data and in a timing that the search did not look at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    choices: dict[str, Any]
    recipe: str
    latency_ms: float
    ratio: float
    drop: float
    size_bytes: int
    status: str
    build: str
    bundle: str = ""
    measured: dict[str, Any] = {}


class Front(BaseModel):
    """What a search found. model, target, unit (of the drop): what it was for. counts: state -> candidates.

    default_drop: the loss that `compress` allows where nobody says how much.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)
    version: int = Field(SCHEMA, alias="schema")
    model: str
    target: str
    unit: str
    default_drop: float = 0.0
    baseline: dict[str, Any] = {}
    space: dict[str, Any] = {}
    counts: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()


def best(rows: Sequence[Row], budget: Budget) -> list[Row]:
    """The candidates that no other beats in latency, quality and size, from fast to slow; inside the limits only.

    What was stopped early has no final quality, and is not among them.
    """
    whole = [
        row for row in rows
        if row.state == DONE and row.figures and row.figures.drop is not None and not row.figures.stopped
    ]  # fmt: skip
    inside = [row for row in whole if row.figures and not any(_above(row.figures, budget))]
    told = {row.key: _compared(row) for row in inside}
    kept = [row for row in inside if not any(strategies.dominates(told[o.key], told[row.key]) for o in inside)]
    unique = {told[row.key]: row for row in sorted(kept, key=lambda row: -row.slot)}
    return [unique[key] for key in sorted(unique)]


def _above(figures: Figures, budget: Budget) -> list[bool]:
    return [share > 0 for share in working.violations(figures, budget).values()]


def _compared(row: Row) -> tuple[float, float, float]:
    if row.figures is None or row.figures.drop is None:
        return math.inf, math.inf, math.inf
    return row.figures.ratio, row.figures.drop, float(row.figures.size_bytes)  # the ratio: timings are of many runs


def hypervolume(found: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that points (lower is better) dominate below a reference point: Zitzler and Thiele, 1999."""
    area, height = 0.0, reference[1]
    for x, y in sorted(point for point in found if point[0] < reference[0]):
        if y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area


def points(found: Sequence[Row], space: Space) -> list[Point]:
    """The points of a front, named by their place in it."""
    made = []
    for number, row in enumerate(found, 1):
        figures = row.figures
        if figures is None or figures.drop is None:
            continue
        name = f"{number:02d}"
        made.append(Point(
            name=name, choices=values(space, row.choices), recipe=f"{name}.toml", latency_ms=figures.latency_ms,
            ratio=figures.ratio, drop=figures.drop, size_bytes=figures.size_bytes, status=figures.status,
            build=figures.build,
        ))  # fmt: skip
    return made


def write(folder: Path, front: Front, found: Sequence[Row], space: Space, layers: Layers) -> Path:
    """Write the recipes and front.json into `folder`; the path of front.json."""
    for point, row in zip(front.points, found, strict=True):
        made = to_recipe(space, row.choices, layers)
        told = f"{front.model} on {front.target}: {point.latency_ms:.3g} ms, drop {point.drop:.3g} {front.unit}"
        files.write_text(folder / point.recipe, recipe.to_toml(made.model_copy(update={"description": told})))
    path = folder / "front.json"
    files.write_json(path, front.model_dump(mode="json", by_alias=True))
    return path


def draw(out: Path, front: Front, rows: Sequence[Row], space: Space) -> list[Path]:
    """A page with all scored candidates, those of the front first; the paths written.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    shown: dict[str, tradeoff.Point] = {}
    names = {_mark(point.choices, point.latency_ms): f"point {point.name}" for point in front.points}
    for row in rows:
        figures = row.figures
        if figures is None or figures.failure or figures.drop is None or not math.isfinite(figures.drop):
            continue
        latency = (figures.latency_ms,) * 3
        drop = None if figures.stopped else (figures.drop,) * 3  # after a part of its training it is no dot
        chosen = values(space, row.choices)
        facts = {"choices": _told(space, chosen), "build": figures.build,
                 "size": f"{figures.size_bytes / 1e6:.3g} MB", "figures": figures.status}  # fmt: skip
        reached = figures.rungs[-1][0] if figures.rungs else 0.0
        facts["training"] = f"stopped at {reached:.0%}" if figures.stopped else "whole"
        name = names.get(_mark(chosen, figures.latency_ms), f"candidate {row.slot}")
        shown.setdefault(name, tradeoff.Point(name, latency, drop, facts, figures.stopped))
    notes = [*front.notes, "Latencies are of short timings in several runs; the bundles of the front hold long ones."]
    if front.points:
        notes.append("Points: nothing beats them in latency, quality and size; with the mark, not even without size.")
    first = [shown.pop(name) for name in names.values() if name in shown]
    title = f"{len(front.points)} points of {front.model} on {front.target}"
    quality = f"loss of quality ({front.unit})"
    found = [*first, *shown.values()]
    return tradeoff.write(out, title, found, quality, "lower", notes=notes, command="search", what="candidate")


def _mark(chosen: Mapping[str, Any], latency_ms: float) -> str:
    """By which a candidate and its point are found to be the same."""
    return json.dumps([dict(chosen), latency_ms], sort_keys=True)


def _told(space: Space, chosen: Mapping[str, Any]) -> str:
    """The choices in words, without what is left out."""
    made = {g.name: str(chosen[g.name]) for g in space.genes if chosen[g.name] != g.off}
    return ", ".join(name if name == value else f"{name} {value}" for name, value in made.items()) or "no change"


def read(path: Path) -> Front:
    """A front from front.json.

    Raises:
        UsageError: not readable, another schema, or a field with an error.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.get("schema") != SCHEMA:
            got = table.get("schema") if isinstance(table, dict) else type(table).__name__
            raise UsageError(f"{path}: schema must be {SCHEMA}, got {got!r}; give the front.json of edgegen search")
        return Front.model_validate(table)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a readable front.json ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where}: {first['msg']}, got {first.get('input')!r}") from error


def allowed(front: Front, point: Point, limit: float | None) -> float:
    """The loss of quality that a bundle of a point may have: `limit`, or twice what the search found on other data."""
    return max(front.default_drop, 2 * point.drop) if limit is None else limit


def pick(front: Front, budget: Budget, source: str = "front.json") -> Point:
    """The point with the least loss of quality inside the limits.

    Raises:
        BudgetError: none is inside; names the nearest and the limit it breaks.
    """
    if not front.points:
        raise BudgetError(f"{source}: the front has no points; search again with looser limits or more trials")
    excess = {point.name: _excess(point, budget) for point in front.points}
    inside = [point for point in front.points if not excess[point.name]]
    if inside:
        return min(inside, key=lambda point: (point.drop, point.latency_ms))
    nearest = min(front.points, key=lambda point: max(excess[point.name].values()))
    broken = max(excess[nearest.name], key=lambda name: excess[nearest.name][name])
    raise BudgetError(
        f"{source}: no point meets the limits; nearest: {nearest.name} with {nearest.latency_ms:.3g} ms,"
        f" {nearest.size_bytes / 1e6:.3g} MB, drop {nearest.drop:.3g} {front.unit}; it breaks --max-{broken}"
    )


def _excess(point: Point, budget: Budget) -> Mapping[str, float]:
    limits = {
        "latency": (point.latency_ms, budget.max_latency_ms),
        "size": (point.size_bytes, budget.max_size_bytes),
        "quality-drop": (point.drop, budget.max_quality_drop),
    }
    set_ = {name: pair for name, pair in limits.items() if pair[1] is not None}
    shares = {name: (value - (limit or 0.0)) / max(abs(limit or 0.0), 1e-9) for name, (value, limit) in set_.items()}
    return {name: share for name, share in shares.items() if share > 0}
