"""A student whose images are distributed as the teacher's: its gradient is the difference of two denoisers' estimates.

Yin et al., 2024, One-step Diffusion with Distribution Matching Distillation, arXiv:2311.18828, and Improved
Distribution Matching Distillation, arXiv:2405.14867: several steps, learned on the student's own way from noise, and
no regression to the teacher's paths. No images are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgegen import graph, training
from edgegen.nn import diffusion
from edgegen.passes import _denoising
from edgegen.training import adversarial
from edgegen.types import Model

FAKE_RATE = 2.0  # the second denoiser must follow the student: its rate is so many times the student's
BETAS = (0.5, 0.99)
NOISES = (0.02, 0.98)  # shares of the training times where the two estimates are compared
Batch = tuple[torch.Tensor, ...]


class Matching:
    """Batches of noise, and the losses of a student and of `fake`: a denoiser of the student's own images, which starts
    with the teacher's weights."""

    source = "noise alone"

    def __init__(
        self, model: Model, student: nn.Module, teacher: _denoising.Teacher, settings: Mapping[str, Any], steps: int,
        size: int, seed: int,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.levels = student, teacher, diffusion.Levels(settings)
        self.fake = graph.clone(teacher.module).requires_grad_(True)
        self.times, self.clip = _denoising.times(settings, steps), float(settings["clip"])
        self.shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
        self.steps, self.size, self.seed = steps, size, seed
        self._way: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def train(self, student: nn.Module, *, lr: float, ema: float, **how: Any) -> training.TrainResult:
        """Train both in place; how: as in `adversarial.train`."""
        players = {
            "fake": adversarial.Player(self.fake, self.fake_loss, FAKE_RATE * lr, betas=BETAS),
            "student": adversarial.Player(student, self.student_loss, lr, ema=ema, betas=BETAS),
        }
        found = adversarial.train(players, self.batch_at, **how)
        return dataclasses.replace(found["student"], stopped=found["student"].stopped or found["fake"].stopped)

    def batch_at(self, step: int) -> Batch:
        """(noise of each step of the student's way, the last of which learns (N, K, C, H, W); t (N,) and noise for
        the comparison; the same for the second denoiser's lesson; label (N,) where there are classes)."""
        rng = np.random.default_rng([self.seed, step])
        way = int(rng.integers(self.steps)) + 1

        def noise(*count: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal((self.size, *count, *self.shape), dtype=np.float32))

        low, high = (round(share * self.levels.count) for share in NOISES)
        compared = torch.from_numpy(rng.integers(low, high, size=self.size)).float()
        spread = (rng.permutation(self.size) + rng.random(self.size)) / self.size  # one time in each of N equal parts
        learned = torch.from_numpy(np.floor(spread * self.levels.count)).float()
        batch = (noise(way), compared, noise(), learned, noise())
        if not self.levels.labels:
            return batch
        return (*batch, torch.from_numpy(rng.integers(self.levels.labels, size=self.size)).float())

    def _made(self, student: nn.Module, batch: Batch) -> torch.Tensor:
        """What the student takes the image to be at the last step of its way; only that step has a gradient."""
        noises, label = batch[0], self._label(batch)
        known, x = self._way
        if known is not noises or x is None:  # the second denoiser learns first, of the same student
            x = self._walked(student, noises, label)
            self._way = noises, x
        return self._image(student, x, noises.shape[1] - 1, label)

    @torch.no_grad()
    def _walked(self, student: nn.Module, noises: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """What the student takes at the last step of its way."""
        x = noises[:, 0]
        for place in range(noises.shape[1] - 1):
            found = self._image(student, x, place, label)
            found = found.clamp(-self.clip, self.clip) if self.clip else found
            x = self.levels.noised(found, self._at(place + 1, x), noises[:, place + 1])
        return x

    def _image(self, student: nn.Module, x: torch.Tensor, place: int, label: torch.Tensor | None) -> torch.Tensor:
        t = self._at(place, x)
        return self.levels.image(_denoising.call(student, x, t, label).float(), x, t)

    def _at(self, place: int, x: torch.Tensor) -> torch.Tensor:
        return self.times[place].to(x.device).expand(len(x))

    def _label(self, batch: Batch) -> torch.Tensor | None:
        return batch[5] if self.levels.labels else None

    def fake_loss(self, fake: nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """What every denoiser learns, of the student's images."""
        with torch.no_grad():
            x0 = self._made(self.student, batch)
        t, eps = batch[3], batch[4]
        found = _denoising.call(fake, self.levels.noised(x0, t, eps), t, self._label(batch)).float()
        return {"fake": (found - self.levels.target(x0, t, eps)).square().mean()}

    def student_loss(self, student: nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Half the squared distance to where the two estimates' difference points; its value tells little."""
        x0, label, t = self._made(student, batch), self._label(batch), batch[1]
        with torch.no_grad():
            x = self.levels.noised(x0, t, batch[2])
            real = self.teacher.image(x, t, label)
            own = self.levels.image(_denoising.call(self.fake, x, t, label).float(), x, t)
            own = own.clamp(-self.clip, self.clip) if self.clip else own
            scale = (x0 - real).abs().mean(tuple(range(1, x0.ndim)), keepdim=True).clamp_min(1e-3)
            aim = x0 - (own - real) / scale
        return {"matching": 0.5 * (x0 - aim).square().mean()}
