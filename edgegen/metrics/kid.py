"""Kernel distance between the features of two sets of images: unbiased, so it serves small sets too.

Binkowski et al., 2018, arXiv:1801.01401: squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3, the mean over
random subsets. Subsets are drawn as torch-fidelity draws them, so the same features and seed give the same figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics import _mmd
from edgegen.metrics._common import Batches, feature_name, feature_rows, two_sides, with_error
from edgegen.metrics._rows import Rows
from edgegen.nn.mmd import cubic as kernel
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features
SUBSETS, SUBSET_SIZE = 100, 1000


def kid(
    reference: Batches | Rows,
    candidate: Batches | Rows,
    *,
    features: Any,
    seed: int = 0,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    interval: bool = True,
) -> Measurement:
    """Squared MMD of pooled features, which lie on disk (4 byte x images x features).

    Args:
        reference: batches of images (N, C, H, W) in 0..1.
        candidate: batches of images; need not be as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the subsets.
        subsets: how many subsets are averaged.
        subset_size: images of each side in a subset; fewer where there are fewer.
        interval: give value +- 1.96 standard errors, from the variance of the U-statistic.
    Returns:
        Measurement without unit, lower is better, may be slightly negative; `samples` are the subsets' values. NaN when
        features are not finite.
    Raises:
        DataError: fewer than two images on a side.
    """
    a, b = two_sides("kid", reference, candidate, features)
    size = min(subset_size, len(a), len(b))
    conditions = {
        "n": (len(a), len(b)),
        "seed": seed,
        "subsets": subsets,
        "subset_size": size,
        "kernel": "(x.y / D + 1)^3",
        **feature_name(features),
    }
    if not (a.finite() and b.finite()):
        return Measurement("kid", "", float("nan"), direction="lower", conditions=conditions)
    values = subset_values(a, b, seed=seed, subsets=subsets, size=size)
    value = float(np.mean(values))
    bounds = with_error(value, standard_error(a, b, seed=seed, subsets=subsets, size=size)) if interval else None
    return Measurement("kid", "", value, bounds, tuple(values), "lower", conditions)


def change(
    reference: Batches | Rows, before: Batches | Rows, after: Batches | Rows, *, features: Any, seed: int = 0
) -> Measurement:
    """KID of `after` less KID of `before`, made from the same inputs in the same order, with the paired interval.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or features.
        before: the teacher's images.
        after: the student's, as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the subsets.
    Returns:
        Measurement "kid change", above 0 is farther from the reference than the teacher; NaN when features are not
        finite.
    Raises:
        DataError: fewer than two images on a side, or other numbers of images before and after.
    """
    a, b = two_sides("kid", reference, before, features)
    c = feature_rows(after, features)
    if len(b) != len(c):
        raise DataError(f"kid: {len(b)} images before and {len(c)} after; compare outputs of the same inputs")
    values = [kid(a, side, features=features, seed=seed, interval=False) for side in (b, c)]
    value = values[1].value - values[0].value
    bounds = None
    if np.isfinite(value):
        size = values[1].conditions["subset_size"]
        bounds = with_error(value, _mmd.change_error(a, b, c, kernel, seed=seed, subsets=SUBSETS, size=size))
    conditions = {**values[1].conditions, "paired": True}
    return Measurement("kid change", "", value, bounds, direction="lower", conditions=conditions)


def subset_values(a: Any, b: Any, *, seed: int, subsets: int, size: int) -> list[float]:
    """Unbiased squared MMD of `subsets` random subsets of `size` rows of a (n, D) and b (m, D)."""
    return _mmd.subset_values(a, b, kernel, seed=seed, subsets=subsets, size=size)


def standard_error(a: Any, b: Any, *, seed: int, subsets: int = 1, size: int = 0) -> float:
    """Standard error of the figure over new draws of both sides."""
    return _mmd.standard_error(a, b, kernel, seed=seed, subsets=subsets, size=size)
