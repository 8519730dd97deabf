"""The state of a training run, saved and restored exactly.

Restored tensors take the memory layout they had: vectorised and strided kernels round differently, and a resumed run
must end with the same bits. The file is safetensors with JSON in its header, never a pickle.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from edgegen import files
from edgegen.errors import RecipeError
from edgegen.training import distributed

log = logging.getLogger(__name__)

State = tuple[dict[str, torch.Tensor], dict[str, Any]]


class Checkpoint:
    """A file that holds the state of one run; `key` says which run, so that another's file is not continued.

    identity: what the run was asked to do, by name; with it another run's file is refused instead of passed over.
    """

    def __init__(
        self, path: Path | None, every_s: float, key: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.every_s = path, every_s
        self.key, self.identity = files.key(key, identity) if identity else key, dict(identity or {})
        self.saved = time.monotonic()

    def load(self) -> State | None:
        """The state to continue from, or None; a damaged file or another run's is logged and not used.

        Raises:
            RecipeError: another run's file where this run has an identity; the message names what differs.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            log.warning("%s cannot be read (%s); training starts anew", self.path, error)
            return None
        if header["key"] != self.key and self.identity:
            raise RecipeError(
                f"{self.path} belongs to another training ({self._differences(header.get('identity') or {})}); give the"
                " command that was interrupted, or start anew without resuming"
            )
        if header["key"] != self.key:
            log.warning("%s belongs to a training with other settings; training starts anew", self.path)
            return None
        return tensors, header

    def _differences(self, other: Mapping[str, Any]) -> str:
        """What the identity of another run has differently, in words."""
        names = [name for name in {**other, **self.identity} if other.get(name) != self.identity.get(name)]
        told = [f"{name} {other[name]} there, {self.identity[name]} here" for name in names
                if name in other and name in self.identity]  # fmt: skip
        return "; ".join(told) or "of another version of edgegen"

    def save_if_due(self, state: Callable[[], State]) -> None:
        """Write the state whole when `every_s` seconds have gone by since the last time."""
        if self.path is None or time.monotonic() - self.saved < self.every_s or not distributed.first():
            return
        tensors, values = state()
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        header = json.dumps({**values, "key": self.key, "identity": self.identity})
        with files.whole(self.path) as temporary:
            safetensors.torch.save_file(plain, temporary, {"state": header})
        self.saved = time.monotonic()


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers. A `state_dict` may leave some out (a module can decide so from its values)."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors_of(module).items()}


def load(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the module's own tensors, which keep their memory layout."""
    with torch.no_grad():
        for name, value in tensors_of(module).items():
            value.copy_(state[name])


def alike(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` with the memory layout and device of `like`, so that a resumed run takes the same kernels."""
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)


def blend(average: dict[str, torch.Tensor], module: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * weights; integers (batch counters) are copied."""
    for name, value in tensors_of(module).items():
        if value.is_floating_point():
            average[name].lerp_(value.detach(), 1 - decay)
        else:
            average[name].copy_(value)


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under names that begin with "prefix/"."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def by_prefix(tensors: Mapping[str, torch.Tensor], prefixes: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `with_prefix`: first part of the name -> rest of it -> tensor; empty for a prefix without any."""
    parts: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in prefixes}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = value
    return parts
