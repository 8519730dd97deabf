"""Figures from the finished blocks of an evaluation: of each bundle, of two against each other; the worst images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edgegen import conditions, images, registry, stats
from edgegen.evaluation_work import Task, Work, metric, referenced, takes
from edgegen.metrics import _blocks, _neighbours
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

GROUPS, T_OF_GROUPS = 10, 2.262  # delete-a-group jackknife of a paired difference; Student's t, 9 degrees of freedom
WORST = 4


@dataclass(frozen=True)
class Result:
    """figures: of each bundle, in order. paired: of the second against the first. worst: the images that differ most,
    as (index, value, {column: (C, H, W) in 0..1}). None of them where this process did only a part of the work.
    left_out: metric of the task -> why it cannot be had here."""

    figures: tuple[tuple[Measurement, ...], ...]
    paired: tuple[Measurement, ...] = ()
    worst: tuple[tuple[int, float, dict[str, np.ndarray]], ...] = ()
    worst_of: str = ""
    complete: bool = True
    left_out: dict[str, str] = field(default_factory=dict)


def result(task: Task, made: _blocks.Blocks, reference: _blocks.Blocks | None) -> Result:
    """All figures, from the finished blocks."""
    sides = [_Side(task, made, k) for k in range(len(task.subjects))]
    real = {kind: reference.rows(kind, _label(task, kind)) for kind in ("features", "spectra")
            if reference is not None and task.taking(kind)}  # fmt: skip
    figures = tuple(tuple(_told(task, m, s.number) for m in _figures(s, real)) for s in sides)
    paired = tuple(_told(task, m) for m in _paired(sides, real)) if len(sides) == 2 else ()
    worst_of, order = _worst(sides, real)
    return Result(figures, paired, _pictures(task, order), worst_of)


@dataclass(frozen=True)
class _Side:
    """What the blocks hold of one bundle."""

    task: Task
    made: _blocks.Blocks
    number: int

    def rows(self, kind: str) -> Rows:
        return self.made.rows(f"{self.number}.{kind}", _label(self.task, kind))

    def stream(self, name: str) -> Iterator[np.ndarray]:
        return (block[name] for block in self.made.all())

    def own(self, name: str) -> Iterator[np.ndarray]:
        return self.stream(f"{self.number}.{name}")


def _label(task: Task, kind: str) -> str:
    """The hash that rows of features carry."""
    if kind == "features":
        return str(task.features.sha256)
    return str(registry.module("metrics", "spectrum").extractor().sha256)


def _figures(side: _Side, real: dict[str, Rows]) -> Iterator[Measurement]:
    """Every figure that one bundle has by itself."""
    task = side.task
    for name in task.metrics:
        kind, options = takes(name), {"seed": task.settings.seed, **task.options(name)}
        if kind in ("features", "spectra") and (kind in real or name == "inception_score"):
            yield metric(name)(real.get(kind), side.rows(kind), **options)
        elif kind == "labels":
            yield metric(name)(side.stream("labels"), side.own("logits"), **options)
        elif kind == "corruptions":
            yield metric(name)(side.stream("labels"), side.own("corrupted"), **options)
        elif kind == "pairs" and (name == "bad_images" or referenced(task.dataset)):
            found = _of_images(task, name, side.made, str(side.number))
            yield found if name == "bad_images" else dataclasses.replace(found, name=f"{name} to the reference")


def _of_images(task: Task, name: str, made: _blocks.Blocks, part: str) -> Measurement:
    """A metric whose value is the mean of its images' figures, from those figures. part: "0", "1" or "pair"."""
    samples = made.column(f"{part}.{name}")
    form = _form(task, name)
    told = {**form.conditions, "n": len(samples)}
    if name == "bad_images":
        kinds = made.column(f"{part}.{name}.kinds").sum(axis=0)
        told["kinds"] = {kind: int(count) for kind, count in zip(form.conditions["kinds"], kinds, strict=True)}
    return dataclasses.replace(
        form, value=float(np.mean(samples)), interval=stats.mean_interval(samples, seed=task.settings.seed),
        samples=tuple(samples.tolist()), conditions=told,
    )  # fmt: skip


def _form(task: Task, name: str) -> Measurement:
    """A figure of the metric, for its name, unit, direction and conditions."""
    blank = np.zeros((1, *(int(d) for d in task.dataset.model.stage.outputs[0].shape[1:])), np.float32)
    return metric(name)([blank], [blank], seed=task.settings.seed, **task.options(name))


def _paired(sides: list[_Side], real: dict[str, Rows]) -> Iterator[Measurement]:
    """The second bundle against the first: image by image, and the difference of every figure, with its interval."""
    task, (a, b) = sides[0].task, sides
    for name in task.metrics:
        kind = takes(name)
        if kind == "pairs":
            found = _of_images(task, name, a.made, "pair")
            yield dataclasses.replace(found, name=f"{name} of the second to the first")
        elif kind == "logits":
            yield metric(name)(a.own("logits"), b.own("logits"), seed=task.settings.seed)
        elif kind in real:
            yield _set_difference(name, task, real[kind], a.rows(kind), b.rows(kind))
    for one, other in zip(_figures(a, {}), _figures(b, {}), strict=True):
        if len(one.samples) == len(other.samples) == len(task.dataset):
            yield _sample_difference(one, other, task.settings.seed)


def _sample_difference(a: Measurement, b: Measurement, seed: int) -> Measurement:
    """Mean of the images' differences: what is alike in both does not widen the interval."""
    change = np.array(b.samples) - np.array(a.samples)
    return dataclasses.replace(
        b, name=f"{b.name}: second less first", value=float(change.mean()), samples=tuple(change.tolist()),
        interval=stats.mean_interval(change, seed=seed), conditions={**b.conditions, "paired": True},
    )  # fmt: skip


def _set_difference(name: str, task: Task, real: Rows, a: Rows, b: Rows) -> Measurement:
    """A set metric's difference; the same inputs and the same real images are left out of both sides (jackknife)."""
    options = {"seed": task.settings.seed, **task.options(name)}
    if "interval" in (metric(name).__kwdefaults__ or {}):
        options["interval"] = False  # that of the difference is made here
    if name == "kid":
        found = registry.module("metrics", "kid").change(real, a, b, features=task.features, seed=options["seed"])
        return dataclasses.replace(found, name="kid: second less first")

    def difference(group: int) -> float:
        kept = [side.only(np.flatnonzero(np.arange(len(side)) % GROUPS != group)) for side in (real, a, b)]
        return float(metric(name)(kept[0], kept[2], **options).value - metric(name)(kept[0], kept[1], **options).value)

    last = metric(name)(real, b, **options)
    value = last.value - metric(name)(real, a, **options).value
    parts = np.array([difference(group) for group in range(GROUPS)]) if len(a) >= 3 * GROUPS else np.zeros(0)
    error = float(np.sqrt((GROUPS - 1) / GROUPS * np.square(parts - parts.mean()).sum())) if len(parts) else np.nan
    bounds = (value - T_OF_GROUPS * error, value + T_OF_GROUPS * error) if np.isfinite(error) else None
    told = {**last.conditions, "paired": True, "interval": f"jackknife, {GROUPS} groups"}
    return dataclasses.replace(
        last, name=f"{name}: second less first", value=value, interval=bounds, samples=(), conditions=told
    )


def _told(task: Task, figure: Measurement, number: int | None = None) -> Measurement:
    """The figure with what was compared: the data, and what each bundle ran. number: of the bundle; None: both."""
    told = conditions.of_data(task.dataset.model, task.dataset.source, task.real)
    ran = task.subjects if number is None else [task.subjects[number]]
    told |= {"data_seed": task.settings.seed, "artifact": [s.artifact.label for s in ran]}
    networks = [conditions.of_network(s.model, s.sampler) for s in ran]
    told |= networks[0] if number is not None else {"networks": networks}
    return dataclasses.replace(figure, conditions={**figure.conditions, **told})


def _worst(sides: list[_Side], real: dict[str, Rows]) -> tuple[str, list[tuple[int, float]]]:
    """(what was looked at, [(number of the sample, value)]): where things differ most."""
    task, made = sides[0].task, sides[0].made
    pairs = [name for name in task.taking("pairs") if name != "bad_images"]
    name = "psnr" if "psnr" in pairs else next(iter(pairs), "")
    where = f"pair.{name}" if len(sides) == 2 else f"0.{name}"
    if name and (len(sides) == 2 or referenced(task.dataset)):
        values = made.column(where)
        higher = _form(task, name).direction == "higher"
        return name, _first(values, values if higher else -np.abs(values))
    if "features" in real:
        apart = _neighbours.nearest(sides[-1].rows("features"), real["features"])
        return "distance to the nearest real image, in features", _first(apart, -apart)
    return "", []


def _first(values: np.ndarray, score: np.ndarray) -> list[tuple[int, float]]:
    """(number of the sample, value) of the lowest scores; what is not a number is worse than all."""
    order = np.argsort(np.nan_to_num(score, nan=-np.inf), kind="stable")[:WORST]
    return [(int(i), float(values[i])) for i in order]


def _pictures(
    task: Task, order: list[tuple[int, float]]
) -> tuple[tuple[int, float, dict[str, np.ndarray]], ...]:
    """The images of the chosen samples, made once more."""
    if not order:
        return ()
    samples = [task.dataset[i] for i, _ in order]
    span = task.dataset.model.stage.outputs[0].value_range
    columns = {}
    with contextlib.ExitStack() as stack:
        work = Work(task, stack)
        if samples[0].reference is not None:
            columns["reference"] = [images.unit_range(s.reference, span) for s in samples]
        for k, one in enumerate(task.subjects):
            made = work.run(k, np.stack([s.input for s in samples]))
            columns[f"{k + 1}: {one.path.name}"] = list(images.unit_range(made, span).astype(np.float32))
    return tuple(
        (index, value, {name: column[row] for name, column in columns.items()})
        for row, (index, value) in enumerate(order)
    )
