"""The one training loop: the same seed gives the same weights bit for bit, also after being killed and resumed.

A batch is a pure function of its step, and so is the learning rate; everything else that a step depends on lies in the
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgegen import files
from edgegen.training.feed import Reporter, place, prefetched
from edgegen.training.settings import Settings, autocast, has_bf16, resolve_precision
from edgegen.training.state import Checkpoint, Loop, Losses

__all__ = ["TrainResult", "autocast", "has_bf16", "place", "resolve_precision", "train", "use_threads"]

_BN = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class TrainResult:
    """The trained module (eval mode), the loss curve as (step, mean loss since the point before), and how it went.

    steps: optimizer steps done. stopped: why it ended before its time, else "". seconds: of this call alone.
    """

    module: nn.Module
    curve: tuple[tuple[int, float], ...]
    steps: int
    precision: str
    seconds: float
    stopped: str = ""


def train(
    module: nn.Module,
    loss_step: Callable[[nn.Module, Any, int], Losses],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_s: float = 30.0,
    progress: Callable[[str, float], None] | None = None,
    ema: float = 0.0,
    precision: str = "auto",
    schedule: str = "cosine",
    warmup: float = 0.0,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    batchnorm: str = "train",
    bn_momentum: float | None = None,
    threads: int = 0,
    device: str = "cpu",
) -> TrainResult:
    """Train `module` in place and return it in eval mode.

    Args:
        module: everything that learns (and moves with the checkpoint); `requires_grad` is respected.
        loss_step: (module, batch, step) -> loss, or named parts of it that are summed. Runs under autocast.
        batch_at: step -> batch, a pure function: it runs ahead in another thread and must not use torch's global
            random state. Tensors in tuples, lists and dictionaries are moved to the device.
        checkpoint: file to resume from and to write every `every_s` seconds; one of other settings is not used.
        ema: decay of an exponential moving average of the weights, which is then the result; 0: none.
        warmup: fraction of the steps with a rising rate. grad_clip: largest gradient norm, 0: no limit.
        batchnorm: "train" (statistics move by `bn_momentum`; None: slowly, yet they settle within the run) or "frozen".
    Returns:
        TrainResult. When a loss or a gradient is not finite, training stops and the last good weights are kept.
    Raises:
        ValueError: a setting out of range.
    """
    resolved = resolve_precision(precision, device)
    if bn_momentum is None:
        bn_momentum = min(0.5, max(0.01, 5 / max(1, steps)))  # the old statistics weigh e^-5 at the end, or less
    settings = Settings(steps, lr, seed, ema, resolved, schedule, warmup, optimizer, weight_decay, grad_clip,
                         batchnorm, bn_momentum)
    settings.check()
    begin = time.monotonic()
    loop = Loop(module, settings, device)
    file = Checkpoint(checkpoint, every_s, files.key(vars(settings), loop.shapes()))
    with use_threads(threads), torch.random.fork_rng(devices=[]), _layout(module, device), _mode(module, settings):
        if (state := file.load()) is not None:
            loop.restore(*state)
        report = Reporter(progress, steps, loop.step)
        for step, batch in prefetched(batch_at, loop.step, steps, device):
            loop.advance(step, batch, loss_step)
            if loop.stopped:
                break
            report(loop.step, loop.last)
            file.save_if_due(loop.state)
        loop.finish()
    return TrainResult(module.eval(), tuple(loop.curve), loop.step, resolved, time.monotonic() - begin, loop.stopped)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run the body with `count` torch threads (0: as it is); the previous number comes back afterwards."""
    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _layout(module: nn.Module, device: str) -> Iterator[None]:
    """channels_last weights for the time of training (twice as fast with bf16), contiguous ones on the CPU after it."""
    module.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        module.to(device="cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def _mode(module: nn.Module, settings: Settings) -> Iterator[None]:
    """Training mode with slow (or frozen) batch-norm statistics; each layer's own momentum comes back afterwards."""
    module.train()
    norms = [part for part in module.modules() if isinstance(part, _BN)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = settings.bn_momentum
        if settings.batchnorm == "frozen":
            norm.eval()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
