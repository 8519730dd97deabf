"""The settings of a training run, checked, and the precision that this machine trains fastest in."""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from edgegen.errors import UsageError

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
BATCHNORM = ("train", "frozen")
PRECISIONS = ("auto", "bf16", "fp32")  # and "fp16" on CUDA
BETAS = (0.9, 0.999)
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """The numbers that decide the result; their hash names a checkpoint."""

    steps: int
    lr: float
    seed: int
    ema: float
    precision: str
    schedule: str
    warmup: float
    optimizer: str
    weight_decay: float
    grad_clip: float
    batchnorm: str
    bn_momentum: float
    accumulate: int = 1
    every: int = 0
    patience: int = 0
    rates: tuple[tuple[str, float], ...] = ()  # parameter name -> factor of its learning rate
    betas: tuple[float, float] = BETAS

    def named(self) -> dict[str, Any]:
        """What a checkpoint must agree with. A default that came later is left out: older checkpoints stay valid."""
        later = {field.name: field.default for field in fields(self)[12:]}
        return {name: value for name, value in vars(self).items() if later.get(name, ...) != value}

    def check(self) -> None:
        for name, allowed in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("batchnorm", BATCHNORM)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("ema", "warmup", "bn_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("grad_clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if min(self.every, self.patience) < 0:
            raise ValueError(f"every and patience must be 0 or more, got {self.every} and {self.patience}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        for name, factor in self.rates:
            if not 0 < factor < math.inf:
                raise ValueError(f"the rate of {name} must be a factor above 0, got {factor}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a half cosine down to 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def chosen_device(asked: str) -> str:
    """Where to train: "auto" is CUDA where torch sees it; "cpu", "cuda" or "cuda:N" are as they say.

    Raises:
        UsageError: another name, or a device that is not here.
    """
    if asked in ("auto", "cpu"):
        return "cuda" if asked == "auto" and torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cuda(?::(\d+))?", asked)
    if match is None:
        raise UsageError(f"--train-device must be auto, cpu, cuda or cuda:N, got {asked!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= count:
        raise UsageError(f"--train-device {asked}: torch sees {count or 'no'} CUDA devices here; take cpu or auto")
    return asked


def has_bf16(device: str = "cpu") -> bool:
    """Whether bf16 is computed natively here; an emulated one is slower than fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def resolve_precision(precision: str, device: str = "cpu") -> str:
    """"bf16", "fp16" or "fp32" for "auto" or one of them. fp16 is for CUDA: no CPU trains faster in it.

    Raises:
        ValueError: another name.
    """
    allowed = (*PRECISIONS, "fp16") if device.startswith("cuda") else PRECISIONS
    if precision not in allowed:
        raise ValueError(f"precision must be one of {', '.join(allowed)}, got {precision!r}")
    return ("bf16" if has_bf16(device) else "fp32") if precision == "auto" else precision


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager:
    """bf16 or fp16 autocast on `device`, or nothing for fp32."""
    if precision not in _HALF:
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=_HALF[precision])
