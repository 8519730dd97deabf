"""PSNR of the luminance alone, dB: what papers on super-resolution report, as the eye sees detail there.

Y of ITU-R BT.601 in studio range (16 to 235), as in the papers' own scripts; the peak is 255. No border is cut off.
"""

from __future__ import annotations

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, mean_of, per_image
from edgegen.metrics.psnr import decibels
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
STUDIO_LUMA = np.array([65.481, 128.553, 24.966]) / 255.0


def luminance_psnr(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Mean of the images' PSNR in luminance.

    Args:
        reference: batches (N, 1 or 3, H, W) in 0..1; one channel is luminance already, of full range.
        candidate: the same shapes; NaN gives NaN.
        seed: of the bootstrap.
    Returns:
        Measurement in dB, higher is better, with a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference, or neither 1 nor 3 channels.
    """
    samples = per_image(image_luminance_psnr, reference, candidate)
    return mean_of("luminance_psnr", "dB", samples, seed=seed, direction="higher", peak=1.0, luma="BT.601, 16..235")


def image_luminance_psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, 1 or 3, H, W) twice -> dB (N,)."""
    if a.shape[1] not in (1, 3):
        raise DataError(f"luminance needs grey or RGB images, got {a.shape[1]} channels")
    change = np.einsum("nchw,c->nhw", b - a, STUDIO_LUMA) if a.shape[1] == 3 else (b - a)[:, 0]
    return decibels(np.square(change).mean(axis=(1, 2)))
