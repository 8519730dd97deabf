"""Squared maximum mean discrepancy (Gretton et al., 2012): its unbiased estimate, and the error of that estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgegen.metrics._rows import Rows

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (n, D), (m, D) float64 -> (n, m)

RESAMPLES = 200
_WHOLE_KERNEL_IMAGES = 2500  # up to here all subsets share one kernel (150 MB), which is much faster
_INTERVAL_IMAGES = 1024  # kernels of this many images a side bound the interval's time and memory


def subset_values(a: Any, b: Any, kernel: Kernel, *, seed: int, subsets: int, size: int) -> list[float]:
    """Unbiased squared MMD of `subsets` random subsets of `size` rows of a (n, D) and b (m, D): arrays or `Rows`."""
    rng = np.random.RandomState(seed)  # the legacy generator: it makes subsets equal to torch-fidelity's
    draws = [[rng.choice(len(side), size, replace=False) for side in (a, b)] for _ in range(subsets)]
    if max(len(a), len(b)) <= _WHOLE_KERNEL_IMAGES:
        in_a, in_b = (_weights([pair[side] for pair in draws], len(rows)) for side, rows in enumerate((a, b)))
        return [float(v) for v in weighted_mmd2(_all(a), _all(b), in_a, in_b, kernel)]
    one, found = np.ones((1, size)), []
    for i, j in draws:
        found += [float(v) for v in weighted_mmd2(_take(a, i), _take(b, j), one, one, kernel)]
    return found


def standard_error(a: Any, b: Any, kernel: Kernel, *, seed: int) -> float:
    """Bootstrap standard error of the squared MMD at the full numbers of rows.

    Rows are resampled as weights, and pairs of a row with its own copies are left out: counted in, they would make
    every resample larger. With more than 1,024 rows a side, 1,024 are resampled and the error is scaled to n.
    """
    rng = np.random.default_rng(seed)
    n, m = min(len(a), _INTERVAL_IMAGES), min(len(b), _INTERVAL_IMAGES)
    x = _take(a, rng.choice(len(a), n, replace=False))
    y = _take(b, rng.choice(len(b), m, replace=False))
    in_x, in_y = resampled(rng, n), resampled(rng, m)
    found = weighted_mmd2(x, y, in_x, in_y, kernel)
    return float(np.std(found, ddof=1)) * float(np.sqrt(min(n, m) / min(len(a), len(b))))


def change_error(a: Any, before: Any, after: Any, kernel: Kernel, *, seed: int) -> float:
    """Bootstrap standard error of MMD2(a, after) - MMD2(a, before), where before[i] and after[i] are of one input.

    The two share their inputs and `a`, so most of what scatters in each is not in their difference.
    """
    rng = np.random.default_rng(seed)
    n, m = min(len(a), _INTERVAL_IMAGES), min(len(before), _INTERVAL_IMAGES)
    x, places = _take(a, rng.choice(len(a), n, replace=False)), rng.choice(len(before), m, replace=False)
    in_x, in_y = resampled(rng, n), resampled(rng, m)
    parts = []
    for side in (before, after):
        y = _take(side, places)
        cross = ((in_x @ kernel(x, y)) * in_y).sum(axis=1) / (in_x.sum(axis=1) * in_y.sum(axis=1))
        parts.append(_within(in_y, kernel(y, y)) - 2.0 * cross)  # what belongs to `a` alone drops out
    return float(np.std(parts[1] - parts[0], ddof=1)) * float(np.sqrt(min(n, m) / min(len(a), len(before))))


def resampled(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n rows was drawn in each resample, (resamples, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def weighted_mmd2(x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Unbiased squared MMD of each weighting: x (n, D), y (m, D), weights (k, n) and (k, m) -> (k,)."""
    cross = ((in_x @ kernel(x, y)) * in_y).sum(axis=1) / (in_x.sum(axis=1) * in_y.sum(axis=1))
    return _within(in_x, kernel(x, x)) + _within(in_y, kernel(y, y)) - 2.0 * cross


def _within(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted mean of the kernel over pairs of different rows: (k, n), (n, n) -> (k,). Clears the diagonal."""
    np.fill_diagonal(kernel, 0.0)
    pairs = weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1)
    return ((weights @ kernel) * weights).sum(axis=1) / np.maximum(pairs, 1.0)


def _weights(draws: list[np.ndarray], rows: int) -> np.ndarray:
    """Drawn row numbers -> (draws, rows) with 1 where a row was drawn."""
    found = np.zeros((len(draws), rows))
    for weights, drawn in zip(found, draws, strict=True):
        weights[drawn] = 1.0
    return found


def _take(rows: Any, numbers: np.ndarray) -> np.ndarray:
    return (rows.take(numbers) if isinstance(rows, Rows) else rows[numbers]).astype(np.float64)


def _all(rows: Any) -> np.ndarray:
    return _take(rows, np.arange(len(rows)))
