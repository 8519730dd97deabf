"""Corruptions of 8-bit images at fixed strength, each a pure function of (image, seed, number of the image).

Hendrycks and Dietterich, 2019, Benchmarking Neural Network Robustness to Common Corruptions, arXiv:1903.12261: noise,
blur, compression and contrast at the third of their five strengths, those of ImageNet-C, or of CIFAR-10-C for images
whose shorter side is under 96 pixels. Their own code draws other noise, so figures compare with edgegen's only.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np

from edgegen import images as imaging
from edgegen.errors import DataError

Corruption = Callable[[np.ndarray, np.random.Generator, bool], np.ndarray]


def noise(image: np.ndarray, rng: np.random.Generator, small: bool) -> np.ndarray:
    """Gaussian noise of 0.18 of the range (small images: 0.08)."""
    sigma = 255 * (0.08 if small else 0.18)
    return _rounded(image + rng.normal(0.0, sigma, image.shape))


def blur(image: np.ndarray, rng: np.random.Generator, small: bool) -> np.ndarray:
    """Gaussian blur of 3 pixels (small images: 0.7)."""
    return _smoothed(image, 0.7 if small else 3.0)


def jpeg(image: np.ndarray, rng: np.random.Generator, small: bool) -> np.ndarray:
    """JPEG of quality 15 (small images: 58)."""
    picture = imaging.pillow()
    buffer = io.BytesIO()
    grey = image.shape[2] == 1
    picture.fromarray(image[..., 0] if grey else image).save(buffer, "JPEG", quality=58 if small else 15)
    return np.asarray(picture.open(buffer)).reshape(image.shape)


def contrast(image: np.ndarray, rng: np.random.Generator, small: bool) -> np.ndarray:
    """A fifth of the contrast about each channel's mean (small images: 0.4)."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return _rounded((image - mean) * (0.4 if small else 0.2) + mean)


CORRUPTIONS: dict[str, Corruption] = {"noise": noise, "blur": blur, "jpeg": jpeg, "contrast": contrast}


def corrupted(image: np.ndarray, name: str, *, seed: int, number: int) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 of the same shape.

    Raises:
        DataError: not an 8-bit image, or no such corruption.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise DataError(f"corruptions take uint8 images (H, W, C), got {image.dtype} {image.shape}")
    if name not in CORRUPTIONS:
        raise DataError(f"unknown corruption {name!r}; there are: {', '.join(CORRUPTIONS)}")
    rng = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
    return CORRUPTIONS[name](image, rng, min(image.shape[:2]) < 96)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _smoothed(image: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian with mirrored edges."""
    reach = min(int(3 * sigma + 1), min(image.shape[:2]) - 1)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    values = np.pad(image.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width = image.shape[:2]
    down = sum(w * values[i : i + height] for i, w in enumerate(weights))
    return _rounded(np.asarray(sum(w * down[:, i : i + width] for i, w in enumerate(weights))))
