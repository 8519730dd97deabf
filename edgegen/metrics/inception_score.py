"""Inception Score: how sure a classifier is of each image, and how varied its answers are; 1 to the number of classes.

Salimans et al., 2016, Improved Techniques for Training GANs, arXiv:1606.03498: exp(mean KL(p(y|x) || p(y))), the mean
over ten splits, as torch-fidelity splits. Only with Inception-v3 is it "the Inception Score". It knows nothing of real
images, and a network can be trained to please it: never alone in a gate (Barratt and Sharma, 2018, arXiv:1801.01973).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from edgegen import stats
from edgegen.errors import DataError
from edgegen.metrics._common import Batches, feature_name, feature_rows, too_few
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features
SPLITS = 10


def inception_score(
    reference: Batches | Rows | None,
    candidate: Batches | Rows,
    *,
    features: Any,
    seed: int = 0,
    splits: int = SPLITS,
    interval: bool = True,
) -> Measurement:
    """Inception Score of the candidate.

    Args:
        reference: not looked at (None is allowed); the score compares with nothing.
        candidate: batches of images (N, C, H, W) in 0..1, or features.
        features: `nn.features.FeatureExtractor` of a classifier (`head`).
        seed: of the order in which images are split, and of the bootstrap.
        splits: how many parts; fewer images than parts are one part each.
        interval: value x exp(bootstrap of the mean KL): its influence function is each image's own KL.
    Returns:
        Measurement without unit, higher is better; `samples` are the splits' scores. NaN when features are not finite.
    Raises:
        DataError: fewer than two images, or an extractor that is no classifier.
    """
    rows = feature_rows(candidate, features)
    if len(rows) < 2:
        raise DataError(f"inception_score needs at least two images, got {len(rows)}")
    splits = max(1, min(splits, len(rows)))
    conditions = {"n": len(rows), "seed": seed, "splits": splits, **feature_name(features)}
    conditions |= too_few("inception_score", len(rows))
    if not rows.finite():
        return Measurement("inception_score", "", float("nan"), direction="higher", conditions=conditions)
    order = np.random.RandomState(seed).permutation(len(rows))  # the legacy generator, as torch-fidelity's
    ends = [i * len(rows) // splits for i in range(splits + 1)]
    parts = [divergences(rows.only(order[a:b]), features) for a, b in itertools.pairwise(ends)]
    scores = [float(np.exp(part.mean())) for part in parts]
    value, bounds = float(np.mean(scores)), None
    if interval:
        centred = np.concatenate([part - part.mean() for part in parts])
        low, high = stats.mean_interval(centred, seed=seed)
        bounds = (value * float(np.exp(low)), value * float(np.exp(high)))
    return Measurement("inception_score", "", value, bounds, tuple(scores), "higher", conditions)


def divergences(rows: Rows, features: Any) -> np.ndarray:
    """KL(p(y|x) || p(y)) of each image, p(y) the mean over these images: (n,), natural logarithm."""
    mean, entropies = 0.0, []
    for block in rows.blocks():
        mean = mean + probabilities(block, features)[0].sum(axis=0) / len(rows)
    log_mean = np.log(np.maximum(mean, 1e-300))
    for block in rows.blocks():
        p, log_p = probabilities(block, features)
        entropies.append((p * (log_p - log_mean)).sum(axis=1))
    return np.concatenate(entropies)


def probabilities(pooled: np.ndarray, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """(p, log p) of the classes, float64 (n, classes), from pooled features.

    Raises:
        DataError: the extractor is no classifier.
    """
    if features.head is None:
        raise DataError(
            f"{features.name} gives features and no classes; take a classifier: cifar, mnist or inception"
        )
    logits = features.head(pooled).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.exp(log_p), log_p
