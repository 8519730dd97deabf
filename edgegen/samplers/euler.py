"""Euler steps on the probability flow in EDM's form: y = x / alpha against the noise level sigma / alpha.

Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364. On the same
levels it is DDIM without noise; `spacing` "karras" with `rho` is the paper's step schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def euler(
    denoise: Callable[..., np.ndarray], x: np.ndarray, levels: list[Any], noise: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Images from noise x (N, C, H, W); first order, one network run a step."""
    y = x / levels[0].alpha
    for here, there in pairwise(levels):
        slope = (y - denoise(here.alpha * y, here)) * here.alpha / here.sigma
        y = y + (there.sigma / there.alpha - here.sigma / here.alpha) * slope
    return y
