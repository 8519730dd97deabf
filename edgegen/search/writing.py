"""What a search leaves behind: front.json, the recipe and the bundle of each point, the page with the picture."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgegen import judgement, pipeline, recipe
from edgegen.errors import EdgegenError
from edgegen.request import Request
from edgegen.search import front, store
from edgegen.search.front import Front, Point
from edgegen.search.order import Opened, Order
from edgegen.types import Budget

SHOWN = 5  # failures that front.json tells in words


def write(order: Order, opened: Opened, notes: Sequence[str], progress: judgement.Progress) -> Path:
    """front.json, the recipes, the bundles and the page."""
    rows, bench = opened.store.rows(), opened.bench
    found = front.best(rows, opened.budget)
    folder = order.out / "front"
    made = front.points(found, opened.space)
    counts = {state: sum(row.state == state for row in rows) for state in (store.DONE, store.FAILED)}
    counts["stopped early"] = sum(bool(row.figures and row.figures.stopped) for row in rows)
    failed = [(row.slot, row.figures.failure) for row in rows if row.figures and row.figures.failure]
    notes = [*notes, *(f"candidate {slot} failed: {why}" for slot, why in failed[:SHOWN])]
    baseline: dict[str, Any] = {"build": bench.baseline.label}
    if bench.baseline.latency is not None:
        baseline |= {"latency_ms": bench.baseline.latency.value, "status": bench.baseline.latency.status}
    if bench.baseline.artifact is not None:
        baseline["size_bytes"] = bench.baseline.artifact.size_bytes
    content = Front(
        model=order.request.model, target=order.request.target, unit=bench.run.gate.unit,
        default_drop=bench.run.gate.default, baseline=baseline,
        space=opened.space.model_dump(mode="json", by_alias=True), counts=counts, notes=tuple(notes),
        points=tuple(made),
    )  # fmt: skip
    path = front.write(folder, content, found, opened.space, bench.layers)
    if order.bundles:
        content = _with_bundles(order, folder, content, progress)
        path = front.write(folder, content, found, opened.space, bench.layers)
    front.draw(order.out / "front.html", content, rows, opened.space)
    return path


def _with_bundles(order: Order, folder: Path, content: Front, progress: judgement.Progress) -> Front:
    """Every point as a bundle, timed long and scored on data that the search never saw; training is from the cache."""
    points: list[Point] = []
    notes = list(content.notes)
    for point in content.points:
        place = folder / point.name
        try:
            drop = front.allowed(content, point, order.request.budget.max_quality_drop)
            measured_figures = _bundle(order.request, folder / point.recipe, place, drop, progress)
        except EdgegenError as error:
            notes.append(f"point {point.name} has no bundle: {' '.join(str(error).split())}")
            points.append(point)
            continue
        points.append(point.model_copy(update={"bundle": point.name, "measured": measured_figures}))
    return content.model_copy(update={"points": tuple(points), "notes": tuple(notes)})


def _bundle(
    request: Request, made: Path, place: Path, drop: float, progress: judgement.Progress
) -> dict[str, Any]:
    kept = tuple(dict.fromkeys(step.name for step in recipe.load(str(made)).steps))
    shutil.rmtree(place, ignore_errors=True)
    limits = Budget(max_quality_drop=drop)
    one = dataclasses.replace(request, recipe=str(made), kept=kept, out=place, resume=False, budget=limits)
    report = pipeline.compress(one, progress).report()
    result = report["result"]
    return {
        "build": result["label"], "latency_ms": result["latency"]["value"], "size_bytes": result["size_bytes"],
        "ratio": (result.get("ratio") or {}).get("value"), "latency": result["latency"]["status"],
        "quality": {figure["name"]: figure["value"] for figure in result["quality"]},
    }  # fmt: skip
