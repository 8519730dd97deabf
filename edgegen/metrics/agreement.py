"""Agreement: the share of images (0..1) on which two classifiers give the same answer."""

from __future__ import annotations

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, mean_of, paired
from edgegen.metrics.top1 import answers
from edgegen.types import Measurement

TAKES = "logits"  # logits against logits


def agreement(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Share of equal answers.

    Args:
        reference: batches of the teacher's logits (N, classes).
        candidate: batches of the student's logits, same shapes; a row with NaN or infinity disagrees.
        seed: of the bootstrap.
    Returns:
        Measurement in 0..1, higher is better, with a sample (0 or 1) an image.
    Raises:
        DataError: other shapes or numbers of rows than the teacher's.
    """
    samples: list[float] = []
    for a, b in paired(reference, candidate):
        if a.shape != b.shape or a.ndim != 2:
            raise DataError(f"logits are {a.shape} and {b.shape}; both must be (N, classes)")
        answer = answers(b)
        samples += [float(same) for same in (answers(a) == answer) & (answer >= 0)]
    return mean_of("agreement", "share", samples, seed=seed, direction="higher")
