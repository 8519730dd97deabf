"""Real images to learn from, by number: any number of them, decoded when they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen.errors import DataError
from edgegen.types import Model

KEPT = 256 * 2**20  # bytes of images that are kept once they are decoded; the others are decoded anew


class Reals:
    """The real images of an unconditional generator's data, in some range of values."""

    def __init__(self, data: Any, value_range: tuple[float, float]) -> None:
        self.data, self.count = data, int(data.real_count())
        self.low, self.high = value_range
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT

    def drawn(self, size: int, seed: list[int]) -> np.ndarray:
        """`size` of them, float32 (size, C, H, W), drawn with replacement."""
        found = np.stack([self._bytes(int(i)) for i in self.chosen(size, seed)])
        return (found / 255.0 * (self.high - self.low) + self.low).astype(np.float32)

    def chosen(self, size: int, seed: list[int]) -> np.ndarray:
        """The numbers of those that `drawn` draws."""
        return np.random.default_rng(seed).integers(self.count, size=size)

    def _bytes(self, i: int) -> np.ndarray:
        if i in self._kept:
            return self._kept[i]
        image = np.clip(np.rint(self.data.real_image(i) * 255), 0, 255).astype(np.uint8)
        if image.nbytes <= self._room:
            self._kept[i] = image
            self._room -= image.nbytes
        return image


def reals(data: Any, model: Model, default: tuple[float, float] = (0.0, 1.0)) -> Reals | None:
    """The data's real images, in the range of the network's output (`default`: where it has none); or None."""
    if not hasattr(data, "real_image"):
        return None
    try:
        found = Reals(data, model.stage.outputs[0].value_range or default)
    except DataError:  # latents without a source of images, or an output that is none
        return None
    return found if found.count else None
