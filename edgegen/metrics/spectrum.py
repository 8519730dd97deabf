"""Spectrum distance, dB: how far the power at each spatial frequency lies from that of the reference images.

Durall et al., 2020, Watch your Up-Convolution, arXiv:2003.01826: the power spectrum averaged over all directions shows
block and checkerboard artefacts, which sit at fixed high frequencies, and blur, which takes power away there. Distance:
root mean square over the frequencies of the difference in dB of the sets' mean power. The sets need not be paired.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.metrics._common import Batches, two_sides, with_error
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement

if TYPE_CHECKING:
    from edgegen.nn.features import FeatureExtractor

TAKES = "spectra"  # two sets of radial spectra
_LEAST_POWER = 1e-12  # of an image in 0..1; an 8-bit step in one of a million pixels
_RESAMPLES = 200


def spectrum(
    reference: Batches | Rows, candidate: Batches | Rows, *, seed: int = 0, interval: bool = True, features: Any = None
) -> Measurement:
    """Distance of the mean radial power spectra.

    Args:
        reference: batches of images (N, C, H, W) in 0..1, or the rows that `extractor()` made of them.
        candidate: images of the same size; need not be as many.
        seed: of the bootstrap.
        interval: give value +- 1.96 bootstrap standard errors.
        features: not used: a spectrum needs no network.
    Returns:
        Measurement in dB, lower is better; `conditions["peak_db"]` is the largest difference (above 0: the candidate
        has more power) and `peak_frequency` where it is, in cycles a pixel: 0.5 is a pattern of two pixels, 0.25 of
        four, 0.125 of eight. NaN when images are not finite.
    Raises:
        DataError: fewer than two images on a side, or images of different sizes.
    """
    a, b = two_sides("spectrum", reference, candidate, extractor())
    conditions: dict[str, Any] = {"n": (len(a), len(b)), "seed": seed, "bins": a.width}
    if not (a.finite() and b.finite()):
        return Measurement("spectrum", "dB", float("nan"), direction="lower", conditions=conditions)
    apart = _decibels(_mean(b)) - _decibels(_mean(a))
    peak = int(np.argmax(np.abs(apart)))
    conditions |= {"peak_db": float(apart[peak]), "peak_frequency": (peak + 1) * float(np.sqrt(0.5)) / a.width}
    value, bounds = float(np.sqrt(np.square(apart).mean())), None
    if interval:
        rng = np.random.default_rng(seed)
        resampled = _decibels(_means(b, rng)) - _decibels(_means(a, rng))
        error = float(np.std(np.sqrt(np.square(resampled).mean(axis=1)), ddof=1))
        bounds = with_error(value, error, least=0.0)
    return Measurement("spectrum", "dB", value, bounds, direction="lower", conditions=conditions)


def extractor() -> FeatureExtractor:
    """Radial power spectra as features: (N, bins), of the images' mean over the colours."""
    from edgegen.nn.features import FeatureExtractor

    name = "radial power spectrum"
    mark = hashlib.sha256(name.encode()).hexdigest()  # it has no weights
    return FeatureExtractor(name, mark, lambda images: ([], profile(images[:, 0])), channels=1)


def profile(images: np.ndarray) -> np.ndarray:
    """Grey images (N, H, W) -> mean power in rings of equal width up to the corner of the spectrum, (N, bins).

    A ring is as wide as the lowest frequency of the shorter side; the constant part is left out.
    """
    height, width = images.shape[1:]
    power = np.square(np.abs(np.fft.rfft2(images.astype(np.float64)))) / (height * width) ** 2
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    bins = max(1, round(np.sqrt(0.5) * min(height, width)))
    ring = np.rint(np.hypot(down, across) / np.sqrt(0.5) * bins).astype(int)
    twice = np.where((across > 0) & (across < 0.5), 2.0, 1.0)  # rfft2 leaves out the mirrored half
    count = np.bincount(ring.ravel(), twice.ravel(), bins + 1)
    sums = np.stack([np.bincount(ring.ravel(), (twice * one).ravel(), bins + 1) for one in power])
    return (sums / np.maximum(count, 1.0))[:, 1:].astype(np.float32)


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10.0 * np.log10(np.maximum(power, _LEAST_POWER))


def _mean(rows: Rows) -> np.ndarray:
    return np.asarray(sum(block.astype(np.float64).sum(axis=0) for block in rows.blocks()) / len(rows))


def _means(rows: Rows, rng: np.random.Generator) -> np.ndarray:
    """The mean of each resample, (resamples, bins), in one pass: Poisson weights, as a bootstrap of many rows has."""
    sums: Any = 0.0
    count: Any = 0.0
    for block in rows.blocks(4096):
        weights = rng.poisson(1.0, (_RESAMPLES, len(block))).astype(np.float64)
        sums, count = sums + weights @ block.astype(np.float64), count + weights.sum(axis=1)
    return sums / np.maximum(count, 1.0)[:, None]
