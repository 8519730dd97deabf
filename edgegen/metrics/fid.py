"""Frechet distance between the features of two sets of images.

Heusel et al., 2017, arXiv:1706.08500: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Means and covariances are streamed
in float64. The extractor belongs to the figure: only with Inception-v3 is it "the FID". Small sets bias it upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen.metrics._common import Batches, feature_name, too_few, two_sides, with_error
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features
FULL_RANK = 2048
# A bootstrap resample costs an eigendecomposition and all features in memory; where that is too much, whole groups of
# images are left out instead, which streams.
_RESAMPLES, _MAX_FEATURES, _MAX_VALUES, _GROUPS = 100, 256, 1 << 24, 10
_T_OF_GROUPS = 2.262  # Student's t for 95 %, 9 degrees of freedom


def fid(
    reference: Batches | Rows, candidate: Batches | Rows, *, features: Any, seed: int = 0, interval: bool = True
) -> Measurement:
    """Frechet distance of pooled features.

    Args:
        reference: batches of images (N, C, H, W) in 0..1.
        candidate: batches of images; need not be as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the bootstrap.
        interval: give value +- 1.96 bootstrap standard errors (percentiles would not do: resampling repeats images,
            which moves every resample upwards); with more than 256 features, the error of a delete-a-group jackknife.
            The interval says how much the value scatters; the bias of few images is not in it.
    Returns:
        Measurement without unit, lower is better; NaN when features are not finite. `conditions["warning"]` says when
        there are fewer than 2,048 images, or fewer than features.
    Raises:
        DataError: fewer than two images on a side.
    """
    a, b = two_sides("fid", reference, candidate, features)
    value = distance(a, b)
    n = min(len(a), len(b))
    conditions = {"n": (len(a), len(b)), "seed": seed, "implementation": "edgegen", **feature_name(features)}
    conditions |= too_few("fid", n)
    if n < a.width and "warning" not in conditions:
        conditions["warning"] = f"{n} images, fewer than the {a.width} features: biased upwards"
    bounds = None
    if interval and np.isfinite(value):
        cheap = a.width <= _MAX_FEATURES and (len(a) + len(b)) * a.width <= _MAX_VALUES
        conditions["interval"] = "bootstrap" if cheap else f"jackknife, {_GROUPS} groups"
        error = _bootstrap_error(a, b, seed) if cheap else _jackknife_error(a, b)
        bounds = with_error(value, error, least=0.0, t=1.96 if cheap else _T_OF_GROUPS)
    return Measurement("fid", "", value, bounds, direction="lower", conditions=conditions)


@dataclass
class Moments:
    """Streaming mean and scatter matrix (Chan et al., 1979), float64."""

    n: int = 0
    mean: Any = 0.0
    scatter: Any = 0.0

    def add(self, batch: np.ndarray) -> None:
        """Take in features (n, D)."""
        if not len(batch):
            return
        batch = np.asarray(batch, dtype=np.float64)
        own = batch.mean(axis=0)
        centred = batch - own
        self.merge(Moments(len(batch), own, centred.T @ centred))

    def merge(self, other: Moments) -> None:
        """Take in the moments of other rows."""
        shift, total = other.mean - self.mean, self.n + other.n
        apart = np.outer(shift, shift) * (self.n * other.n / total)
        self.scatter = self.scatter + other.scatter + apart
        self.mean = self.mean + shift * (other.n / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D)."""
        return np.atleast_2d(self.scatter / (self.n - 1))


def moments(rows: Rows) -> Moments:
    """Mean and covariance of all rows."""
    found = Moments()
    for block in rows.blocks():
        found.add(block)
    return found


def distance(a: Rows, b: Rows) -> float:
    """Frechet distance of two sets of rows."""
    of_a, of_b = moments(a), moments(b)
    return frechet(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance)


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


def _bootstrap_error(a: Rows, b: Rows, seed: int) -> float:
    rng = np.random.default_rng(seed)
    sides = [np.concatenate(list(side.blocks())).astype(np.float64) for side in (a, b)]
    found = []
    for _ in range(_RESAMPLES):
        drawn = [side[rng.integers(0, len(side), len(side))] for side in sides]
        pair = [(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))) for rows in drawn]
        found.append(frechet(*pair[0], *pair[1]))
    return float(np.std(found, ddof=1))


def _jackknife_error(a: Rows, b: Rows) -> float | None:
    """Standard error from leaving out every tenth of the images; None where there are too few for it."""
    if min(len(a), len(b)) < 3 * _GROUPS:
        return None
    found = []
    for group in range(_GROUPS):
        kept = [side.only(np.flatnonzero(np.arange(len(side)) % _GROUPS != group)) for side in (a, b)]
        found.append(distance(*kept))
    return float(np.sqrt((_GROUPS - 1) / _GROUPS * np.square(np.array(found) - np.mean(found)).sum()))
