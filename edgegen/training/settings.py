"""The settings of a training run, checked, and the precision that this machine trains fastest in."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
BATCHNORM = ("train", "frozen")
PRECISIONS = ("auto", "bf16", "fp32")


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

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a half cosine down to 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def has_bf16(device: str = "cpu") -> bool:
    """Whether bf16 is computed natively here; an emulated one is slower than fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def resolve_precision(precision: str, device: str = "cpu") -> str:
    """"bf16" or "fp32" for "auto", "bf16" or "fp32".

    Raises:
        ValueError: another name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return ("bf16" if has_bf16(device) else "fp32") if precision == "auto" else precision


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager:
    """bf16 autocast on `device`, or nothing for fp32."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
