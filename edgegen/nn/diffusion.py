"""What a denoiser learns from: images noised to a level, and the output that it should give there.

x = alpha x0 + sigma eps (Ho et al., 2020, arXiv:2006.11239); v = alpha eps - sigma x0 (Salimans & Ho, 2022,
arXiv:2202.00512).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgegen import samplers
from edgegen.samplers import _core

DROPPED = 0.1  # share of images whose class is left out, so that guidance can be used (Ho & Salimans, 2022)
Images = Callable[[int], tuple[np.ndarray, np.ndarray | None]]
"""step -> images (N, C, H, W), and the class of each, (N,), where the network has classes."""


class Levels:
    """The noise levels of a network's training steps as float32 tensors; `facts` are the model's options."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        known = {**_core.OF_NETWORK, **{key: facts[key] for key in _core.OF_NETWORK if key in facts}}
        bars = torch.from_numpy(_core.alpha_bars(known["schedule"], known["train_steps"]))
        self.prediction, self.labels, self.count = str(known["prediction"]), int(known["labels"]), len(bars)
        self.alphas, self.sigmas = bars.sqrt().float(), (1 - bars).sqrt().float()

    def at(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) of times t (N,), shaped for multiplying `like` (N, ...); linear between training steps."""
        shape = (-1, *[1] * (like.ndim - 1))
        low = t.floor().long().clamp(0, self.count - 1)
        high = (low + 1).clamp(max=self.count - 1)
        share = (t - low).to(self.sigmas.dtype)
        angle = torch.atan2(self.sigmas.to(t.device), self.alphas.to(t.device))
        between = torch.lerp(angle[low], angle[high], share).view(shape)
        return between.cos(), between.sin()

    def noised(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Images x0 at times t (N,) with noise eps."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """What the network should give for `noised(x0, t, eps)`."""
        if self.prediction == "epsilon":
            return eps
        alpha, sigma = self.at(t, x0)
        return alpha * eps - sigma * x0 if self.prediction == "v" else x0

    def told(self, labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """Classes (N,) as a network learns them, float32: some are left out, and one below 0 is not known."""
        none = (rng.random(len(labels)) < DROPPED) | (labels < 0)
        return torch.from_numpy(np.where(none, self.labels, labels)).float()

    def image(self, made: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The image that the network's output stands for."""
        alpha, sigma = self.at(t, x)
        if self.prediction == "epsilon":
            return (x - sigma * made) / alpha.clamp_min(1e-4)
        return alpha * x - sigma * made if self.prediction == "v" else made


def runner(module: nn.Module, at_once: int = 64, names: Sequence[str] = ("output",)) -> samplers.Run:
    """A torch denoiser as the `run` of a sampler: numpy in and out, eval mode, no gradients; names of its outputs."""

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = [torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values()]
        with torch.no_grad():
            made = [module(*(value[i : i + at_once] for value in given)) for i in range(0, len(given[0]), at_once)]
        parts = zip(*([one] if isinstance(one, torch.Tensor) else one for one in made), strict=True)
        return {name: torch.cat(part).float().numpy() for name, part in zip(names, parts, strict=True)}

    module.eval()
    return run


def lessons(
    options: Mapping[str, Any], images: Images, size: int, seed: int
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """step -> a batch of a denoiser's inputs: `images(step)` noised to random times, and their classes."""
    levels = Levels(options)

    def at(step: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng([seed, step])
        found, labels = images(step)
        x0 = torch.from_numpy(found)
        t = torch.from_numpy(np.floor(rng.random(size) * levels.count)).float()
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        given = (levels.noised(x0, t, eps), t)
        return given if labels is None else (*given, levels.told(labels, rng))

    return at
