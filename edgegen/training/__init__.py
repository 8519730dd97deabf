"""The one training loop: the same seed gives the same weights bit for bit, also after being killed and resumed.

A batch is a pure function of its step, and so is the learning rate; everything else that a step depends on lies in the
checkpoint. Under `torchrun` several processes train one network (`distributed`); `adversarial` has two players.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgegen import files
from edgegen.training import distributed, memory
from edgegen.training.feed import Reporter, place, prefetched
from edgegen.training.loop import Loop, Losses
from edgegen.training.settings import Settings, autocast, chosen_device, has_bf16, resolve_precision
from edgegen.training.state import Checkpoint

__all__ = [
    "TrainResult", "autocast", "chosen_device", "has_bf16", "place", "resolve_precision", "train", "use_threads",
]  # fmt: skip

EVALUATIONS = 10  # in a run, where nobody says how often


@dataclass(frozen=True)
class TrainResult:
    """The trained module (eval mode), the loss curve as (step, mean loss since the point before), and how it went.

    steps: optimizer steps done. stopped: why it ended before its time, else "". seconds: of this call alone.
    scores: (step, value) of each evaluation; best_step: the step whose weights these are, None without evaluations.
    """

    module: nn.Module
    curve: tuple[tuple[int, float], ...]
    steps: int
    precision: str
    seconds: float
    stopped: str = ""
    scores: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None


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
    accumulate: int = 1,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 0,
    patience: int = 0,
    rates: Mapping[str, float] | None = None,
    identity: Mapping[str, Any] | None = None,
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
        precision: "auto" (bf16 where it is computed natively), "bf16", "fp32", or "fp16" on CUDA, with a scaled loss.
        accumulate: batches to a step; step s takes those of s * accumulate and the following ones.
        evaluate: module (in eval mode; the average, where there is one) -> score, lower is better. It is asked `every`
            steps (0: ten times in a run) and at the end; the best weights are the result. Training ends early after
            `patience` evaluations in a row that are no better; 0: never.
        rates: name of a parameter -> factor of its learning rate (`scaling.rates`).
        identity: what else decides the result (data, batch, loss), as plain values by name; a checkpoint that differs
            in any is then an error.
    Returns:
        TrainResult. When a loss or a gradient is not finite, training stops and the last good weights are kept.
    Raises:
        ValueError: a setting out of range. RecipeError: with an identity, a checkpoint of another run.
    """
    device = distributed.own_device(device)
    if (every or patience) and evaluate is None:
        raise ValueError("every and patience are for evaluations, and there is no evaluate")
    every = every or max(1, steps // EVALUATIONS) if evaluate else 0
    resolved = resolve_precision(precision, device)
    if bn_momentum is None:
        bn_momentum = min(0.5, max(0.01, 5 / max(1, steps)))  # the old statistics weigh e^-5 at the end, or less
    settings = Settings(steps, lr, seed, ema, resolved, schedule, warmup, optimizer, weight_decay, grad_clip,
                         batchnorm, bn_momentum, accumulate, every, patience, tuple(sorted((rates or {}).items())))
    settings.check()
    begin = time.monotonic()
    with distributed.joined(device), use_threads(threads), in_training(module, settings, device):
        loop = Loop(module, settings, device, loss_step, evaluate)
        file = Checkpoint(checkpoint, every_s, files.key(settings.named(), loop.shapes()), identity)
        if (state := file.load()) is not None:
            loop.restore(*state)
        distributed.check_agree("the step to go on from", loop.step)
        report = Reporter(progress if distributed.first() else None, steps, loop.step)
        for step, batches in prefetched(batch_at, loop.step, steps, device, accumulate):
            loop.advance(step, batches)
            if loop.stopped:
                break
            report(loop.step, loop.last)
            file.save_if_due(loop.state)
        loop.finish()
    scores = tuple(loop.judge.scores)
    return TrainResult(module.eval(), tuple(loop.curve), loop.step, resolved, time.monotonic() - begin, loop.stopped,
                       scores, loop.judge.best_step if scores else None)  # fmt: skip


@contextmanager
def in_training(module: nn.Module, settings: Settings, device: str) -> Iterator[None]:
    """A module as it is while it learns, and a random state of its own; the caller's comes back."""
    with memory.given_back(), torch.random.fork_rng(devices=[]), _layout(module, device), _mode(module, settings), \
            distributed.synced(module):  # fmt: skip
        yield


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
    norms = [part for part in module.modules() if isinstance(part, distributed.BatchNorm)]
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
