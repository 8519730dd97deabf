"""One player of a training run: a module, its optimizer and one step of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen.training import distributed
from edgegen.training.muon import Muon
from edgegen.training.settings import Settings, autocast
from edgegen.training.state import State, alike, blend, by_prefix, copied, load, tensors_of, with_prefix
from edgegen.training.stopping import Evaluate, Judge

log = logging.getLogger(__name__)

CURVE_POINTS = 200
GOOD_EVERY = 25  # steps between copies of weights that are known to give a finite loss
LEAST_SCALE = 2.0**-14  # of fp16 losses: gradients that overflow even so are not finite at all
Losses = torch.Tensor | Mapping[str, torch.Tensor]
LossStep = Callable[[nn.Module, Any, int], Losses]


class Loop:
    """The state of a run and one step of it."""

    def __init__(
        self, module: nn.Module, settings: Settings, device: str, loss_step: LossStep | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:  # fmt: skip
        self.module, self.settings, self.device, self.loss_step = module, settings, device, loss_step
        self.learned = [p for p in module.parameters() if p.requires_grad]
        self.step, self.last, self.stopped = 0, math.nan, ""
        self.curve: list[tuple[int, float]] = []
        self.pending: list[float] = []
        self.average: dict[str, torch.Tensor] = {}
        self.good: dict[str, torch.Tensor] = {}
        self.judge = Judge(evaluate, settings.every, settings.patience)
        self.scaler = torch.amp.GradScaler(device.split(":")[0]) if settings.precision == "fp16" else None
        self.group = distributed.group()
        self._optimizer: torch.optim.Optimizer | None = None
        self._loss: nn.Module | None = None

    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape of all state: what a checkpoint must fit."""
        return {name: list(value.shape) for name, value in tensors_of(self.module).items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made with the average at the first use: only then is the module in its place and layout."""
        if self._optimizer is None:
            self._optimizer = _optimizer(_groups(self.module, self.learned, self.settings), self.settings)
            if self.settings.ema:
                self.average = copied(self.module)
        return self._optimizer

    def advance(self, step: int, batches: Sequence[Any]) -> None:
        """One optimizer step from the mean gradient of some batches, or a stop that names what is not finite."""
        optimizer = self.optimizer
        # for dropout and drop path; each process draws its own
        torch.manual_seed((self.settings.seed * 1_000_003 + step + 7_368_787 * self.group.rank) % 2**63)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in enumerate(batches, 1):
            value, bad = self._gradient(batch, step, len(batches), number == len(batches))
            if bad:
                return self._stop(step, bad)
            total += value
        if step % GOOD_EVERY == 0:
            self.good = copied(self.module)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(step) * group.get("factor", 1.0)
        if bad := self._update(optimizer):
            return self._stop(step, bad)
        self._note(step, total / len(batches))
        return None

    def _gradient(self, batch: Any, step: int, count: int, last: bool) -> tuple[float, str]:
        """Add one batch's share of the gradient; its loss over all processes, and what is not finite about it."""
        if self._loss is None:
            self._loss = distributed.wrapped(self.module, self._called)
        with distributed.without_sync(self._loss, last):
            with autocast(self.settings.precision, self.device):
                parts = self._loss(distributed.share(batch, self.group), step)
            named = {"loss": parts} if isinstance(parts, torch.Tensor) else dict(parts)
            loss = torch.stack([part.float() for part in named.values()]).sum()
            value = distributed.mean([loss.item()])[0]
            if not math.isfinite(value):
                return value, _bad(dict(zip(named, distributed.mean([p.item() for p in named.values()]), strict=True)))
            loss = loss / count if count > 1 else loss
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        return value, ""

    def _called(self, module: nn.Module, batch: Any, step: int) -> Losses:
        if self.loss_step is None:
            raise ValueError("this player was made without a loss")
        return self.loss_step(module, batch, step)

    def _update(self, optimizer: torch.optim.Optimizer) -> str:
        """The optimizer's step from the gradients; what is not finite, or ""."""
        if self.scaler:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.learned, self.settings.grad_clip or math.inf)
        overflow = not math.isfinite(norm.item())
        if self.scaler is None and overflow:
            return f"the gradient norm became {norm.item()}"
        if self.scaler is None:
            optimizer.step()
            return ""
        self.scaler.step(optimizer)  # left out after an overflow; then the scale is halved
        self.scaler.update()
        return f"the gradient norm became {norm.item()}" if overflow and self.scaler.get_scale() < LEAST_SCALE else ""

    def _note(self, step: int, loss: float) -> None:
        """Count the step, move the average, put a point on the curve when one is due, and judge."""
        self.step, self.last = step + 1, loss
        if self.average:
            blend(self.average, self.module, min(self.settings.ema, (1 + step) / (10 + step)))
        self.pending.append(loss)
        if self.step % max(1, self.settings.steps // CURVE_POINTS) == 0 or self.step == self.settings.steps:
            self.curve.append((self.step, sum(self.pending) / len(self.pending)))
            self.pending = []
        if why := self.judge.look(self.module, self.average, self.step, self.settings.steps):
            self.stopped = f"stopped at step {self.step} of {self.settings.steps}: {why}"

    def _stop(self, step: int, why: str) -> None:
        self.stopped = f"stopped at step {step} of {self.settings.steps}: {why}"
        kept = f"best weights, of step {self.judge.best_step}," if self.judge.best else "last good weights"
        log.warning("%s; the %s are kept", self.stopped, kept)

    def finish(self) -> None:
        """Put the best weights that were seen, or the average, or after a stop the last good ones into the module."""
        chosen = self.judge.best or (self.good if self.stopped else self.average)
        if chosen:
            load(self.module, chosen)

    def state(self) -> State:
        """Everything that the rest of the run depends on: tensors and JSON values."""
        tensors = with_prefix("module", tensors_of(self.module)) | with_prefix("average", self.average)
        tensors |= with_prefix("good", self.good) | with_prefix("best", self.judge.best)
        for index, parameter in enumerate(self.learned):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
        values = {"step": self.step, "last": self.last, "curve": self.curve, "pending": self.pending}
        if self.scaler:
            values["scaler"] = self.scaler.state_dict()
        return tensors, values | (self.judge.values() if self.judge.evaluate else {})

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        optimizer = self.optimizer
        parts = by_prefix(tensors, ("module", "average", "good", "best", "optimizer"))
        load(self.module, parts["module"])
        like = tensors_of(self.module)
        self.average = {name: alike(value, like[name]) for name, value in parts["average"].items()}
        self.good = {name: alike(value, like[name]) for name, value in parts["good"].items()}
        for name, value in parts["optimizer"].items():
            index, _, slot = name.partition("/")
            parameter = self.learned[int(index)]
            optimizer.state[parameter][slot] = alike(value, parameter) if value.shape == parameter.shape else value
        self.step, self.last = values["step"], values["last"]
        self.curve = [(step, loss) for step, loss in values["curve"]]
        self.pending = list(values["pending"])
        self.judge.restore(parts["best"], values, self.module)
        if self.scaler and values.get("scaler"):
            self.scaler.load_state_dict(values["scaler"])


def _groups(module: nn.Module, learned: list[nn.Parameter], settings: Settings) -> list[Any]:
    """What the optimizer takes: the parameters, or groups of them with a common factor of the rate."""
    if not settings.rates:
        return learned
    factors = dict(settings.rates)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [{"params": params, "factor": factor} for factor, params in groups.items()]


def _optimizer(learned: list[Any], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer by name. Foreach and fused kernels stay off: they may sum in another order."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(learned, settings.lr, momentum=0.9, weight_decay=settings.weight_decay, foreach=False)
    if settings.optimizer == "muon":
        return Muon(learned, settings.lr, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(learned, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, foreach=False)


def _bad(values: Mapping[str, float]) -> str:
    """Which parts of the loss are not finite, with their values."""
    return ", ".join(f"{name} became {value}" for name, value in values.items() if not math.isfinite(value)) or (
        f"the sum of {', '.join(values)} overflowed"
    )
