"""Heun's method on the probability flow in EDM's form: second order, two network runs a step, one in the last.

Karras et al., 2022, arXiv:2206.00364, algorithm 1; `spacing` "karras" with `rho` 7 is the paper's step schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def heun(
    denoise: Callable[..., np.ndarray], x: np.ndarray, levels: list[Any], noise: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Images from noise x (N, C, H, W)."""
    y = x / levels[0].alpha
    for here, there in pairwise(levels):
        slope = (y - denoise(here.alpha * y, here)) * here.alpha / here.sigma
        width = there.sigma / there.alpha - here.sigma / here.alpha
        tried = y + width * slope
        if there.sigma > 0:
            same = there._replace(step=here.step)  # guidance and caching are of a step, and this is its second run
            ahead = (tried - denoise(there.alpha * tried, same)) * there.alpha / there.sigma
            tried = y + width * (slope + ahead) / 2
        y = tried
    return y
