"""Early stopping: the weights of the best evaluation are kept, and training ends when it gets no better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from edgegen.training import distributed
from edgegen.training.state import alike, copied, load, tensors_of

Evaluate = Callable[[nn.Module], float]


class Judge:
    """Evaluates now and then; lower is better, what is not finite is never better."""

    def __init__(self, evaluate: Evaluate | None, every: int, patience: int) -> None:
        """every: steps between evaluations. patience: evaluations in a row that are no better before the end; 0: any"""
        self.evaluate, self.every, self.patience = evaluate, every, patience
        self.scores: list[tuple[int, float]] = []
        self.best_step = 0
        self.best: dict[str, torch.Tensor] = {}

    @property
    def bad(self) -> int:
        """Evaluations since the best one."""
        return sum(step > self.best_step for step, _ in self.scores) if self.scores else 0

    def look(self, module: nn.Module, average: Mapping[str, torch.Tensor], step: int, steps: int) -> str:
        """Evaluate when it is due, in eval mode and with the average where there is one; why to stop, or ""."""
        if self.evaluate is None or (step % self.every and step != steps):
            return ""
        kept = copied(module) if average else {}
        modes = [(part, part.training) for part in module.modules()]
        if average:
            load(module, average)
        module.eval()
        score = distributed.from_first(lambda: self._score(module))
        if score < min((value for _, value in self.scores), default=math.inf):
            self.best, self.best_step = copied(module), step
        self.scores.append((step, score))
        for part, training in modes:
            part.training = training
        if kept:
            load(module, kept)
        if not self.patience or self.bad < self.patience or step == steps:
            return ""
        return f"{self.bad} evaluations brought nothing better than step {self.best_step}"

    def _score(self, module: nn.Module) -> float:
        if self.evaluate is None:
            return math.inf
        with torch.no_grad():
            score = float(self.evaluate(module))
        return score if math.isfinite(score) else math.inf

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `best`."""
        return {"scores": [[step, score if math.isfinite(score) else None] for step, score in self.scores],
                "best_step": self.best_step}  # fmt: skip

    def restore(self, best: Mapping[str, torch.Tensor], values: Mapping[str, Any], module: nn.Module) -> None:
        """The inverse of `values`."""
        like = tensors_of(module)
        self.best = {name: alike(value, like[name]) for name, value in best.items()}
        self.scores = [(step, math.inf if score is None else score) for step, score in values.get("scores", [])]
        self.best_step = values.get("best_step", 0)
