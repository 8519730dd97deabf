"""diffusers' networks as denoisers (sample, timestep, label) -> tensor, and the config.json of its model folders."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgegen.errors import MissingExtra, ModelError


def network(module: str, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A fresh diffusers network: class `name` of `diffusers.models.<module>`.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    with _quiet():
        return _class(module, name)(**config)


def record(base: Mapping[str, Any], shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """A denoiser's record for samples (1, C, H, W): grey or colour images in -1..1, other C: latents, of any range."""
    told = {"kind": "latent"} if shape[1] not in (1, 3) else {"value_range": [-1, 1]}
    sampler = {**options["sampler"], **({"clip": 0} if "kind" in told else {})}
    return {
        **base, "input": {"shape": list(shape)}, "output": {"shape": list(shape), **told},
        "options": {**options, "sampler": sampler},
    }  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """How a network of this folder stands in a model folder of diffusers.

    module, name: its class there. config: our arguments -> the fields of config.json that they decide. arguments: the
    inverse, of a config.json with all its fields. free: fields that do not change what the network computes.
    """

    module: str
    name: str
    config: Callable[..., dict[str, Any]]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    free: frozenset[str] = frozenset()
    older: tuple[str, ...] = ()  # names of the class in older files


def arguments(folder: Folder, found: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create` for a config.json, those that the user states before them.

    Raises:
        ModelError: another class, or a field that would compute something else than the network can. MissingExtra.
    """
    name = found.get("_class_name")
    if name not in (folder.name, *folder.older):
        raise ModelError(f"config.json is of {name}; this network is diffusers' {folder.name}")
    with _quiet():
        parameters = inspect.signature(_class(folder.module, folder.name).__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if value.default is not inspect.Parameter.empty}
    given = {key: value for key, value in found.items() if not key.startswith("_")}
    try:
        told = {**folder.arguments({**defaults, **given}), **stated}
        made = {**defaults, **folder.config(**told)}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"config.json: a field of {name} is missing or of another kind ({error})") from error
    for key, value in {**defaults, **given}.items():
        if key in folder.free or (key not in made and value in (None, False, "default")):  # what newer ones lack is off
            continue
        if key not in made or _plain(made[key]) != _plain(value):
            here = f"{made[key]!r} here" if key in made else "unknown here"
            raise ModelError(f"config.json: {key} is {value!r} there and {here}; the network would compute something"
                             " else")  # fmt: skip
    return told


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _class(module: str, name: str) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        raise MissingExtra("diffusers", "for this network", "diffusion")
    return getattr(importlib.import_module(f"diffusers.models.{module}"), name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Its own imports trip over deprecations of packages that it only looks for."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


class Denoiser(nn.Module):
    """A diffusers network that takes tensors alone and gives one tensor.

    sample (N, C, H, W), timestep (N,) float32 on the scale of the training steps, label (N,) float32 that counts
    classes (the number of classes means none of them) where the network has any.
    """

    def __init__(self, net: nn.Module, *, labelled: bool, learned_sigma: bool = False) -> None:
        super().__init__()
        self.net, self.labelled, self.learned_sigma = net, labelled, learned_sigma

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.labelled:
            classes = label.long() if label is not None else None
            made = self.net(sample, timestep, class_labels=classes, return_dict=False)[0]
        else:
            made = self.net(sample, timestep, return_dict=False)[0]
        return made[:, : sample.shape[1]] if self.learned_sigma else made
