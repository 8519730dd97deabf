"""Inner maps of a generator as something for another network to learn from.

Li et al., 2023, DreamTeacher: Pretraining Image Backbones with Deep Generative Models, arXiv:2307.07487: a pyramid on
the student's maps predicts the generator's, which are normalised, and their attention maps. Deviations: no pooling
pyramid at the smallest map, and the attention maps are compared by their squared distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgegen.nn import losses_maps

WIDTH = 64  # channels of the pyramid
ATTENTION = 10.0  # weight of the attention maps beside the squared error, the paper's
LEVELS = 4
Size = tuple[int, int]


def as_map(out: Any) -> torch.Tensor | None:
    """(N, C, H, W) as it is, tokens (N, T, C) of a square (and one more in front) as a map; None for anything else."""
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        return None
    if out.ndim == 3:
        side = int(out.shape[1] ** 0.5)
        if out.shape[1] - side * side not in (0, 1):
            return None
        out = out[:, out.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    return out if out.ndim == 4 and min(out.shape[2:]) > 1 else None


def stages(network: nn.Module, run: Callable[[], Any]) -> dict[Size, tuple[str, int]]:
    """(H, W) -> the module whose map of that size is the last, and its channels; up to LEVELS sizes, the small ones.

    Modules that run more than once, and maps of the output's own shape, are left out. run: calls the network once.
    """
    seen: dict[str, list[torch.Size]] = {}

    def note(name: str, out: Any) -> None:
        if (found := as_map(out)) is not None:
            seen.setdefault(name, []).append(found.shape[1:])

    handles = [
        part.register_forward_hook(lambda part, args, out, name=name: note(name, out))
        for name, part in network.named_modules() if name
    ]  # fmt: skip
    try:
        with torch.no_grad():
            made = run()
    finally:
        for handle in handles:
            handle.remove()
    own = {tuple(out.shape[1:]) for out in (made if isinstance(made, tuple | list) else (made,))}
    last = {}
    for name, shapes in seen.items():  # in the order of their ends: a stage after its blocks
        if len(shapes) == 1 and tuple(shapes[0]) not in own:
            last[(shapes[0][1], shapes[0][2])] = name, shapes[0][0]
    return dict(sorted(last.items())[:LEVELS])


class Caught:
    """The maps of `stages`, kept each time the network runs."""

    def __init__(self, network: nn.Module, found: Mapping[Size, tuple[str, int]]) -> None:
        self.maps: dict[Size, torch.Tensor] = {}
        self._handles = [
            network.get_submodule(name).register_forward_hook(self._keeper(size)) for size, (name, _) in found.items()
        ]

    def _keeper(self, size: Size) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            found = as_map(out)
            if found is not None:
                self.maps[size] = found

        return keep

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class Pyramid(nn.Module):
    """Predicts the generator's maps from the student's: each level sees its own map and all smaller ones."""

    def __init__(self, student: Mapping[Size, int], generator: Mapping[Size, int]) -> None:
        """Sizes -> channels of both."""
        super().__init__()
        self.own, self.wanted = sorted(student), sorted(generator)
        self.lateral = nn.ModuleList(nn.Conv2d(student[size], WIDTH, 1) for size in self.own)
        self.head = nn.ModuleList(nn.Conv2d(WIDTH, generator[size], 3, padding=1) for size in self.wanted)

    def forward(self, maps: Mapping[Size, torch.Tensor]) -> list[torch.Tensor]:
        """One map for each of the generator's, the smallest first."""
        levels: list[torch.Tensor] = []
        for size, lateral in zip(self.own, self.lateral, strict=True):
            found = lateral(maps[size].float())
            levels.append(found + F.interpolate(levels[-1], size=size) if levels else found)
        made = []
        for size, head in zip(self.wanted, self.head, strict=True):
            nearest = min(range(len(self.own)), key=lambda i: (abs(self.own[i][0] - size[0]), -i))
            found = levels[nearest]
            if self.own[nearest] != size:
                found = F.interpolate(found, size=size, mode="bilinear", align_corners=False, antialias=True)
            made.append(head(found))
        return made


def distance(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the levels of the squared error to the normalised maps plus ATTENTION times that of attention maps."""
    parts = []
    for a, b in zip(found, wanted, strict=True):
        target = F.layer_norm(b.float(), b.shape[1:])
        parts.append((a.float() - target).square().mean() + ATTENTION * losses_maps.attention(a, target))
    return torch.stack(parts).mean()
