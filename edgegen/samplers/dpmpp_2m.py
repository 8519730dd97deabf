"""DPM-Solver++(2M): second order from the estimate of the step before, one network run a step.

Lu et al., 2022, DPM-Solver++, arXiv:2211.01095, algorithm 2; the first and the last step are of first order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def dpmpp_2m(
    denoise: Callable[..., np.ndarray], x: np.ndarray, levels: list[Any], noise: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Images from noise x (N, C, H, W)."""
    before, width_before = None, 0.0
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        if there.sigma == 0:
            return x0
        width = np.log(there.alpha / there.sigma) - np.log(here.alpha / here.sigma)
        direction = x0
        if before is not None:
            share = width / (2 * width_before)
            direction = (1 + share) * x0 - share * before
        x = there.sigma / here.sigma * x - there.alpha * np.expm1(-width) * direction
        before, width_before = x0, width
    return x
