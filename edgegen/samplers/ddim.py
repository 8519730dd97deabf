"""DDIM: deterministic steps along the predicted noise, or with `eta` part of the noise drawn anew.

Song et al., 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502, equation 12; eta 1 is DDPM's sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np


def ddim(
    denoise: Callable[..., np.ndarray],
    x: np.ndarray,
    levels: list[Any],
    noise: Callable[[int], np.ndarray],
    *,
    eta: float = 0.0,
) -> np.ndarray:
    """Images from noise x (N, C, H, W); first order, one network run a step."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        eps = (x - here.alpha * x0) / here.sigma
        ratio = here.alpha / there.alpha
        fresh = eta * there.sigma / here.sigma * np.sqrt(max(0.0, 1 - ratio**2))
        x = there.alpha * x0 + np.sqrt(max(0.0, there.sigma**2 - fresh**2)) * eps
        if fresh > 0:
            x = x + fresh * noise(here.step)
    return x
