"""DDPM: ancestral sampling, each step drawn from the posterior with the smaller of the two variances.

Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239, equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def ddpm(
    denoise: Callable[..., np.ndarray], x: np.ndarray, levels: list[Any], noise: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Images from noise x (N, C, H, W); one network run a step, made for many steps."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        ratio = here.alpha / there.alpha
        added = 1 - ratio**2  # variance that the forward process adds from `there` to `here`
        x = ratio * there.sigma**2 / here.sigma**2 * x + there.alpha * added / here.sigma**2 * x0
        spread = np.sqrt(added) * there.sigma / here.sigma
        if spread > 0:
            x = x + spread * noise(here.step)
    return x
