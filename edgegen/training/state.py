"""The state of a training run: one step of it, and saving and restoring it exactly.

Restored tensors take the memory layout they had: vectorised and strided kernels round differently, and a resumed run
must end with the same bits. The file is safetensors with JSON in its header, never a pickle.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from edgegen import files
from edgegen.training.muon import Muon
from edgegen.training.settings import Settings, autocast

log = logging.getLogger(__name__)

CURVE_POINTS = 200
GOOD_EVERY = 25  # steps between copies of weights that are known to give a finite loss
Losses = torch.Tensor | Mapping[str, torch.Tensor]
State = tuple[dict[str, torch.Tensor], dict[str, Any]]


class Checkpoint:
    """A file that holds the state of one run; `key` says which run, so that another's file is not continued."""

    def __init__(self, path: Path | None, every_s: float, key: str) -> None:
        self.path, self.every_s, self.key = path, every_s, key
        self.saved = time.monotonic()

    def load(self) -> State | None:
        """The state to continue from, or None; a damaged file or another run's is logged and not used."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            log.warning("%s cannot be read (%s); training starts anew", self.path, error)
            return None
        if header["key"] != self.key:
            log.warning("%s belongs to a training with other settings; training starts anew", self.path)
            return None
        return tensors, header

    def save_if_due(self, state: Callable[[], State]) -> None:
        """Write the state whole when `every_s` seconds have gone by since the last time."""
        if self.path is None or time.monotonic() - self.saved < self.every_s:
            return
        tensors, values = state()
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with files.whole(self.path) as temporary:
            safetensors.torch.save_file(plain, temporary, {"state": json.dumps({**values, "key": self.key})})
        self.saved = time.monotonic()


class Loop:
    """The state of a run and one step of it."""

    def __init__(self, module: nn.Module, settings: Settings, device: str) -> None:
        self.module, self.settings, self.device = module, settings, device
        self.learned = [p for p in module.parameters() if p.requires_grad]
        self.step, self.last, self.stopped = 0, math.nan, ""
        self.curve: list[tuple[int, float]] = []
        self.pending: list[float] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self.average: dict[str, torch.Tensor] = {}
        self.good: dict[str, torch.Tensor] = {}

    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape of all state: what a checkpoint must fit."""
        return {name: list(value.shape) for name, value in _tensors(self.module).items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made with the average at the first use: only then is the module in its place and layout."""
        if self._optimizer is None:
            self._optimizer = _optimizer(self.learned, self.settings)
            if self.settings.ema:
                self.average = _copy(self.module)
        return self._optimizer

    def advance(self, step: int, batch: Any, loss_step: Callable[[nn.Module, Any, int], Losses]) -> None:
        """One optimizer step, or a stop that names the part of the loss which is not finite."""
        optimizer = self.optimizer
        torch.manual_seed((self.settings.seed * 1_000_003 + step) % 2**63)  # for dropout and drop path
        with autocast(self.settings.precision, self.device):
            parts = loss_step(self.module, batch, step)
        named = {"loss": parts} if isinstance(parts, torch.Tensor) else dict(parts)
        loss = torch.stack([part.float() for part in named.values()]).sum()
        if not math.isfinite(loss.item()):
            return self._stop(step, _bad(named))
        if step % GOOD_EVERY == 0:
            self.good = _copy(self.module)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learned, self.settings.grad_clip or math.inf)
        if not math.isfinite(norm.item()):
            return self._stop(step, f"the gradient norm became {norm.item()}")
        optimizer.step()
        self._note(step, loss.item())
        return None

    def _note(self, step: int, loss: float) -> None:
        """Count the step, move the average, and put a point on the curve when one is due."""
        self.step, self.last = step + 1, loss
        if self.average:
            _blend(self.average, self.module, min(self.settings.ema, (1 + step) / (10 + step)))
        self.pending.append(loss)
        if self.step % max(1, self.settings.steps // CURVE_POINTS) == 0 or self.step == self.settings.steps:
            self.curve.append((self.step, sum(self.pending) / len(self.pending)))
            self.pending = []

    def _stop(self, step: int, why: str) -> None:
        self.stopped = f"stopped at step {step} of {self.settings.steps}: {why}"
        log.warning("%s; the last good weights are kept", self.stopped)

    def finish(self) -> None:
        """Put the average, or after a stop the last good weights, into the module."""
        chosen = self.good if self.stopped else self.average
        if chosen:
            _load(self.module, chosen)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the rest of the run depends on: tensors and JSON values."""
        tensors = {f"module/{name}": value for name, value in _tensors(self.module).items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        tensors |= {f"good/{name}": value for name, value in self.good.items()}
        for index, parameter in enumerate(self.learned):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
        return tensors, {"step": self.step, "last": self.last, "curve": self.curve, "pending": self.pending}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        optimizer = self.optimizer
        parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "average": {}, "good": {}, "optimizer": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value
        _load(self.module, parts["module"])
        like = _tensors(self.module)
        self.average = {name: _as(value, like[name]) for name, value in parts["average"].items()}
        self.good = {name: _as(value, like[name]) for name, value in parts["good"].items()}
        for name, value in parts["optimizer"].items():
            index, _, slot = name.partition("/")
            parameter = self.learned[int(index)]
            optimizer.state[parameter][slot] = _as(value, parameter) if value.shape == parameter.shape else value
        self.step, self.last = values["step"], values["last"]
        self.curve = [(step, loss) for step, loss in values["curve"]]
        self.pending = list(values["pending"])


def _optimizer(learned: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer by name. Foreach and fused kernels stay off: they may sum in another order."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(learned, settings.lr, momentum=0.9, weight_decay=settings.weight_decay, foreach=False)
    if settings.optimizer == "muon":
        return Muon(learned, settings.lr, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(learned, settings.lr, weight_decay=settings.weight_decay, foreach=False)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers. A `state_dict` may leave some out (a module can decide so from its values)."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in _tensors(module).items()}


def _load(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the module's own tensors, which keep their memory layout."""
    with torch.no_grad():
        for name, value in _tensors(module).items():
            value.copy_(state[name])


def _as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` with the memory layout and device of `like`, so that a resumed run takes the same kernels."""
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)


def _blend(average: dict[str, torch.Tensor], module: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * weights; integers (batch counters) are copied."""
    for name, value in _tensors(module).items():
        if value.is_floating_point():
            average[name].lerp_(value.detach(), 1 - decay)
        else:
            average[name].copy_(value)


def _bad(named: Mapping[str, torch.Tensor]) -> str:
    """Which parts of the loss are not finite, with their values."""
    values = {name: part.item() for name, part in named.items()}
    return ", ".join(f"{name} became {value}" for name, value in values.items() if not math.isfinite(value)) or (
        f"the sum of {', '.join(values)} overflowed"
    )
