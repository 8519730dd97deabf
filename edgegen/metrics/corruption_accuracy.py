"""Corruption accuracy: mean top-1 (0..1) on images with noise, blur, JPEG and low contrast, at fixed seeds.

Compression can keep top-1 on clean images and lose it here (Hooker et al., 2020, arXiv:1911.05248). See `_corruptions`.
"""

from __future__ import annotations

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, mean_of, paired
from edgegen.metrics._corruptions import CORRUPTIONS
from edgegen.metrics.top1 import answers
from edgegen.types import Measurement

TAKES = "corruptions"  # logits on corrupted images against labels


def corruption_accuracy(
    reference: Batches, candidate: Batches, *, seed: int = 0, corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
) -> Measurement:
    """Share of right answers, mean over the corruptions.

    Args:
        reference: batches of labels (N,), int.
        candidate: batches of logits (N, corruptions, classes); a row that is not finite is a wrong answer.
        seed: of the bootstrap.
        corruptions: names, in the order of the second axis.
    Returns:
        Measurement in 0..1, higher is better, with a sample an image; `conditions["each"]` has every corruption's own.
    Raises:
        DataError: other shapes, or different numbers of labels and logits.
    """
    rows = []
    for labels, logits in paired(reference, candidate):
        if labels.ndim != 1 or logits.ndim != 3 or logits.shape[1] != len(corruptions):
            raise DataError(
                f"labels are {labels.shape}, logits {logits.shape}; allowed are (N,) and (N, {len(corruptions)},"
                " classes), one row of logits for each corruption"
            )
        found = answers(logits.reshape(-1, logits.shape[2])).reshape(logits.shape[:2])
        rows.append((found == labels[:, None]).astype(float))
    right = np.concatenate(rows) if rows else np.zeros((0, len(corruptions)))
    each = {name: float(column.mean()) for name, column in zip(corruptions, right.T, strict=True) if len(right)}
    samples = [float(v) for v in right.mean(axis=1)]
    return mean_of("corruption_accuracy", "share", samples, seed=seed, direction="higher", each=each)
