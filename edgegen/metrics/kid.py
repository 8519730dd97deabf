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
_WHOLE_KERNEL_IMAGES = 2500  # up to here all subsets share one kernel (150 MB), which is much faster
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
    draws = [[rng.choice(len(side), size, replace=False) for side in (a, b)] for _ in range(subsets)]
    if max(len(a), len(b)) <= _WHOLE_KERNEL_IMAGES:
        in_a, in_b = (_weights([pair[side] for pair in draws], len(rows)) for side, rows in enumerate((a, b)))
        return [float(v) for v in _weighted_mmd2(a.astype(np.float64), b.astype(np.float64), in_a, in_b)]
    one, found = np.ones((1, size)), []
    for i, j in draws:
        found += [float(v) for v in _weighted_mmd2(a[i].astype(np.float64), b[j].astype(np.float64), one, one)]
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
    found = _weighted_mmd2(x, y, in_x, in_y)
    return float(np.std(found, ddof=1)) * float(np.sqrt(min(n, m) / min(len(a), len(b))))


def _weights(draws: list[np.ndarray], rows: int) -> np.ndarray:
    """Drawn row numbers -> (draws, rows) with 1 where a row was drawn."""
    found = np.zeros((len(draws), rows))
    for weights, drawn in zip(found, draws, strict=True):
        weights[drawn] = 1.0
    return found


def _weighted_mmd2(x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD of each weighting: x (n, D), y (m, D), weights (k, n) and (k, m) -> (k,)."""
    cross = ((in_x @ _kernel(x, y)) * in_y).sum(axis=1) / (in_x.sum(axis=1) * in_y.sum(axis=1))
    return _within(in_x, _kernel(x, x)) + _within(in_y, _kernel(y, y)) - 2.0 * cross


def _within(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted mean of the kernel over pairs of different rows: (k, n), (n, n) -> (k,). Clears the diagonal."""
    np.fill_diagonal(kernel, 0.0)
    pairs = weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1)
    return ((weights @ kernel) * weights).sum(axis=1) / np.maximum(pairs, 1.0)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # several times faster than ** 3


def _collected(images: Batches, features: Any) -> np.ndarray:
    parts = [part.astype(np.float32) for part in pooled_features(images, features)]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
