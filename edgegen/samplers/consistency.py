"""Multistep sampling of a one-step student: an image, noise put on it again for the next level, the next image.

Song et al., 2023, Consistency Models, arXiv:2303.01469, algorithm 1. With one step: the network's first image.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def consistency(
    denoise: Callable[..., np.ndarray], x: np.ndarray, levels: list[Any], noise: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Images from noise x (N, C, H, W); one network run a step."""
    x0 = x
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        if there.sigma > 0:
            x = there.alpha * x0 + there.sigma * noise(here.step)
    return x0
