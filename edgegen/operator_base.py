"""What a kernel takes by its work alone: a launch + MACs x a + bytes x b + weight bytes x c + curved elements x d.

The coefficients are non-negative and of each kind, d of all kinds together; they are fitted to the relative errors of
whole sums and pulled towards what all kinds have in common (a kind that few networks hold must not explain their whole
error). No kernel may beat the best rate of the whole table; MACs are those of full blocks of channels. Plain numpy,
deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgegen.operators import WORK, Kernel

Array = np.ndarray
_WIDTH = 5  # columns of the base
_PULL = 0.05  # of the common coefficients: an error of this size for a coefficient twice as large
_OUTLIER = 0.3  # relative errors of the base beyond this count less
_BLOCK = 16  # channels that are computed together
_FASTER = 1.5  # no kernel is more than this times faster a MAC than the fastest network of the table


@dataclass(frozen=True)
class Sample:
    """A timed network: its kernels, its median in ms, and how far its rounds lay apart, as a share of the median.
    whole: one that somebody uses, not a small one made to be timed."""

    kernels: tuple[Kernel, ...]
    ms: float
    spread: float = 0.0
    whole: bool = False


def base(kernel: Kernel, rates: Mapping[str, Array]) -> float:
    """Milliseconds of a kernel."""
    row = rates.get(group(kernel), rates["of all"] if kernel.kind != "run" else np.zeros(_WIDTH))
    return max(float(row @ columns(kernel)), 1e-7)


def columns(kernel: Kernel) -> Array:
    """What the coefficients are of."""
    full = kernel.groups == 1 or kernel.kind == "depthwise"
    macs = kernel.macs * math.ceil(kernel.channels_out / _BLOCK) * _BLOCK / kernel.channels_out if full else kernel.macs
    return np.array([1.0, macs, kernel.bytes_moved, kernel.bytes_weights, kernel.curved])


def group(kernel: Kernel) -> str:
    """Its kind; what fast kernels are not written for is apart: strided 3x3 windows, depthwise ones beyond 5x5."""
    if kernel.kind == "conv3x3" and kernel.stride > 1:
        return "conv"
    return "depthwise, wide" if kernel.kind == "depthwise" and kernel.kernel[0] > 5 else kernel.kind


def rates(samples: Sequence[Sample], trust: float = 1.0) -> dict[str, Array]:
    """Coefficients of each group that is there, and "of all": one set for all together, for those that are not.

    trust: weight of a whole network's relative error, where a small one has 1.
    """
    groups = sorted({group(kernel) for sample in samples for kernel in sample.kernels})
    table = np.zeros((len(samples), len(groups) + 1, _WIDTH))  # the last: curved elements, at the same cost anywhere
    for row, sample in enumerate(samples):
        for kernel in sample.kernels:
            work = columns(kernel)
            table[row, groups.index(group(kernel)), :-1] += work[:-1]
            table[row, -1, -1] += work[-1]
    times = np.array([sample.ms for sample in samples])
    floors = _floors(groups, table, times)
    sure = np.array([(trust if sample.whole else 1.0) / (1 + sample.spread / 0.1) for sample in samples])
    whole = table[:, [name != "run" for name in (*groups, "")]].sum(1)
    common = _robust(whole, times, np.zeros(_WIDTH), sure, np.zeros(_WIDTH))
    pulled = common.copy()  # a byte of weights is a byte: not free, and never without a pull
    pulled[3] = max(common[3], common[2], float((times / np.maximum(table[:, :, 2].sum(1), 1)).min()))
    prior = np.tile(pulled, len(groups) + 1)
    found = floors + _robust(table.reshape(len(samples), -1), times, floors.ravel(), sure, prior).reshape(-1, _WIDTH)
    found[:-1, -1] = found[-1, -1]
    return {**dict(zip(groups, found)), "of all": common}


def _floors(groups: Sequence[str], table: Array, times: Array) -> Array:
    """The least that any coefficient may be: no kernel beats the best rate of the table by much."""
    floors = np.zeros(table.shape[1:])
    macs, moved = table[:, :, 1].sum(1), table[:, :, 2].sum(1)
    if macs.any():
        works = [name.split(",")[0] in WORK for name in groups]
        floors[[*works, False], 1] = (times / np.maximum(macs, 1))[macs > 0].min() / _FASTER
    if moved.any():
        moves = [name.split(",")[0] not in (*WORK, "input", "output", "run") for name in groups]
        floors[[*moves, False], 2] = (times / np.maximum(moved, 1))[moved > 0].min() / _FASTER
    if "run" in groups:  # an empty graph still is a call; nothing takes less than a share of the quickest network
        floors[groups.index("run"), 0] = 0.3 * times.min()
    return floors


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
    """x >= 0 with the least |scaled x - target|^2 + _PULL^2 |x / prior - 1|^2, with a little ridge: the active set of
    Lawson and Hanson, 1974, Solving Least Squares Problems, chapter 23."""
    size = np.sqrt((scaled**2).sum(0))
    alive = np.flatnonzero(size > 0)
    unit = scaled[:, alive] / size[alive]
    known = prior[alive] * size[alive]
    pull = np.where(known > 0, _PULL / np.maximum(known, 1e-12), 0.0) ** 2
    gram, aim = unit.T @ unit + np.diag(1e-4 + pull), unit.T @ target + pull * known
    x, free = np.zeros(len(alive)), np.zeros(len(alive), dtype=bool)
    for _ in range(3 * len(alive)):
        slope = np.where(free, -np.inf, aim - gram @ x)
        if slope.max(initial=-np.inf) <= 1e-10 * max(1.0, np.abs(aim).max()):
            break
        free[int(np.argmax(slope))] = True
        x = _inside(gram, aim, x, free)
    found = np.zeros(scaled.shape[1])
    found[alive] = x / size[alive]
    return found


def _inside(gram: Array, aim: Array, x: Array, free: Array) -> Array:
    """The least squares of the free ones, from x on; those that would be negative on the way are freed no more."""
    while free.any():
        aimed = np.zeros(len(x))
        aimed[free] = np.linalg.solve(gram[np.ix_(free, free)], aim[free])
        below = free & (aimed <= 0)
        if not below.any():
            return aimed
        x = x + (x[below] / np.maximum(x[below] - aimed[below], 1e-300)).min() * (aimed - x)
        free &= x > 1e-14
        x = np.where(free, x, 0.0)
    return x
