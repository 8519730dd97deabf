"""From timed small networks to the time of a kernel: a physical base, corrected by a Gaussian process.

A network takes the sum over its kernels of base(kernel) x exp(g(kernel)). The base is a launch + MACs x a + bytes x b +
weight bytes x c + curved elements x d with non-negative coefficients of each kind, fitted to relative errors and pulled
towards what all kinds have in common (a kind that few networks hold must not explain their whole error); no kernel may
beat the best rate of the whole table. log T is nearly linear in g, each kernel weighted with its share of the time:
g is the posterior mean of a Gaussian process that was seen through sums (Rasmussen and Williams, 2006, section 2.2).
Its smoothness is what has the least error on networks left out, in five folds. Far from the table g falls back to the
mean of its kind: what is left is the base, which grows with the work. Plain numpy, deterministic, below a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen import errors
from edgegen.operators import KINDS, WORK, Kernel

Array = np.ndarray
Shape = tuple[float, float, float]
LEAST = 8
"""Networks that a fit needs."""
_FOLDS = 5
_SCALES = (1.0, 2.0, 4.0)  # length scales in octaves of the features
_HEIGHTS = (0.25, 0.5)  # standard deviation of what depends on the features, in log time
_NOISES = (0.03, 0.1)  # of a measurement and of what features do not tell
_OF_ALL, _OF_KIND = 0.1, 0.25  # standard deviations of what all kernels, and all of one kind, have in common
_STEPS = 3  # of Gauss and Newton, as shares depend on g
_WIDTH = 5  # columns of the base
_PULL = 0.05  # of the common coefficients: an error of this size for a coefficient twice as large
_OUTLIER = 0.3  # relative errors of the base beyond this count less
_FASTER = 1.5  # no kernel is more than this times faster a MAC than the fastest network of the table


@dataclass(frozen=True)
class Sample:
    """A timed network: its kernels, its median in ms, and how far its rounds lay apart, as a share of the median."""

    kernels: tuple[Kernel, ...]
    ms: float
    spread: float = 0.0


@dataclass(frozen=True)
class Fit:
    """What `predict` needs. rates: kind -> ms of each of the base's columns. points, kinds: kernels
    of the table as features; weights: of the process at them. shape: length scale, height and noise of the process.
    error: relative, on networks left out (median, p90); nan where the shape was given."""

    rates: dict[str, Array]
    points: Array
    kinds: Array
    weights: Array
    shape: Shape
    error: tuple[float, float]


def fit(samples: Sequence[Sample], shape: Shape | None = None) -> Fit:
    """Fit timed networks of one runtime in one precision.

    Args:
        shape: of the process; None: what has the least error on networks left out.
    Raises:
        UsageError: fewer than `LEAST` networks, or one without a positive time.
    """
    if len(samples) < LEAST or not all(sample.ms > 0 and math.isfinite(sample.ms) for sample in samples):
        raise errors.UsageError(f"a fit needs at least {LEAST} networks with positive times, got {len(samples)}")
    with _one_thread():
        return _fit(samples, shape)


def _one_thread() -> contextlib.AbstractContextManager[Any]:
    """Threads of small matrix products stand in each other's way: 20 s in place of 0.5 s on a busy host."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return contextlib.nullcontext()
    import threadpoolctl

    return threadpoolctl.threadpool_limits(1)


def _fit(samples: Sequence[Sample], shape: Shape | None) -> Fit:
    whole = _Data.of(samples)
    (scale, height, noise), error = (shape, (math.nan, math.nan)) if shape else _shaped(samples)
    prior = _covariance(_shape(whole.points, whole.points, scale), whole.kinds, whole.kinds, height)
    return Fit(whole.rates, whole.points, whole.kinds, _posterior(prior, whole, noise), (scale, height, noise), error)


def _shaped(samples: Sequence[Sample]) -> tuple[Shape, tuple[float, float]]:
    """The shape with the least error on networks left out, and that error (median, p90)."""
    folds = _folds(samples)
    best, off, chosen = math.inf, np.zeros(0), (0.0, 0.0, 0.0)
    for scale in _SCALES:
        shapes = [(_shape(a.points, a.points, scale), _shape(b.points, a.points, scale)) for a, b in folds]
        for height, noise in itertools.product(_HEIGHTS, _NOISES):
            lost = [_left_out(a, b, shape, height, noise) for (a, b), shape in zip(folds, shapes, strict=True)]
            missed = np.concatenate(lost)
            if (score := float(np.mean(np.abs(missed)))) < best - 1e-9:
                best, off, chosen = score, np.abs(np.expm1(missed)), (scale, height, noise)
    return chosen, (float(np.median(off)), float(np.percentile(off, 90)))


@dataclass(frozen=True)
class _Data:
    """Networks as arrays: of each kernel base (ms), features, kind and network; of each network log time."""

    rates: dict[str, Array]
    base: Array
    points: Array
    kinds: Array
    owner: Array
    times: Array
    spread: Array

    @staticmethod
    def of(samples: Sequence[Sample], rates: dict[str, Array] | None = None) -> _Data:
        known = rates or _rates(samples)
        counts = [_counted(sample.kernels) for sample in samples]
        every = [(kernel, number, row) for row, found in enumerate(counts) for kernel, number in found.items()]
        return _Data(
            known, np.array([number * _base(kernel, known) for kernel, number, _ in every]),
            np.concatenate([_features(list(found), sample.kernels) for sample, found in zip(samples, counts)]),
            np.array([KINDS.index(kernel.kind) for kernel, _, _ in every]), np.array([row for *_, row in every]),
            np.log([sample.ms for sample in samples]), np.array([sample.spread for sample in samples]),
        )  # fmt: skip


def _counted(kernels: Sequence[Kernel]) -> Counter[Kernel]:
    """How often each kernel occurs, whatever its layer is called."""
    return Counter(dataclasses.replace(kernel, name="", fused=()) for kernel in kernels)


def _folds(samples: Sequence[Sample]) -> list[tuple[_Data, _Data]]:
    """(the rest, one part) for every part; the rest alone makes the base, as it would for networks never seen."""
    made = []
    for part in range(_FOLDS):
        rest = _Data.of([sample for row, sample in enumerate(samples) if row % _FOLDS != part])
        made.append((rest, _Data.of(samples[part::_FOLDS], rest.rates)))
    return made


def _left_out(rest: _Data, part: _Data, shapes: tuple[Array, Array], height: float, noise: float) -> Array:
    """Log of estimated by measured time of the networks of a part."""
    weights = _posterior(_covariance(shapes[0], rest.kinds, rest.kinds, height), rest, noise)
    g = _covariance(shapes[1], part.kinds, rest.kinds, height) @ weights
    return np.log(np.bincount(part.owner, part.base * np.exp(g), len(part.times))) - part.times


def predict(fitted: Fit, kernels: Sequence[Kernel]) -> Array:
    """Milliseconds of each kernel of a network; their sum is the network's."""
    base = np.array([_base(kernel, fitted.rates) for kernel in kernels])
    kinds = np.array([KINDS.index(kernel.kind) for kernel in kernels])
    shape = _shape(_features(kernels, kernels), fitted.points, fitted.shape[0])
    return base * np.exp(_covariance(shape, kinds, fitted.kinds, fitted.shape[1]) @ fitted.weights)


def unknown(fitted: Fit, kernels: Sequence[Kernel]) -> list[str]:
    """Kinds of kernels that the table has not seen; `predict` takes the rates of all kinds together for them."""
    seen = {KINDS[index] for index in np.unique(fitted.kinds)}
    return sorted({kernel.kind for kernel in kernels} - seen)


def _features(kernels: Sequence[Kernel], network: Sequence[Kernel]) -> Array:
    """(kernels, features) in octaves: sizes, window, how full the last block of channels is and whether it is full,
    whether weights fit into a cache, the working set of the whole network."""
    total = math.log2(1 + sum(k.bytes_weights + k.bytes_moved for k in network)) / 2
    rows = []
    for k in kernels:
        depth = max(1, k.channels_in // k.groups)
        rows.append([
            math.log2(depth), math.log2(max(1, k.channels_out)), math.log2(max(1, k.height * k.width)) / 2,
            math.log2(k.kernel[0] * k.kernel[1]), math.log2(max(1, k.stride)), math.log2(max(1, k.groups)) / 2,
            2 * math.log2(math.ceil(k.channels_out / 16) * 16 / k.channels_out),
            2 * math.log2(math.ceil(depth / 8) * 8 / depth) if depth > 1 else 0.0,
            2.0 * (k.channels_out % 16 > 0), 1.0 * (k.channels_out % 8 > 0), 1.0 * (depth % 8 > 0),
            3 * math.tanh(math.log2((1 + k.bytes_weights) / 1e6) / 2), math.log2(1 + k.bytes_moved / 1024) / 2, total,
            4.0 * (k.precision == "int8"),
        ])  # fmt: skip
    return np.array(rows, dtype=np.float64).reshape(len(kernels), -1)


def _shape(a: Array, b: Array, scale: float) -> Array:
    """exp(-|a - b|^2 / 2 scale^2), (rows of a, rows of b)."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.exp(-np.maximum(square, 0) / (2 * scale**2))


def _covariance(shape: Array, kinds_a: Array, kinds_b: Array, height: float) -> Array:
    same = kinds_a[:, None] == kinds_b[None]
    return _OF_ALL**2 + same * (_OF_KIND**2 + height**2 * shape)


def _posterior(prior: Array, data: _Data, noise: float) -> Array:
    """Weights of the process at the kernels."""
    first = np.flatnonzero(np.diff(data.owner, prepend=-1))  # of each network's kernels
    g, weights = np.zeros(len(data.base)), np.zeros(len(data.base))
    for _ in range(_STEPS):
        parts = data.base * np.exp(np.clip(g, -3, 3))
        total = np.add.reduceat(parts, first)
        share = parts / total[data.owner]
        residual = data.times - np.log(total) + np.add.reduceat(share * g, first)
        summed = np.add.reduceat(np.add.reduceat(share[:, None] * prior * share, first, 0), first, 1)
        weights = share * np.linalg.solve(summed + np.diag(noise**2 + data.spread**2), residual)[data.owner]
        g = prior @ weights
    return weights


def _base(kernel: Kernel, rates: dict[str, Array]) -> float:
    row = rates.get(kernel.kind, rates["of all"] if kernel.kind != "run" else np.zeros(_WIDTH))
    return max(float(row @ _columns(kernel)), 1e-7)


def _columns(kernel: Kernel) -> Array:
    return np.array([1.0, kernel.macs, kernel.bytes_moved, kernel.bytes_weights, kernel.curved])


def _rates(samples: Sequence[Sample]) -> dict[str, Array]:
    """Coefficients of each kind that is there, and "of all": one set for all kinds together, for those that are not."""
    kinds = [kind for kind in KINDS if any(k.kind == kind for s in samples for k in s.kernels)]
    table = np.zeros((len(samples), len(kinds), _WIDTH))
    for row, sample in enumerate(samples):
        for kernel in sample.kernels:
            table[row, kinds.index(kernel.kind)] += _columns(kernel)
    times = np.array([sample.ms for sample in samples])
    floors = np.zeros((len(kinds), _WIDTH))
    macs = table[:, :, 1].sum(1)
    if macs.any():
        floors[[kind in WORK for kind in kinds], 1] = (times / np.maximum(macs, 1))[macs > 0].min() / _FASTER
    moved = table[:, :, 2].sum(1)
    if moved.any():
        quickest = (times / np.maximum(moved, 1))[moved > 0].min() / _FASTER
        floors[[kind not in (*WORK, "input", "output", "run") for kind in kinds], 2] = quickest
    if "run" in kinds:  # an empty graph still is a call; nothing takes less than a share of the quickest network
        floors[kinds.index("run"), 0] = 0.3 * times.min()
    width = len(kinds) * _WIDTH
    sure = 1 / (1 + np.array([sample.spread for sample in samples]) / 0.1)
    whole = table[:, [kind != "run" for kind in kinds]].sum(1)
    common = _robust(whole, times, np.zeros(_WIDTH), sure, np.zeros(_WIDTH))
    prior = np.tile(common, (len(kinds), 1))
    found = floors + _robust(
        table.reshape(len(samples), width), times, floors.reshape(width), sure, prior.reshape(width)
    ).reshape(-1, _WIDTH)
    rates = {kind: found[index] for index, kind in enumerate(kinds)}
    return {**rates, "of all": common}


def _robust(columns: Array, times: Array, floors: Array, sure: Array, prior: Array) -> Array:
    """Non-negative x with columns (x + floors) near the times, relative to them; outliers count less (Huber)."""
    scaled = columns / times[:, None]
    target, weights, found = 1.0 - scaled @ floors, sure, floors
    for _ in range(4):
        found = _non_negative(scaled * weights[:, None], target * weights, prior)
        off = np.abs(scaled @ found - target)
        weights = sure * np.sqrt(_OUTLIER / np.maximum(off, _OUTLIER))
    return found


def _non_negative(scaled: Array, target: Array, prior: Array) -> Array:
    """x >= 0 with the least |scaled x - target|^2 + _PULL^2 |x / prior - 1|^2: coordinate descent, a little ridge."""
    size = np.sqrt((scaled**2).sum(0))
    alive = np.flatnonzero(size > 0)
    unit = scaled[:, alive] / size[alive]
    known = prior[alive] * size[alive]
    pull = np.where(known > 0, _PULL / np.maximum(known, 1e-12), 0.0) ** 2
    gram = unit.T @ unit + np.diag(1e-4 + pull)
    aim = unit.T @ target + pull * known
    x = np.zeros(len(alive))
    for _ in range(2000):
        before = x.copy()
        for j in range(len(alive)):
            x[j] = max(0.0, x[j] + (aim[j] - gram[j] @ x) / gram[j, j])
        if np.abs(x - before).max(initial=0.0) < 1e-9 * max(1.0, np.abs(x).max(initial=0.0)):
            break
    found = np.zeros(scaled.shape[1])
    found[alive] = x / size[alive]
    return found
