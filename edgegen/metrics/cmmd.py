"""CMMD: kernel distance with a Gaussian kernel between image embeddings, CLIP's by default of the paper.

Jayasumana et al., 2024, Rethinking FID: Towards a Better Evaluation Metric for Image Generation, arXiv:2401.09603:
1000 x squared MMD of embeddings of length 1, k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma 10. Any extractor serves; a
figure compares only with figures of the same one. The estimate is the unbiased one; the authors' published code keeps
the pairs of an image with itself, which adds about 1000 (1 - mean k) (1/n + 1/m): `biased=True` gives that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.metrics import _mmd
from edgegen.metrics._common import Batches, feature_name, two_sides, with_error
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features
SIGMA, SCALE = 10.0, 1000.0
_BLOCK = 1024


def cmmd(
    reference: Batches | Rows,
    candidate: Batches | Rows,
    *,
    features: Any,
    seed: int = 0,
    biased: bool = False,
    interval: bool = True,
) -> Measurement:
    """1000 x squared MMD of embeddings scaled to length 1.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or features.
        candidate: the same of the candidate; need not be as many.
        features: `nn.features.FeatureExtractor`.
        seed: of the images on which the error is estimated.
        biased: as the authors' code does it.
        interval: give value +- 1.96 standard errors.
    Returns:
        Measurement without unit, lower is better, may be slightly negative; NaN when features are not finite.
    Raises:
        DataError: fewer than two images on a side.
    """
    a, b = two_sides("cmmd", reference, candidate, features)
    conditions = {
        "n": (len(a), len(b)),
        "seed": seed,
        "kernel": f"gaussian, sigma {SIGMA:g}, embeddings of length 1, x {SCALE:g}",
        "estimate": "biased, as the authors' code" if biased else "unbiased",
        **feature_name(features),
    }
    if not (a.finite() and b.finite()):
        return Measurement("cmmd", "", float("nan"), direction="lower", conditions=conditions)
    value = _within(a, biased) + _within(b, biased) - 2.0 * _sum(a, b) / (len(a) * len(b))
    bounds = with_error(SCALE * value, SCALE * _mmd.standard_error(a, b, kernel, seed=seed)) if interval else None
    return Measurement("cmmd", "", SCALE * value, bounds, direction="lower", conditions=conditions)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k - 1 of all pairs of rows, scaled to length 1: the 1 drops out of the distance, and takes digits with it."""
    cosine = unit(x) @ unit(y).T
    return np.expm1((np.minimum(cosine, 1.0) - 1.0) / SIGMA**2)  # |x - y|^2 = 2 - 2 cosine


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    x = x.astype(np.float64)
    return x / np.maximum(np.sqrt(np.square(x).sum(axis=1, keepdims=True)), 1e-12)


def _within(rows: Rows, biased: bool) -> float:
    """Mean of the kernel over pairs of different rows; with `biased`, over all pairs. A row with itself counts 0."""
    return _sum(rows, rows) / (len(rows) * (len(rows) - (not biased)))


def _sum(a: Rows, b: Rows) -> float:
    return float(sum(kernel(x, y).sum() for x in a.blocks(_BLOCK) for y in b.blocks(_BLOCK)))
