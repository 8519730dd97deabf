"""Precision: the share of generated images (0..1) that lie among the real ones, in features.

Kynkäänniemi et al., 2019, arXiv:1904.06991. Falls when images look wrong; blind to what is never made (see recall).
"""

from __future__ import annotations

from typing import Any

from edgegen.metrics._common import Batches
from edgegen.metrics._neighbours import share_inside
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features


def precision(
    reference: Batches | Rows, candidate: Batches | Rows, *, features: Any, seed: int = 0, k: int = 3
) -> Measurement:
    """Share of candidates inside the reference's manifold.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or features.
        candidate: the same of the candidate; as many, where figures are compared.
        features: `nn.features.FeatureExtractor`.
        seed: of the bootstrap.
        k: a ball reaches to the k-th nearest neighbour.
    Returns:
        Measurement in 0..1, higher is better, with a sample (0 or 1) an image.
    Raises:
        DataError: no more than k images on a side.
    """
    return share_inside("precision", reference, candidate, features, seed, k)
