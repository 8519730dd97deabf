"""Frechet distance between the features of two sets of images.

Heusel et al., 2017, arXiv:1706.08500: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Means and covariances are streamed
in float64. The extractor belongs to the figure: only with Inception-v3 is it "the FID". Small sets bias it upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, feature_name, pooled_features
from edgegen.types import Measurement

FULL_RANK = 2048
# The interval needs an eigendecomposition a resample and all features in memory: only where both are cheap.
_RESAMPLES, _MAX_FEATURES, _MAX_VALUES = 100, 256, 1 << 24


def fid(reference: Batches, candidate: Batches, *, features: Any, seed: int = 0, interval: bool = True) -> Measurement:
    """Frechet distance of pooled features.

    Args:
        reference: batches of images (N, C, H, W) in 0..1.
        candidate: batches of images; need not be as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the bootstrap.
        interval: give value +- 1.96 bootstrap standard errors, where there are at most 256 features (percentiles would
            not do: resampling repeats images, which moves every resample upwards).
    Returns:
        Measurement without unit, lower is better; NaN when features are not finite. `conditions["warning"]` says when
        there are fewer than 2,048 images.
    Raises:
        DataError: fewer than two images on a side.
    """
    a, b = Moments(), Moments()
    for moments, images in ((a, reference), (b, candidate)):
        for batch in pooled_features(images, features):
            moments.add(batch, keep=interval)
        if moments.n < 2:
            raise DataError(f"fid needs at least two images on each side, got {moments.n}")
    value = frechet(a.mean, a.covariance, b.mean, b.covariance)
    conditions = {"n": (a.n, b.n), "seed": seed, "implementation": "edgegen", **feature_name(features)}
    if min(a.n, b.n) < FULL_RANK:
        conditions["warning"] = (
            f"{min(a.n, b.n)} images, fewer than {FULL_RANK}: biased upwards, compare at equal n only"
        )
    spread = _spread(a, b, seed) if interval and np.isfinite(value) else None
    bounds = None if spread is None else (max(0.0, value - 1.96 * spread), value + 1.96 * spread)
    return Measurement("fid", "", value, bounds, direction="lower", conditions=conditions)


@dataclass
class Moments:
    """Streaming mean and scatter matrix (Chan et al., 1979); the rows themselves too while they are few."""

    n: int = 0
    mean: Any = 0.0
    scatter: Any = 0.0
    rows: list[np.ndarray] | None = None

    def add(self, batch: np.ndarray, *, keep: bool = False) -> None:
        """Take in features (n, D)."""
        batch = np.asarray(batch, dtype=np.float64)
        keep = keep and batch.shape[1] <= _MAX_FEATURES and (self.n + len(batch)) * batch.shape[1] <= _MAX_VALUES
        if keep and (self.n == 0 or self.rows is not None):
            self.rows = [*(self.rows or []), batch]
        else:
            self.rows = None
        own = batch.mean(axis=0)
        centred, shift, total = batch - own, own - self.mean, self.n + len(batch)
        self.scatter = self.scatter + centred.T @ centred + np.outer(shift, shift) * (self.n * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D)."""
        return np.atleast_2d(self.scatter / (self.n - 1))


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Frechet distance of two Gaussians; NaN when an entry is not finite.

    tr (Sa Sb)^(1/2) is the sum of the square roots of the eigenvalues of Sa^(1/2) Sb Sa^(1/2), which is symmetric and
    has no negative eigenvalues but rounding errors.
    """
    if not all(np.isfinite(part).all() for part in (mean_a, cov_a, mean_b, cov_b)):
        return float("nan")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.sqrt(np.maximum(inner, 0.0)).sum()
    shift = np.asarray(mean_a) - np.asarray(mean_b)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * trace)


def _spread(a: Moments, b: Moments, seed: int) -> float | None:
    """Bootstrap standard error, or None where the features were not kept."""
    if a.rows is None or b.rows is None:
        return None
    rng = np.random.default_rng(seed)
    sides = [np.concatenate(side.rows) for side in (a, b) if side.rows is not None]
    found = []
    for _ in range(_RESAMPLES):
        drawn = [side[rng.integers(0, len(side), len(side))] for side in sides]
        moments = [(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))) for rows in drawn]
        found.append(frechet(*moments[0], *moments[1]))
    return float(np.std(found, ddof=1))
