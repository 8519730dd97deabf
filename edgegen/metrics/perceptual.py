"""Perceptual distance of the LPIPS type: how far apart two images are in a network's features, 0 (equal) upwards.

Zhang et al., 2018, arXiv:1801.03924, equation 1, without the learned channel weights (their w is 1 here), so figures
compare only with figures of the same extractor: d = mean over layers of the mean over positions of the sum over
channels of (f / |f| - g / |g|)^2. Each layer's share lies in 0..4. With `learned` weights for the extractor's layers it
is equation 1 itself, summed over the layers as their code sums: LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.metrics._common import Batches, feature_name, mean_of, paired
from edgegen.types import Measurement

TAKES = "pairs"  # image by image, against the image at the same place
_EPSILON = 1e-10


def perceptual(
    reference: Batches, candidate: Batches, *, features: Any, seed: int = 0, learned: Sequence[np.ndarray] | None = None
) -> Measurement:
    """Mean of the images' distances.

    Args:
        reference: batches (N, C, H, W) in 0..1.
        candidate: the same shapes.
        features: `nn.features.FeatureExtractor`; all its maps are layers.
        seed: of the bootstrap.
        learned: a weight (C,) for each channel of each map, see `learned_weights`.
    Returns:
        Measurement without unit, lower is better, with a sample an image.
    Raises:
        DataError: other shapes or numbers of images than the reference, an extractor without maps, or weights that do
            not fit the maps.
    """
    samples: list[float] = []
    for a, b in paired(reference, candidate):
        if a.shape != b.shape or a.ndim != 4:
            raise DataError(f"images of shape {a.shape} and {b.shape}; both must be (N, C, H, W) of one shape")
        maps_a, _ = features(np.asarray(a, np.float32))
        maps_b, _ = features(np.asarray(b, np.float32))
        if not maps_a:
            raise DataError(_no_maps(features))
        samples += [float(v) for v in map_distance(maps_a, maps_b, learned)]
    how = {"learned_weights": learned is not None, **feature_name(features)}
    return mean_of("perceptual", "", samples, seed=seed, direction="lower", **how)


def lacks_maps(features: Any, shape: Sequence[int]) -> str:
    """Why an extractor has no perceptual distance of images (C, H, W); empty where it has one. Looks at one image."""
    maps, _ = features(np.zeros((1, *shape), np.float32))
    return "" if maps else _no_maps(features)


def _no_maps(features: Any) -> str:
    return (
        f"a perceptual distance compares maps, and {features.name} gives pooled features alone; give --features cifar,"
        " mobilenet_v1_025:FILE, or an .onnx file or FILE.py:FACTORY with maps"
    )


def map_distance(
    a: list[np.ndarray], b: list[np.ndarray], learned: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Lists of maps (N, C, H, W) of the same layers -> distance (N,)."""
    if learned is None:
        layers = [np.square(_unit(f) - _unit(g)).sum(axis=1).mean(axis=(1, 2)) for f, g in zip(a, b, strict=True)]
        return np.stack(layers).mean(axis=0, dtype=np.float64)
    if [len(w) for w in learned] != [f.shape[1] for f in a]:
        raise DataError(
            f"learned weights are for layers of {[len(w) for w in learned]} channels, the extractor has"
            f" {[f.shape[1] for f in a]}; give those of the same network"
        )
    weighted = [
        np.einsum("nchw,c->nhw", np.square(_unit(f) - _unit(g)), w).mean(axis=(1, 2))
        for f, g, w in zip(a, b, learned, strict=True)
    ]
    return np.stack(weighted).sum(axis=0, dtype=np.float64)


def learned_weights(file: Path) -> list[np.ndarray]:
    """The weights of LPIPS' linear layers, as its package stores them (`lin0.model.1.weight`, (1, C, 1, 1)), in order.

    Raises:
        ModelError: the file cannot be read. DataError: it holds no such layers.
    """
    from edgegen import weights

    state = weights.read_state(file)
    found = {name: value for name, value in state.items() if name.startswith("lin") and value.ndim == 4}
    if not found or any(value.shape[0] != 1 for value in found.values()):
        raise DataError(f"{file} holds no LPIPS weights (lin0.model.1.weight, ...); give those of the lpips package")
    return [found[name].numpy().reshape(-1) for name in sorted(found, key=lambda n: int(n[3:].split(".")[0]))]


def _unit(maps: np.ndarray) -> np.ndarray:
    """Every position's channel vector scaled to length 1 (a zero vector stays zero)."""
    return maps / (np.sqrt(np.square(maps).sum(axis=1, keepdims=True)) + _EPSILON)
