"""Kernel distance between the features of two sets of images: unbiased, so it serves small sets too.

Binkowski et al., 2018, arXiv:1801.01401: squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3, the mean over
random subsets. Subsets are drawn as torch-fidelity draws them, so the same features and seed give the same figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, feature_name, pooled_features
from edgegen.types import Measurement

_RESAMPLES = 200
_INTERVAL_IMAGES = 1024  # kernels of this many images a side bound the interval's time and memory


def kid(
    reference: Batches,
    candidate: Batches,
    *,
    features: Any,
    seed: int = 0,
    subsets: int = 100,
    subset_size: int = 1000,
) -> Measurement:
    """Squared MMD of pooled features (held in memory: 4 byte x images x features).

    Args:
        reference: batches of images (N, C, H, W) in 0..1.
        candidate: batches of images; need not be as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the subsets and of the bootstrap.
        subsets: how many subsets are averaged.
        subset_size: images of each side in a subset; fewer where there are fewer.
    Returns:
        Measurement without unit, lower is better, may be slightly negative; `samples` are the subsets' values, the
        interval is value +- 1.96 bootstrap standard errors at the full number of images. NaN when features are not
        finite.
    Raises:
        DataError: fewer than two images on a side.
    """
    a, b = (_collected(images, features) for images in (reference, candidate))
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise DataError(f"kid needs at least two images on each side, got {len(a)} and {len(b)}")
    conditions = {
        "n": (len(a), len(b)),
        "seed": seed,
        "subsets": subsets,
        "subset_size": size,
        "kernel": "(x.y / D + 1)^3",
        **feature_name(features),
    }
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Measurement("kid", "", float("nan"), direction="lower", conditions=conditions)
    values = subset_values(a, b, seed=seed, subsets=subsets, size=size)
    value, spread = float(np.mean(values)), standard_error(a, b, seed=seed)
    bounds = (value - 1.96 * spread, value + 1.96 * spread)
    return Measurement("kid", "", value, bounds, tuple(values), "lower", conditions)


def subset_values(a: np.ndarray, b: np.ndarray, *, seed: int, subsets: int, size: int) -> list[float]:
    """Unbiased squared MMD of `subsets` random subsets of `size` rows of a (n, D) and b (m, D)."""
    rng = np.random.RandomState(seed)  # the legacy generator: it makes subsets equal to torch-fidelity's
    found = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), size, replace=False)].astype(np.float64)
        found.append(_mmd2(_kernel(x, x), _kernel(y, y), _kernel(x, y)))
        if size == len(a) == len(b):  # every further subset is the same set
            return found * subsets
    return found


def standard_error(a: np.ndarray, b: np.ndarray, *, seed: int) -> float:
    """Bootstrap standard error of the squared MMD at the full numbers of rows.

    Rows are resampled as weights, and pairs of a row with its own copies are left out: counted in, they would make
    every resample larger. With more than 1,024 rows a side, 1,024 are resampled and the error is scaled to n.
    """
    rng = np.random.default_rng(seed)
    n, m = min(len(a), _INTERVAL_IMAGES), min(len(b), _INTERVAL_IMAGES)
    x = a[rng.choice(len(a), n, replace=False)].astype(np.float64)
    y = b[rng.choice(len(b), m, replace=False)].astype(np.float64)
    in_x = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float64)
    in_y = rng.multinomial(m, np.full(m, 1 / m), size=_RESAMPLES).astype(np.float64)
    cross = ((in_x @ _kernel(x, y)) * in_y).sum(axis=1) / (n * m)
    found = _within(in_x, _kernel(x, x)) + _within(in_y, _kernel(y, y)) - 2.0 * cross
    return float(np.std(found, ddof=1)) * float(np.sqrt(min(n, m) / min(len(a), len(b))))


def _within(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted mean of the kernel over pairs of different rows: (resamples, n), (n, n) -> (resamples,)."""
    kernel = kernel.copy()
    np.fill_diagonal(kernel, 0.0)
    pairs = weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1)
    return ((weights @ kernel) * weights).sum(axis=1) / np.maximum(pairs, 1.0)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _mmd2(within_x: np.ndarray, within_y: np.ndarray, cross: np.ndarray) -> float:
    n = len(cross)
    same = (within_x.sum() - np.trace(within_x) + within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(same - 2.0 * cross.mean())


def _collected(images: Batches, features: Any) -> np.ndarray:
    parts = [part.astype(np.float32) for part in pooled_features(images, features)]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
