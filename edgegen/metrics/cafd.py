"""Class-aware Frechet distance: one distance a class, in the features of a classifier of the images' own domain.

Liu et al., 2018, An Improved Evaluation Framework for Generative Adversarial Networks, arXiv:1803.07474: features of
all images together are not Gaussian, those of one class nearly are. Each image counts for every class by the
classifier's probability; the figure is the mean of the classes' distances. A class that is never made shows: its few
weights lie far from it. `conditions` hold the classes' distances and how often each class occurs on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, feature_name, too_few, two_sides, with_error
from edgegen.metrics._rows import Rows
from edgegen.metrics.fid import frechet
from edgegen.metrics.inception_score import probabilities
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features
_GROUPS, _T_OF_GROUPS = 10, 2.262  # delete-a-group jackknife: Student's t for 95 %, 9 degrees of freedom
_LARGEST = 1 << 24  # values of all classes' covariances, 128 MiB a side


def cafd(
    reference: Batches | Rows, candidate: Batches | Rows, *, features: Any, seed: int = 0, interval: bool = True
) -> Measurement:
    """Mean over the classes of the Frechet distance of features weighted by class probability.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or features.
        candidate: the same of the candidate; need not be as many.
        features: `nn.features.FeatureExtractor` of a classifier (`head`) with few classes: cifar or mnist.
        seed: not used, there is no chance in it; recorded.
        interval: give value +- 2.26 standard errors of a delete-a-group jackknife (ten groups).
    Returns:
        Measurement without unit, lower is better; NaN when features are not finite.
    Raises:
        DataError: fewer than two images on a side, an extractor that is no classifier, or one with too many classes.
    """
    a, b = two_sides("cafd", reference, candidate, features)
    conditions = {"n": (len(a), len(b)), "seed": seed, **feature_name(features), **too_few("cafd", min(len(a), len(b)))}
    if not (a.finite() and b.finite()):
        return Measurement("cafd", "", float("nan"), direction="lower", conditions=conditions)
    apart, shares = distances(a, b, features)
    conditions |= {"classes": [float(v) for v in apart], "class_shares": shares}
    value = float(np.mean(apart))
    error = _jackknife(a, b, features) if interval and min(len(a), len(b)) >= 3 * _GROUPS else None
    bounds = with_error(value, error, least=0.0, t=_T_OF_GROUPS)
    return Measurement("cafd", "", value, bounds, direction="lower", conditions=conditions)


def distances(a: Rows, b: Rows, features: Any) -> tuple[np.ndarray, tuple[list[float], list[float]]]:
    """Frechet distance of each class, and each class' share of the images on both sides."""
    sides = [class_moments(rows, features) for rows in (a, b)]
    (weight_a, mean_a, cov_a), (weight_b, mean_b, cov_b) = sides
    pairs = zip(mean_a, cov_a, mean_b, cov_b, strict=True)
    shares = [[round(float(v), 4) for v in weight / weight.sum()] for weight in (weight_a, weight_b)]
    return np.array([frechet(*pair) for pair in pairs]), (shares[0], shares[1])


def class_moments(rows: Rows, features: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight (K,), mean (K, D) and covariance (K, D, D) of each class; streamed, float64, about a common centre."""
    centre = sum(block.astype(np.float64).sum(axis=0) for block in rows.blocks()) / len(rows)
    weight: Any = 0.0
    first: Any = 0.0
    second: Any = 0.0
    for block in rows.blocks():
        p, _ = probabilities(block, features)
        if p.shape[1] * rows.width**2 > _LARGEST:
            raise DataError(
                f"cafd: {features.name} has {p.shape[1]} classes and {rows.width} features, too many for a covariance a"
                " class; take cifar or mnist"
            )
        x = block.astype(np.float64) - centre
        weight = weight + p.sum(axis=0)
        first = first + p.T @ x
        second = second + np.stack([(x * column[:, None]).T @ x for column in p.T])
    weight = np.maximum(weight, 1e-12)
    mean = first / weight[:, None]
    return weight, mean + centre, second / weight[:, None, None] - mean[:, :, None] * mean[:, None, :]


def _jackknife(a: Rows, b: Rows, features: Any) -> float:
    found = []
    for group in range(_GROUPS):
        kept = [side.only(np.flatnonzero(np.arange(len(side)) % _GROUPS != group)) for side in (a, b)]
        found.append(float(np.mean(distances(kept[0], kept[1], features)[0])))
    return float(np.sqrt((_GROUPS - 1) / _GROUPS * np.square(np.array(found) - np.mean(found)).sum()))
