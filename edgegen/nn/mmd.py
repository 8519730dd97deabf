"""Squared maximum mean discrepancy of features, unbiased (Gretton et al., 2012), and KID's kernel.

Binkowski et al., 2018, arXiv:1801.01401: k(x, y) = (x.y / D + 1)^3. For metrics, which add subsets and intervals, and
for passes that choose by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (n, D), (m, D) float64 -> (n, m)


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 of all pairs."""
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # several times faster than ** 3


def squared(x: np.ndarray, y: np.ndarray, kernel: Kernel = cubic) -> float:
    """Of all rows of x (n, D) and y (m, D), two or more each."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    return float(weighted(a, b, np.ones((1, len(a))), np.ones((1, len(b))), kernel)[0])


def weighted(x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Of each weighting: x (n, D), y (m, D), weights (k, n) and (k, m) -> (k,)."""
    cross = ((in_x @ kernel(x, y)) * in_y).sum(axis=1) / (in_x.sum(axis=1) * in_y.sum(axis=1))
    return _within(in_x, kernel(x, x)) + _within(in_y, kernel(y, y)) - 2.0 * cross


def _within(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted mean of the kernel over pairs of different rows: (k, n), (n, n) -> (k,). Clears the diagonal."""
    np.fill_diagonal(kernel, 0.0)
    pairs = weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1)
    return ((weights @ kernel) * weights).sum(axis=1) / np.maximum(pairs, 1.0)
