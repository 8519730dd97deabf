"""From timed small networks to the time of a kernel: a physical base, corrected by a Gaussian process.

A network takes the sum over its kernels of base(kernel) x exp(g(kernel)), with the base of `operator_base`. log T is
nearly linear in g, each kernel weighted with its share of the time: g is the posterior mean of a Gaussian process that
was seen through sums (Rasmussen and Williams, 2006, section 2.2). Its smoothness is what has the least error on
networks left out, whole ones where there are some, in five folds. Far from the table g falls back to the mean of its
kind: what is left is the base, which grows with the work. Plain numpy, deterministic.
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

from edgegen import errors, operator_base
from edgegen.operator_base import Sample
from edgegen.operators import KINDS, Kernel

Array = np.ndarray
Shape = tuple[float, float, float, float]
_Blocks = list[tuple[Array, Array, Array]]
LEAST = 8
"""Networks that a fit needs."""
_FOLDS = 5
_SCALES = (2.0, 4.0)  # length scales in octaves of the features
_HEIGHTS = (0.25, 0.5)  # standard deviation of what depends on the features, in log time
_NOISES = (0.03, 0.1)  # of a measurement and of what features do not tell; what is off by more gets noise of its own
_TRUSTS = (1.0, 3.0)  # of the base in whole networks: many small ones tell more than they, few do not
_OF_ALL, _OF_KIND = 0.1, 0.25  # standard deviations of what all kernels, and all of one kind, have in common
_STEPS = 4  # of Gauss and Newton, as shares and noises depend on g


@dataclass(frozen=True)
class Fit:
    """What `predict` needs. rates: kind -> ms of each of the base's columns. points, kinds: kernels
    of the table as features; weights: of the process at them. shape: length scale, height and noise of the process,
    and the base's trust in whole networks. error: relative, on networks left out (median, p90)."""

    rates: dict[str, Array]
    points: Array
    kinds: Array
    weights: Array
    shape: Shape
    error: tuple[float, float]


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit timed networks of one runtime in one precision.

    Raises:
        UsageError: fewer than `LEAST` networks, or one without a positive time.
    """
    if len(samples) < LEAST or not all(sample.ms > 0 and math.isfinite(sample.ms) for sample in samples):
        raise errors.UsageError(f"a fit needs at least {LEAST} networks with positive times, got {len(samples)}")
    with _one_thread():
        return _fit(samples)


def _one_thread() -> contextlib.AbstractContextManager[Any]:
    """Threads of small matrix products stand in each other's way: 20 s in place of 0.5 s on a busy host."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return contextlib.nullcontext()
    import threadpoolctl

    return threadpoolctl.threadpool_limits(1)


def _fit(samples: Sequence[Sample]) -> Fit:
    (scale, height, noise, trust), error = _shaped(samples)
    whole = _Data.of(samples, operator_base.rates(samples, trust))
    weights = _posterior(_blocks(whole.points, whole.kinds, whole.points, whole.kinds, scale), whole, height, noise)
    return Fit(whole.rates, whole.points, whole.kinds, weights, (scale, height, noise, trust), error)


def _shaped(samples: Sequence[Sample]) -> tuple[Shape, tuple[float, float]]:
    """The shape with the least error on networks left out, and that error (median, p90)."""
    best, off, chosen = math.inf, np.zeros(0), (0.0, 0.0, 0.0, 0.0)
    trusts = _TRUSTS if any(sample.whole for sample in samples) else _TRUSTS[:1]
    folds = {trust: _folds(samples, trust) for trust in trusts}
    for scale in _SCALES:
        shapes = [  # of features alone, which no trust changes
            tuple(_blocks(one.points, one.kinds, a.points, a.kinds, scale) for one in (a, b))
            for a, b in folds[trusts[0]]
        ]
        for trust, height, noise in itertools.product(trusts, _HEIGHTS, _NOISES):
            pairs = zip(folds[trust], shapes, strict=True)
            missed = np.concatenate([_left_out(a, b, shape, height, noise) for (a, b), shape in pairs])
            if (score := float(np.mean(np.abs(missed)))) < best - 1e-9:
                best, off, chosen = score, np.abs(np.expm1(missed)), (scale, height, noise, trust)
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
    def of(samples: Sequence[Sample], known: dict[str, Array]) -> _Data:
        counts = [_counted(sample.kernels) for sample in samples]
        every = [(kernel, number, row) for row, found in enumerate(counts) for kernel, number in found.items()]
        return _Data(
            known, np.array([number * operator_base.base(kernel, known) for kernel, number, _ in every]),
            np.concatenate([_features(list(found), sample.kernels) for sample, found in zip(samples, counts)]),
            np.array([KINDS.index(kernel.kind) for kernel, _, _ in every]), np.array([row for *_, row in every]),
            np.log([sample.ms for sample in samples]), np.array([sample.spread for sample in samples]),
        )  # fmt: skip


def _counted(kernels: Sequence[Kernel]) -> Counter[Kernel]:
    """How often each kernel occurs, whatever its layer is called."""
    return Counter(dataclasses.replace(kernel, name="", fused=()) for kernel in kernels)


def _folds(samples: Sequence[Sample], trust: float) -> list[tuple[_Data, _Data]]:
    """(the rest, one part) for every part of the whole networks, or of all where those are few; the rest alone makes
    the base, as it would for networks never seen."""
    whole = [row for row, sample in enumerate(samples) if sample.whole]
    asked = whole if len(whole) >= 2 * _FOLDS else list(range(len(samples)))
    made = []
    for part in range(_FOLDS):
        out = set(asked[part::_FOLDS])
        held = [sample for row, sample in enumerate(samples) if row not in out]
        rest = _Data.of(held, operator_base.rates(held, trust))
        made.append((rest, _Data.of([samples[row] for row in sorted(out)], rest.rates)))
    return made


def _left_out(rest: _Data, part: _Data, blocks: tuple[_Blocks, ...], height: float, noise: float) -> Array:
    """Log of estimated by measured time of the networks of a part."""
    g = _correction(blocks[1], _posterior(blocks[0], rest, height, noise), height, len(part.base))
    return np.log(np.bincount(part.owner, part.base * np.exp(g), len(part.times))) - part.times


def predict(fitted: Fit, kernels: Sequence[Kernel]) -> Array:
    """Milliseconds of each kernel of a network; their sum is the network's."""
    base = np.array([operator_base.base(kernel, fitted.rates) for kernel in kernels])
    kinds = np.array([KINDS.index(kernel.kind) for kernel in kernels])
    scale, height, *_ = fitted.shape
    blocks = _blocks(_features(kernels, kernels), kinds, fitted.points, fitted.kinds, scale)
    return base * np.exp(_correction(blocks, fitted.weights, height, len(kernels)))


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


def _blocks(points: Array, kinds: Array, others: Array, other_kinds: Array, scale: float) -> _Blocks:
    """Of each kind that both have: the rows here, the rows there, exp(-|a - b|^2 / 2 scale^2) between them."""
    made = []
    for kind in np.intersect1d(kinds, other_kinds):
        here, there = np.flatnonzero(kinds == kind), np.flatnonzero(other_kinds == kind)
        a, b = points[here], others[there]
        square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        made.append((here, there, np.exp(-np.maximum(square, 0) / (2 * scale**2))))
    return made


def _correction(blocks: _Blocks, weights: Array, height: float, count: int) -> Array:
    """g of each of `count` kernels: the covariance with those of the table, times their weights."""
    g = np.full(count, _OF_ALL**2 * weights.sum())
    for here, there, shape in blocks:
        g[here] += _OF_KIND**2 * weights[there].sum() + height**2 * shape @ weights[there]
    return g


def _posterior(blocks: _Blocks, data: _Data, height: float, noise: float) -> Array:
    """Weights of the process at the kernels. A network that the others do not foretell gets what its time is off beyond
    the process's own doubt as noise of its own (leaving one out: Rasmussen and Williams, section 5.4.2): one kernel
    that a runtime computes oddly, or one bad timing, would else bend all others."""
    count = len(data.times)
    g, weights = np.zeros(len(data.base)), np.zeros(len(data.base))
    known, own = noise**2 + data.spread**2, np.zeros(count)
    for _ in range(_STEPS):
        parts = data.base * np.exp(np.clip(g, -3, 3))
        total = np.bincount(data.owner, parts, count)
        share = parts / total[data.owner]
        residual = data.times - np.log(total) + np.bincount(data.owner, share * g, count)
        seen = np.full((count, count), _OF_ALL**2)
        for here, _, shape in blocks:
            of = np.zeros((count, len(here)))
            of[data.owner[here], np.arange(len(here))] = share[here]
            seen += of @ (_OF_KIND**2 + height**2 * shape) @ of.T
        inverse = np.linalg.inv(seen + np.diag(known + own))
        doubt = 1 / np.diag(inverse)
        own = np.maximum(0, (inverse @ residual * doubt) ** 2 - (doubt - own))
        weights = share * np.linalg.solve(seen + np.diag(known + own), residual)[data.owner]
        g = _correction(blocks, weights, height, len(g))
    return weights
