"""Recall: the share of real images (0..1) that lie among the generated ones, in features.

Kynkäänniemi et al., 2019, arXiv:1904.06991. Falls when kinds of images are never made; blind to wrong ones (see
precision).
"""

from __future__ import annotations

from typing import Any

from edgegen.metrics._common import Batches
from edgegen.metrics._neighbours import share_inside
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

TAKES = "features"  # two sets of pooled features


def recall(
    reference: Batches | Rows, candidate: Batches | Rows, *, features: Any, seed: int = 0, k: int = 3
) -> Measurement:
    """Share of reference images inside the candidate's manifold.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or features.
        candidate: the same of the candidate; as many, where figures are compared.
        features: `nn.features.FeatureExtractor`.
        seed: of the bootstrap.
        k: a ball reaches to the k-th nearest neighbour.
    Returns:
        Measurement in 0..1, higher is better, with a sample (0 or 1) a reference image.
    Raises:
        DataError: no more than k images on a side.
    """
    return share_inside("recall", candidate, reference, features, seed, k)
