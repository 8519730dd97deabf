"""Losses between inner maps of student and teacher that need no equal widths, and one between their weights.

attention: Zagoruyko and Komodakis, 2017, Paying More Attention to Attention, arXiv:1612.03928, its activation maps.
relations: how places of a map relate to each other, as in Hybrid Distillation (Shi et al., 2023, arXiv:2306.15876) and
RKD (Park et al., 2019, arXiv:1904.05068). Deviation: cosines of the outputs of layers, compared by their squared
difference, instead of the softmax of queries and keys; so it serves convolutions too.
contrast: PCD (Huang and Guo, 2023, Pixel-Wise Contrastive Distillation, arXiv:2211.00218). Deviation: the other pixels
are those of the batch instead of a queue, and the student's projection is one linear map.
weights: PELA (Guo et al., 2024, arXiv:2310.10700), its regularised weight perturbation: the matrix that a factorised
layer stands for may not go far from the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgegen.nn.losses import FeatureLoss

TOKENS = 256  # places of a map whose relations are compared; larger maps are averaged down
PIXELS = 64  # places of a map that are contrasted
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def attention(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the unit-length attention maps, sum of squares over the channels; 0 when equal.

    Args:
        student, teacher: maps (N, C, H, W) or tokens (N, T, C) of equal places; the channels may differ.
    """
    first, second = (F.normalize(_tokens(maps).pow(2).sum(2), dim=1) for maps in (student, teacher))
    return (first - second).pow(2).sum(1).mean()


def relations(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosines between all pairs of places, in 0..4; 0 when equal."""
    first, second = (F.normalize(_tokens(maps, TOKENS), dim=2) for maps in (student, teacher))
    return (first @ first.transpose(1, 2) - second @ second.transpose(1, 2)).pow(2).mean()


def contrast(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """Cross entropy of finding, for each pixel of the student, the teacher's same pixel among all of the batch.

    0 when each pixel is like its counterpart and unlike all others; not 0 for equal maps whose pixels are alike.

    Args:
        student, teacher: maps or tokens of equal places and channels.
    """
    first, second = (F.normalize(_tokens(maps, PIXELS), dim=2).flatten(0, 1) for maps in (student, teacher))
    return F.cross_entropy(first @ second.T / temperature, torch.arange(len(first), device=first.device))


def _tokens(maps: torch.Tensor, limit: int = 0) -> torch.Tensor:
    """(N, C, H, W) or (N, T, C) -> (N, places, C), float32; at most about `limit` places, 0: all."""
    if maps.ndim == 4:
        maps = maps.float()
        height, width = maps.shape[2:]
        if limit and height * width > limit:
            shrink = (limit / (height * width)) ** 0.5
            maps = F.adaptive_avg_pool2d(maps, (max(1, int(height * shrink)), max(1, int(width * shrink))))
        return maps.flatten(2).transpose(1, 2)
    tokens = maps.float()
    if limit and tokens.shape[1] > limit:
        tokens = F.adaptive_avg_pool1d(tokens.transpose(1, 2), limit).transpose(1, 2)
    return tokens


KINDS = {"attention": attention, "relations": relations, "contrast": contrast}


class MapLoss(FeatureLoss):
    """One of KINDS over a few pairs of maps, caught as `FeatureLoss` catches them. Call it after both networks ran."""

    def __init__(
        self, kind: str, student: nn.Module, teacher: nn.Module, names: Sequence[str],
        widths: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(student, teacher, names, "conv", widths)
        self.kind = kind
        if kind != "contrast":  # only this one compares the channels themselves
            self.projections = nn.ModuleDict()

    def _pair(self, name: str) -> torch.Tensor:
        found, target = self._student[name].float(), self._teacher[name].float()
        key = name.replace(".", "/")
        with torch.autocast(found.device.type, enabled=False):
            if key in self.projections:
                axis = 1 if found.ndim == 4 else 2
                found = self.projections[key](found.movedim(axis, -1)).movedim(-1, axis)
            return KINDS[self.kind](found, target)


def recovered(module: nn.Module) -> torch.Tensor | None:
    """The matrix (outputs, inputs * kernel) that a layer, or a chain of two that has taken its place, stands for.

    None where there is none: grouped or transposed convolutions, more than two layers, or two with kernels.
    """
    layers: list[Any] = [part for part in module.modules() if isinstance(part, _LAYERS)]
    if not layers or len(layers) > 2 or any(
        getattr(layer, "groups", 1) != 1 or isinstance(layer, nn.ConvTranspose2d) for layer in layers
    ):  # fmt: skip
        return None
    first, *rest = (layer.weight for layer in layers)
    if not rest:
        return first.flatten(1)
    (second,) = rest
    if second.flatten(1).shape[1] != first.shape[0]:  # the second has a kernel of its own, or other inputs
        return None
    return second.flatten(1) @ first.flatten(1)


def weight_pairs(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Names of the teacher's layers whose matrix the student still has, whole or factorised."""
    own, found = dict(student.named_modules()), []
    for name, layer in teacher.named_modules():
        if isinstance(layer, _LAYERS) and name in own:
            mine, theirs = recovered(own[name]), recovered(layer)
            if mine is not None and theirs is not None and mine.shape == theirs.shape:
                found.append(name)
    return tuple(found)


def weight_distance(student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> torch.Tensor:
    """Mean over the layers of ||W - W_teacher||^2 / ||W_teacher||^2; 0 when equal."""
    parts = []
    for name in names:
        mine, theirs = recovered(student.get_submodule(name)), recovered(teacher.get_submodule(name))
        if mine is not None and theirs is not None:
            parts.append((mine - theirs).pow(2).sum() / theirs.pow(2).sum().clamp_min(1e-8))
    return torch.stack(parts).mean()
