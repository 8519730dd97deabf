"""Training with several players in turn, each with an optimizer and a rate of its own (TTUR).

Heusel et al., 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500. As in `training.train`, a batch is
a pure function of its step, one checkpoint holds all players, and a run that was killed ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgegen import files
from edgegen.training import TrainResult, distributed, in_training, use_threads
from edgegen.training.feed import Reporter, prefetched
from edgegen.training.loop import Loop, LossStep
from edgegen.training.settings import BETAS, Settings, resolve_precision
from edgegen.training.state import Checkpoint, State, by_prefix, with_prefix


@dataclass(frozen=True)
class Player:
    """Who learns: loss_step as in `training.train`; `start` is the first step of its own, it rests before."""

    module: nn.Module
    loss_step: LossStep
    lr: float
    start: int = 0
    ema: float = 0.0
    optimizer: str = "adam"
    betas: tuple[float, float] = BETAS
    batchnorm: str = "train"


def train(
    players: Mapping[str, Player],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    every_s: float = 30.0,
    progress: Callable[[str, float], None] | None = None,
    precision: str = "auto",
    warmup: float = 0.0,
    grad_clip: float = 1.0,
    threads: int = 0,
    device: str = "cpu",
) -> dict[str, TrainResult]:
    """Train all players in place, one step each in their order, on the same batch; progress tells the last one's loss.

    Returns:
        Name -> TrainResult. When anyone's loss or gradient is not finite, all stop and the one keeps its last good
        weights.
    Raises:
        ValueError: a setting out of range.
    """
    device, resolved = distributed.own_device(device), resolve_precision(precision, distributed.own_device(device))
    momentum = min(0.5, max(0.01, 5 / max(1, steps)))
    settings = {
        name: Settings(steps, player.lr, seed + number, player.ema, resolved, "cosine", warmup, player.optimizer, 0.0,
                       grad_clip, player.batchnorm, momentum, betas=player.betas)
        for number, (name, player) in enumerate(players.items())
    }  # fmt: skip
    for values in settings.values():
        values.check()
    begin = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(distributed.joined(device))
        stack.enter_context(use_threads(threads))
        for name, player in players.items():
            stack.enter_context(in_training(player.module, settings[name], device))
        loops = {name: Loop(player.module, settings[name], device, player.loss_step)
                 for name, player in players.items()}  # fmt: skip
        key = {name: [settings[name].named(), player.start, loops[name].shapes()] for name, player in players.items()}
        file = Checkpoint(checkpoint, every_s, files.key(key))
        if (state := file.load()) is not None:
            _restore(loops, *state)
        _play(loops, [player.start for player in players.values()], batch_at, file, progress)
        for loop in loops.values():
            loop.finish()
    seconds = time.monotonic() - begin
    return {name: TrainResult(loop.module.eval(), tuple(loop.curve), loop.step, resolved, seconds, loop.stopped)
            for name, loop in loops.items()}  # fmt: skip


def _play(
    loops: Mapping[str, Loop], starts: Sequence[int], batch_at: Callable[[int], Any], file: Checkpoint,
    progress: Callable[[str, float], None] | None,
) -> None:  # fmt: skip
    """All steps that are left."""
    last = list(loops.values())[-1]
    steps = last.settings.steps
    distributed.check_agree("the step to go on from", last.step)
    report = Reporter(progress if distributed.first() else None, steps, last.step)
    for step, batches in prefetched(batch_at, last.step, steps, last.device):
        for loop, start in zip(loops.values(), starts, strict=True):
            if step < start:
                loop.step = step + 1
                continue
            loop.advance(step, batches)
            if loop.stopped:
                return
        report(last.step, last.last)
        file.save_if_due(lambda: _state(loops))


def _state(loops: Mapping[str, Loop]) -> State:
    """The state of all players, under their names."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, loop in loops.items():
        own, values[name] = loop.state()
        tensors |= with_prefix(name, own)
    return tensors, values


def _restore(loops: Mapping[str, Loop], tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    parts = by_prefix(tensors, loops)
    for name, loop in loops.items():
        loop.restore(parts[name], values[name])
