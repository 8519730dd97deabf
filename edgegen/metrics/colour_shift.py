"""Colour shift: how far the candidate's images move in mean colour, brightness taken out, in steps of 255.

The length of the change of the two mean chroma values (Cb, Cr of ITU-R BT.601). 0 for grey images.
"""

from __future__ import annotations

import numpy as np

from edgegen.metrics._common import Batches, mean_of, per_image
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
CHROMA = np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def colour_shift(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Mean over the images of the distance in mean chroma.

    Args:
        reference: batches (N, 1 or 3, H, W) in 0..1.
        candidate: the same shapes; NaN gives NaN.
        seed: of the bootstrap.
    Returns:
        Measurement in steps of 255, lower is better, with a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference.
    """
    samples = per_image(image_shift, reference, candidate)
    return mean_of("colour_shift", "/255", samples, seed=seed, direction="lower", chroma="BT.601")


def image_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, C, H, W) twice -> distance of mean chroma (N,), in steps of 255."""
    change = (b - a).mean(axis=(2, 3))
    if change.shape[1] != 3:
        return 0.0 * change.mean(axis=1)  # keeps NaN
    return 255.0 * np.sqrt(np.square(change @ CHROMA.T).sum(axis=1))
