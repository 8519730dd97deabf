"""Peak signal-to-noise ratio, dB: 10 log10(1 / MSE) of images in 0..1, mean over the images."""

from __future__ import annotations

import numpy as np

from edgegen.metrics._common import Batches, mean_of, per_image
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
SMALLEST_MSE = 1e-10  # equal images give 100 dB, not infinity: the mean stays a number


def psnr(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Mean of the images' PSNR.

    Args:
        reference: batches (N, C, H, W) in 0..1.
        candidate: the same shapes; NaN gives NaN.
        seed: of the bootstrap.
    Returns:
        Measurement in dB, higher is better, with a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference.
    """
    return mean_of("psnr", "dB", per_image(image_psnr, reference, candidate), seed=seed, direction="higher", peak=1.0)


def image_psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, C, H, W) twice -> dB (N,)."""
    return decibels(np.square(a - b).mean(axis=(1, 2, 3)))


def decibels(mse: np.ndarray) -> np.ndarray:
    """Mean squared errors at a peak of 1 as dB, 100 at most."""
    return -10.0 * np.log10(np.maximum(mse, SMALLEST_MSE))
