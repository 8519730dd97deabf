"""Top-1 accuracy: the share of images (0..1) whose largest logit is the label's."""

from __future__ import annotations

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, mean_of, paired
from edgegen.types import Measurement

TAKES = "labels"  # logits against labels


def top1(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Share of right answers.

    Args:
        reference: batches of labels (N,), int.
        candidate: batches of logits (N, classes); a row with NaN or infinity is a wrong answer.
        seed: of the bootstrap.
    Returns:
        Measurement in 0..1, higher is better, with a sample (0 or 1) an image.
    Raises:
        DataError: other shapes, or different numbers of labels and logits.
    """
    samples: list[float] = []
    for labels, logits in paired(reference, candidate):
        if labels.ndim != 1 or logits.ndim != 2:
            raise DataError(f"labels are {labels.shape}, logits {logits.shape}; allowed are (N,) and (N, classes)")
        samples += [float(right) for right in answers(logits) == labels]
    return mean_of("top1", "share", samples, seed=seed, direction="higher")


def answers(logits: np.ndarray) -> np.ndarray:
    """Index of the largest logit of each row; -1, which is no class, where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, np.argmax(logits, axis=1), -1)
