"""diffusers' networks as denoisers (sample, timestep, label) -> tensor."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgegen.errors import MissingExtra


def network(module: str, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A fresh diffusers network: class `name` of `diffusers.models.<module>`.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise MissingExtra("diffusers", "for this denoiser", "diffusion")
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports trip over deprecations of packages that it only looks for
        logging.disable(logging.WARNING)
        try:
            return getattr(importlib.import_module(f"diffusers.models.{module}"), name)(**config)
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
