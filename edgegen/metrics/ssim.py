"""Structural similarity of images in 0..1, -1..1, mean over the images.

Wang et al., 2004, doi:10.1109/TIP.2003.819861: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, biased
(co)variances, mean over the positions where the window lies inside the image, and over channels.
"""

from __future__ import annotations

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, mean_of, per_image
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(reference: Batches, candidate: Batches, *, seed: int = 0) -> Measurement:
    """Mean of the images' SSIM.

    Args:
        reference: batches (N, C, H, W) in 0..1, H and W at least 11.
        candidate: the same shapes.
        seed: of the bootstrap.
    Returns:
        Measurement without unit, higher is better, with a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference, or images smaller than the window.
    """
    samples = per_image(image_ssim, reference, candidate)
    return mean_of("ssim", "", samples, seed=seed, direction="higher", window=f"gaussian {WINDOW}, sigma {SIGMA}")


def image_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, C, H, W) twice -> SSIM (N,)."""
    if min(a.shape[2:]) < WINDOW:
        raise DataError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {a.shape[2:]}")
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a = _smooth(a * a) - mean_a**2
    var_b = _smooth(b * b) - mean_b**2
    cov = _smooth(a * b) - mean_a * mean_b
    above = (2 * mean_a * mean_b + C1) * (2 * cov + C2)
    below = (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    return (above / below).mean(axis=(1, 2, 3))


def _smooth(x: np.ndarray) -> np.ndarray:
    """Separable Gaussian, valid positions only: (..., H, W) -> (..., H - 10, W - 10)."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    rows, columns = x.shape[-2] - WINDOW + 1, x.shape[-1] - WINDOW + 1
    down = sum(w * x[..., i : i + rows, :] for i, w in enumerate(weights))
    return np.asarray(sum(w * down[..., i : i + columns] for i, w in enumerate(weights)))
