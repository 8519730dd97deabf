"""What a student learns from: its teacher's outputs and inner maps, reference images, labels.

Hinton et al., 2015, Distilling the Knowledge, arXiv:1503.02531 (softened logits); Romero et al., 2015, FitNets,
arXiv:1412.6550 (regression of inner maps); Miles et al., 2024, V_kD, arXiv:2403.06213 (orthogonal projection and
normalised teacher maps; deviation: the student's projected maps are normalised too, as a student cut out of its teacher
has layers after them that expect their scale, which V_kD's students learn from nothing); Zhang et al., 2018,
arXiv:1801.03924 (perceptual distance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PROJECTIONS = ("conv", "orthogonal")
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def absolute(student: torch.Tensor, teacher: torch.Tensor, span: float = 1.0) -> torch.Tensor:
    """Mean absolute difference in units of `span` (the width of the output's value range)."""
    return (student.float() - teacher.float()).abs().mean() / span


def squared(student: torch.Tensor, teacher: torch.Tensor, span: float = 1.0) -> torch.Tensor:
    """Mean squared difference in units of `span` squared."""
    return (student.float() - teacher.float()).pow(2).mean() / span**2


def decibels(student: torch.Tensor, teacher: torch.Tensor, span: float = 1.0) -> torch.Tensor:
    """Minus the mean PSNR over the images (N, C, H, W), in units of 10 dB: easy images count as much as hard ones."""
    error = (student.float() - teacher.float()).pow(2).flatten(1).mean(1) / span**2
    return error.clamp_min(1e-8).log10().mean()


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """KL(teacher || student) of logits (N, classes) softened by `temperature`, times temperature^2; 0 when equal."""
    target = F.log_softmax(teacher.float() / temperature, 1)
    found = F.log_softmax(student.float() / temperature, 1)
    return F.kl_div(found, target, log_target=True, reduction="batchmean") * temperature**2


def cross_entropy(student: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits (N, classes) against class indices (N,)."""
    return F.cross_entropy(student.float(), label)


def perceptual(encoder: Callable[[torch.Tensor], Any], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of unit-length feature vectors, averaged over the encoder's maps; 0 when equal.

    Args:
        encoder: images (N, 3, H, W) in 0..1 -> maps (N, C, h, w), or (maps, pooled).
        student, teacher: images (N, 1 or 3, H, W) in 0..1; smaller ones than 32 pixels are enlarged.
    """
    first, second = (_maps(encoder, images) for images in (student, teacher))
    parts = [(_unit(a) - _unit(b)).pow(2).sum(1).mean() for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).mean()


def _maps(encoder: Callable[[torch.Tensor], Any], images: torch.Tensor) -> list[torch.Tensor]:
    images = images.float().clamp(0, 1)
    if (scale := 32 / min(images.shape[2:])) > 1:
        images = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    found = encoder(images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1))
    if isinstance(found, tuple):
        found = found[0]
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _unit(maps: torch.Tensor) -> torch.Tensor:
    return maps.float() / maps.float().pow(2).sum(1, keepdim=True).add(1e-10).sqrt()


class FeatureLoss(nn.Module):
    """Regression of a few inner maps of the teacher from those of the student.

    A name is a module's in both, or "STUDENT=TEACHER" where they differ. Call it after both networks ran; the maps are
    caught by hooks. Where channels differ, a 1x1 projection (student to teacher) is learned along; `projections` holds
    them.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, names: Sequence[str], projection: str = "conv",
        widths: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """widths: name -> channels of student and teacher, for modules that are not layers themselves."""
        super().__init__()
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        self.names, self.normalised = tuple(names), projection == "orthogonal"
        self.projections = nn.ModuleDict()
        self._student: dict[str, torch.Tensor] = {}
        self._teacher: dict[str, torch.Tensor] = {}
        nets = ((student, self._student), (teacher, self._teacher))
        self._handles = [
            _catch(net.get_submodule(part), name, caught)
            for name in self.names for (net, caught), part in zip(nets, sides(name), strict=True)
        ]  # fmt: skip
        for name in self.names:
            layers = (net.get_submodule(part) for net, part in zip((student, teacher), sides(name), strict=True))
            a, b = (widths or {}).get(name) or tuple(_channels(layer) for layer in layers)
            if a != b or self.normalised:
                self.projections[name.replace(".", "/")] = _projection(a, b, projection)

    def forward(self) -> torch.Tensor:
        """Mean over the pairs of the squared error relative to the teacher's mean square; 0 when equal."""
        return torch.stack([self._pair(name) for name in self.names]).mean()

    def _pair(self, name: str) -> torch.Tensor:
        found, target = (_channels_last(maps[name].float()) for maps in (self._student, self._teacher))
        key = name.replace(".", "/")
        if key in self.projections:
            with torch.autocast(found.device.type, enabled=False):
                found = self.projections[key](found)
        if self.normalised:
            found, target = (F.layer_norm(maps, maps.shape[-1:]) for maps in (found, target))
        return (found - target).pow(2).mean() / target.pow(2).mean().clamp_min(1e-8)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def sides(name: str) -> tuple[str, str]:
    """The modules of student and teacher that a name stands for: "STUDENT=TEACHER", or one that both have."""
    student, _, teacher = name.partition("=")
    return student, teacher or student


def _catch(part: nn.Module, name: str, caught: dict[str, torch.Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        caught[name] = out

    return part.register_forward_hook(keep)


def _channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _channels_last(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H, W, C); token sequences (N, T, C) are that already."""
    return maps.movedim(1, -1) if maps.ndim == 4 else maps


def _projection(inside: int, outside: int, kind: str) -> nn.Module:
    """A linear map over channels; an orthogonal one keeps the student's distances."""
    layer = nn.Linear(inside, outside, bias=False)
    return nn.utils.parametrizations.orthogonal(layer) if kind == "orthogonal" else layer


def pairs(
    student: nn.Module, teacher: nn.Module, inputs: Sequence[torch.Tensor], *, count: int = 4
) -> tuple[str, ...]:
    """Names of up to `count` convolution or linear layers, evenly spread over the depth, whose maps can be compared.

    They are called once and give maps (N, C, H, W) or (N, T, C) of equal size but for the channels, under one name in
    both networks; where none has, of each size the layers at the same share of that size's depth ("STUDENT=TEACHER").
    The last one is left out: it is the output.
    """
    a, b = _shapes(student, inputs), _shapes(teacher, inputs)
    if not any(_place(shape) == _place(b.get(name, ())) is not None for name, shape in a.items()):
        return _by_depth(a, b, count)
    fitting = [name for name, shape in a.items() if name in b and _place(shape) == _place(b[name]) is not None]
    fitting = fitting[:-1]
    # Maps of one width need no projection, and where only the inside of blocks was pruned they are its trunk.
    same = [name for name in fitting if a[name] == b[name]]
    fitting = same if len(same) >= count else fitting
    return tuple(_spread(fitting, count))


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of them, evenly spread, the last one among them."""
    count = min(count, len(items))
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


def _by_depth(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]], count: int) -> tuple[str, ...]:
    """Pairs of layers of two networks that share no names: first of the last layers of each size, then inside sizes."""
    grouped: list[dict[Any, list[str]]] = [{}, {}]
    for group, shapes in zip(grouped, (a, b), strict=True):
        for name in list(shapes)[:-1]:
            if (place := _place(shapes[name])) is not None:
                group.setdefault(place, []).append(name)
    shared = _spread([place for place in grouped[0] if place in grouped[1]], count)
    found = []
    for place in shared:
        both = [group[place] for group in grouped]
        each = min(count // len(shared), *(len(names) for names in both))
        found += ["=".join(pair) for pair in zip(*(_spread(names, each) for names in both), strict=True)]
    return tuple(found)


def named_pairs(
    student: nn.Module, teacher: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Name (as in `FeatureLoss`) -> channels of student and teacher for modules of the user's choice.

    Raises:
        ValueError: a name that one of the two does not have, or maps that cannot be compared.
    """
    found = {}
    for name in names:
        mine, theirs = sides(name)
        a, b = (_shapes(net, inputs, (part,)).get(part) for net, part in ((student, mine), (teacher, theirs)))
        if a is None or b is None:
            raise ValueError(f"feature layer {name!r} is not called once in student and teacher; give a name of both,"
                             " or STUDENT=TEACHER")  # fmt: skip
        if _place(a) is None or _place(a) != _place(b):
            raise ValueError(f"feature layer {name!r} gives {a} in the student and {b} in the teacher; give another")
        found[name] = (a[1 if len(a) == 4 else 2], b[1 if len(b) == 4 else 2])
    return found


def _place(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Size without channels of a map, None for what is no map."""
    return {4: shape[2:], 3: shape[1:2]}.get(len(shape))


def _shapes(
    net: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> output shape of each layer (or module in `names`) that ran exactly once, in the order of running."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(name: str, out: torch.Tensor) -> None:
        seen.setdefault(name, []).append(tuple(out.shape))

    handles = [
        part.register_forward_hook(lambda part, args, out, name=name: note(name, out))
        for name, part in net.named_modules()
        if (name in names if names else isinstance(part, WEIGHTED))
    ]
    try:
        with torch.no_grad():
            net(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: shapes[0] for name, shapes in seen.items() if len(shapes) == 1}
