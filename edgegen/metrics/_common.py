"""What the metrics share: walking two streams of batches together, and means with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from edgegen import stats
from edgegen.errors import DataError
from edgegen.types import Measurement

Batches = Iterable[np.ndarray]


def paired(reference: Batches, candidate: Batches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Equal-sized pairs of batches, whatever the batch sizes of the two streams are.

    Raises:
        DataError: one stream holds more samples than the other.
    """
    left, right = iter(reference), iter(candidate)
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    while True:
        a = a if a is not None and len(a) else _following(left)
        b = b if b is not None and len(b) else _following(right)
        if a is None or b is None:
            break
        n = min(len(a), len(b))
        yield a[:n], b[:n]
        a, b = a[n:], b[n:]
    if a is not None or b is not None:
        raise DataError("reference and candidate hold different numbers of samples; compare outputs of the same inputs")


def _following(batches: Iterator[np.ndarray]) -> np.ndarray | None:
    return next((np.asarray(batch) for batch in batches if len(batch)), None)


def paired_images(reference: Batches, candidate: Batches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`paired`, as float64 images (n, C, H, W) in 0..1.

    Raises:
        DataError: shapes differ or are not images.
    """
    for a, b in paired(reference, candidate):
        if a.shape != b.shape or a.ndim != 4:
            raise DataError(f"images of shape {a.shape} and {b.shape}; both must be (N, C, H, W) of one shape")
        yield a.astype(np.float64), b.astype(np.float64)


def mean_of(
    name: str,
    unit: str,
    samples: list[float],
    *,
    seed: int,
    direction: str,
    **conditions: Any,
) -> Measurement:
    """Mean of per-sample values with its bootstrap interval. A NaN sample makes value and interval NaN.

    Raises:
        DataError: no samples.
    """
    if not samples:
        raise DataError(f"{name} needs at least one sample, got none")
    return Measurement(
        name,
        unit,
        float(np.mean(samples)),
        stats.mean_interval(samples, seed=seed),
        tuple(samples),
        direction,
        {"n": len(samples), "seed": seed, **conditions},
    )


def per_image(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], reference: Batches, candidate: Batches
) -> list[float]:
    """score(a, b) -> (n,) over all pairs of image batches."""
    return [float(v) for a, b in paired_images(reference, candidate) for v in score(a, b)]


def feature_name(features: Any) -> dict[str, str]:
    """Conditions that name a feature extractor and its weights."""
    return {"extractor": features.name, "extractor_sha256": features.sha256}


def pooled_features(images: Batches, features: Any) -> Iterator[np.ndarray]:
    """Pooled features (n, D), float64, of each batch of images (n, C, H, W) in 0..1."""
    for batch in images:
        if len(batch):
            yield np.asarray(features(np.asarray(batch, dtype=np.float32))[1], dtype=np.float64)
