"""What the metrics share: walking two streams of batches together, and means with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from edgegen import stats
from edgegen.errors import DataError
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

Batches = Iterable[np.ndarray]
_VALUES_AT_ONCE = 3 * 256 * 256  # of a side: what figures are computed from is many times its size, and cache is small


def paired(reference: Batches, candidate: Batches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Equal-sized pairs of batches, whatever the batch sizes of the two streams are; of large images, few at a time.

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
        n = min(len(a), len(b), max(1, _VALUES_AT_ONCE // max(1, a[0].size)))
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
    """Conditions that name a feature extractor, its weights, and what it does to images before it sees them."""
    return {
        "extractor": features.name,
        "extractor_sha256": features.sha256,
        "resize": features.resize,
        "pixels": features.pixels,
    }


def feature_rows(images: Batches | Rows, features: Any) -> Rows:
    """Pooled features of all images (n, C, H, W) in 0..1, on disk; `Rows` that were made before are taken as they are.

    Raises:
        DataError: rows of another extractor.
    """
    if isinstance(images, Rows):
        if images.label and images.label != features.sha256:
            raise DataError(f"these features are not of {features.name}: its weights have another hash; make them anew")
        return images
    pooled = (features(np.asarray(batch, dtype=np.float32))[1] for batch in images if len(batch))
    return Rows.of(pooled, features.sha256)


def two_sides(name: str, reference: Batches | Rows, candidate: Batches | Rows, features: Any) -> tuple[Rows, Rows]:
    """`feature_rows` of both sides.

    Raises:
        DataError: fewer than two images on a side, or features of different widths.
    """
    a, b = feature_rows(reference, features), feature_rows(candidate, features)
    if min(len(a), len(b)) < 2:
        raise DataError(f"{name} needs at least two images on each side, got {len(a)} and {len(b)}")
    if a.width != b.width:
        raise DataError(f"{name}: features of {a.width} and {b.width} values; both sides need one extractor")
    return a, b


def too_few(name: str, n: int) -> dict[str, str]:
    """{"warning": text} where a metric is given fewer images than it needs, else {}."""
    needed, why = FEWEST.get(name, (0, ""))
    return {"warning": f"{n} images, fewer than {needed}: {why}"} if n < needed else {}


# What a metric needs, and what goes wrong below it. KID and CMMD are unbiased at every number: their interval says all.
FEWEST = {
    "fid": (2048, "biased upwards, compare at equal n only; KID decides"),
    "cafd": (2048, "biased upwards, compare at equal n only; KID decides"),
    "inception_score": (5000, "biased downwards, compare at equal n only"),
    "precision": (1000, "the neighbourhoods of few images are wide; compare at equal n only"),
    "recall": (1000, "the neighbourhoods of few images are wide; compare at equal n only"),
}


def with_error(value: float, error: float | None, *, least: float | None = None, t: float = 1.96) -> Any:
    """(value - t error, value + t error), no lower than `least`; None without an error or a finite value."""
    if error is None or not np.isfinite([value, error]).all():
        return None
    low = value - t * error
    return (low if least is None else max(least, low)), value + t * error
