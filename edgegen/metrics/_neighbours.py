"""Which rows lie inside the neighbourhood of another set of rows, in bounded memory.

Kynkäänniemi et al., 2019, Improved Precision and Recall Metric for Assessing Generative Models, arXiv:1904.06991,
equation 1: a set's manifold is the union of balls around its rows, each reaching to the row's k-th nearest neighbour.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import feature_name, too_few, two_sides
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

_BLOCK = 1024  # rows a side whose distances are held at a time: 8 MiB


def share_inside(name: str, manifold: Any, points: Any, features: Any, seed: int, k: int) -> Measurement:
    """Share of `points` inside the manifold of `manifold`, with a sample (0 or 1) a point.

    The interval is over the points; the manifold is taken as it is.

    Raises:
        DataError: fewer than k + 1 images on a side.
    """
    from edgegen.metrics._common import mean_of

    a, b = two_sides(name, manifold, points, features)
    if k < 1 or min(len(a), len(b)) <= k:
        raise DataError(f"{name} with k = {k} needs more than {max(k, 1)} images on each side, got {len(a)}, {len(b)}")
    if not (a.finite() and b.finite()):
        samples = [float("nan")] * len(b)
    else:
        samples = [float(v) for v in inside(b, a, radii(a, k))]
    found = mean_of(name, "share", samples, seed=seed, direction="higher", k=k, **feature_name(features))
    sizes = (len(a), len(b)) if name == "precision" else (len(b), len(a))
    conditions = {**found.conditions, "n": sizes, **too_few(name, min(sizes))}
    return Measurement(name, "share", found.value, found.interval, found.samples, "higher", conditions)


def radii(rows: Rows, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, (n,)."""
    found = []
    for number, block in enumerate(rows.blocks(_BLOCK)):
        nearest = np.empty((len(block), 0))
        for other, against in enumerate(rows.blocks(_BLOCK)):
            apart = _apart(block, against)
            if other == number:
                np.fill_diagonal(apart, np.inf)  # a row is not its own neighbour
            nearest = np.concatenate([nearest, apart], axis=1)
            nearest = np.partition(nearest, k - 1, axis=1)[:, :k] if nearest.shape[1] > k else nearest
        found.append(nearest.max(axis=1))
    return np.concatenate(found)


def inside(points: Rows, manifold: Rows, reach: np.ndarray) -> np.ndarray:
    """bool (n,): whether each point lies in a ball around a row of the manifold."""
    found = []
    for block in points.blocks(_BLOCK):
        hit, start = np.zeros(len(block), dtype=bool), 0
        for against in manifold.blocks(_BLOCK):
            hit |= (_apart(block, against) <= reach[start : start + len(against)]).any(axis=1)
            start += len(against)
        found.append(hit)
    return np.concatenate(found)


def nearest(points: Rows, others: Rows) -> np.ndarray:
    """Distance of each point to the nearest of the others, (n,)."""
    found = [np.min([_apart(block, against).min(axis=1) for against in others.blocks(_BLOCK)], axis=0)
             for block in points.blocks(_BLOCK)]  # fmt: skip
    return np.sqrt(np.concatenate(found))


def _apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances (n, m), float64: equal rows must come out as equal as rounding allows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    found = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2.0 * (x @ y.T)
    return np.maximum(found, 0.0)
