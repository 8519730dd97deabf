"""Bad images: the share (0..1) that are black, flat, or not finite, though their references are none of that.

What FP16 overflow and wrong quantization ranges make: huggingface/optimum-quanto#231, leejet/stable-diffusion.cpp#1253.
"""

from __future__ import annotations

import numpy as np

from edgegen.metrics._common import Batches, mean_of, paired_images
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
KINDS = ("not finite", "black", "flat")
BLACK, FLAT = 4 / 255, 2 / 255  # largest value of a black image; largest difference inside a flat one


def bad_images(reference: Batches | None, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Share of candidates that are bad where the reference is not.

    Args:
        reference: batches (N, C, H, W) in 0..1, such as the teacher's; None: there are none, so nothing is excused.
        candidate: the same shapes.
        seed: of the bootstrap.
    Returns:
        Measurement in 0..1, lower is better, with a sample (0 or 1) an image; `conditions["kinds"]` counts each kind.
    Raises:
        DataError: other shapes or numbers of images than the reference.
    """
    if reference is None:
        parts = [kinds(np.asarray(b, np.float64)) for b in candidate if len(b)]
    else:
        parts = [np.where(kinds(a) == 0, kinds(b), 0) for a, b in paired_images(reference, candidate)]
    found = np.concatenate(parts or [np.zeros(0, int)])
    counts = {name: int((found == number).sum()) for number, name in enumerate(KINDS, 1)}
    return mean_of("bad_images", "share", [float(v > 0) for v in found], seed=seed, direction="lower", kinds=counts)


def kinds(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) in 0..1 -> (N,): 0 for a good image, else 1 + its place in `KINDS`."""
    flat = images.reshape(len(images), -1)
    finite = np.isfinite(flat).all(axis=1)
    with np.errstate(invalid="ignore"):
        black, even = flat.max(axis=1) <= BLACK, np.ptp(flat, axis=1) <= FLAT
    return np.where(~finite, 1, np.where(black, 2, np.where(even, 3, 0)))
