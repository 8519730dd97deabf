"""Brightness shift: how much lighter (above 0) or darker the candidate's images are, in steps of 255.

INT8 builds whose ranges clip whites make images darker (OpenPPL/ppq#480). Luma by ITU-R BT.601.
"""

from __future__ import annotations

import numpy as np

from edgegen.metrics._common import Batches, mean_of, per_image
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
LUMA = np.array([0.299, 0.587, 0.114])


def brightness_shift(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Mean over the images of the change of mean luma.

    Args:
        reference: batches (N, 1 or 3, H, W) in 0..1.
        candidate: the same shapes; NaN gives NaN.
        seed: of the bootstrap.
    Returns:
        Measurement in steps of 255; 0 is best and both signs count (`conditions["two_sided"]`), a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference.
    """
    samples = per_image(image_shift, reference, candidate)
    return mean_of("brightness_shift", "/255", samples, seed=seed, direction="lower", two_sided=True, luma="BT.601")


def image_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, C, H, W) twice -> change of mean luma (N,), in steps of 255."""
    change = (b - a).mean(axis=(2, 3))
    return 255.0 * (change @ LUMA if change.shape[1] == 3 else change.mean(axis=1))
