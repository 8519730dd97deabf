"""Large windows become small ones with a dilation of their own for each axis and group of output channels.

Liu et al., 2020, Inception Convolution with Efficient Dilation Search (EDO), arXiv:2012.13587: of a kernel that covers
all dilations (2 d + 1 wide), each output channel keeps the taps of the one dilation whose output is nearest in mean
absolute difference. There the large kernels are trained for the search; here they are the network's own. Deviations:
outputs are compared on samples instead of by expectation, each small kernel is scaled to fit, and there are at most
`patterns` dilations in a layer, because each is a convolution of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import graph, training
from edgegen.nn.dilated import Dilated
from edgegen.passes import _swap
from edgegen.passes._swap import Place
from edgegen.types import Job, Model, PassResult

PROBES = ({"patterns": 1, "samples": 1}, {"samples": 1})  # what `edgegen probe` times before any training
Pattern = tuple[int, int]


@dataclass
class _Sums:
    """Of one dilation, for each output channel: sums over samples of |y - z|, y z and z z (z: by the small kernel)."""

    error: Tensor
    cross: Tensor
    power: Tensor


@dataclass
class _Search:
    """One layer's dilations and what they come to."""

    place: Place
    window: int
    sums: dict[Pattern, _Sums] = field(default_factory=dict)

    @property
    def reach(self) -> Pattern:
        """How many pixels the large window looks to each side."""
        high, wide = self.place.layer.kernel_size
        return high // 2, wide // 2

    @property
    def candidates(self) -> list[Pattern]:
        """Dilations whose window lies in the large one."""
        down, across = (range(1, reach // (self.window // 2) + 1) for reach in self.reach)
        return list(itertools.product(down, across))

    def taps(self, pattern: Pattern) -> Tensor:
        """The weights of the large kernel at the places of a dilation: (out, in, window, window)."""
        ends = [(reach - step * (self.window // 2), step) for reach, step in zip(self.reach, pattern, strict=True)]
        (y, down), (x, across) = ends
        high, wide = self.place.layer.kernel_size
        weight: Tensor = self.place.layer.weight.detach()
        return weight[:, :, y : high - y : down, x : wide - x : across]


def dilate(
    model: Model,
    job: Job,
    *,
    window: int = 3,
    patterns: int = 4,
    min_window: int = 5,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    samples: int = 8,
) -> PassResult:
    """Replace dense convolutions of large windows by dilated small ones. Training has to follow.

    Args:
        model: one stage with a module. Not modified.
        window: of the small kernels, odd. patterns: most dilations in a layer; each one is a convolution of its own.
        min_window: convolutions with smaller windows stay.
        layers, skip: names of layers, or of modules for all in them. samples: inputs on which outputs are compared.
    Returns:
        PassResult; `changed` has the dilations with their numbers of channels, `skipped` why the others stay.
    Raises:
        ValueError: an option out of range, a model without a network, or a name that does not exist.
    """
    if window < 3 or window % 2 == 0 or patterns < 1 or min_window <= window:
        raise ValueError("window must be odd and at least 3, patterns at least 1 and min_window above window, got "
                         f"{window}, {patterns} and {min_window}")  # fmt: skip
    module = _swap.network(model, "dilate")
    inputs, source = _swap.samples(model, job, samples)
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, inputs[0], layers=layers, skip=skip, kinds=(nn.Conv2d,))
        searches = {}
        for place in places:
            if reason := _unfit(place, min_window):
                skipped[place.name] = reason
            else:
                searches[place.name] = _Search(place, window)
        _compare(module, searches, inputs)
        parts, changed = {}, {}
        for name, search in searches.items():
            groups = _chosen(search, patterns)
            parts[name] = _swap.dress(_block(search, groups), search.place.layer)
            told = ", ".join(f"{len(own)} of dilation {down}x{across}" for (down, across), own in groups.items())
            high, wide = search.place.layer.kernel_size
            changed[name] = f"{high}x{wide} -> {window}x{window}: {told}"
        new, refused = _swap.replace(module, parts, inputs[0])
        changed = {name: text for name, text in changed.items() if name not in refused}
        return _swap.result(model, module, new, inputs, changed, {**skipped, **refused}, {"inputs": source})


def _unfit(place: Place, min_window: int) -> str:
    """Why a convolution stays, or an empty string."""
    layer = place.layer
    if layer.groups != 1:
        return "grouped convolution"
    if min(layer.kernel_size) < min_window:
        return f"window {'x'.join(map(str, layer.kernel_size))} is below min_window {min_window}"
    if any(size % 2 == 0 for size in layer.kernel_size) or isinstance(layer.padding, str):
        return "an even window, or padding by name"
    return "has a dilation already" if layer.dilation != (1, 1) else ""


def _compare(module: nn.Module, searches: dict[str, _Search], inputs: _swap.Inputs) -> None:
    """Run the samples and sum up how near each dilation of each layer comes."""

    def note(name: str, args: Any, out: Tensor) -> None:
        search = searches[name]
        layer = search.place.layer
        y = out if layer.bias is None else out - layer.bias[:, None, None]
        for pattern in search.candidates:
            z = _bare(search, pattern, layer.weight.shape[0])(args[0])
            found = ((y - z).abs(), y * z, z * z)
            error, cross, power = (value.double().sum((0, 2, 3)) for value in found)
            known = search.sums.setdefault(pattern, _Sums(*(torch.zeros_like(error) for _ in range(3))))
            known.error += error
            known.cross += cross
            known.power += power

    with _swap.hooked({name: search.place.layer for name, search in searches.items()}, note):
        for sample in inputs:
            graph.outputs(module, sample)


def _bare(search: _Search, pattern: Pattern, outputs: int) -> nn.Module:
    """All channels with one dilation, without bias."""
    block = _dilated(search, {pattern: list(range(outputs))}, bias=False)
    block.parts[0].weight.copy_(search.taps(pattern))  # type: ignore[operator]
    return block


def _dilated(search: _Search, groups: dict[Pattern, list[int]], *, bias: bool) -> Dilated:
    layer = search.place.layer
    margin = [pad - reach for pad, reach in zip(layer.padding, search.reach, strict=True)]
    told = [[down, across, own] for (down, across), own in groups.items()]
    return Dilated(layer.in_channels, told, search.window, layer.stride, margin, bias, layer.padding_mode)


def _chosen(search: _Search, most: int) -> dict[Pattern, list[int]]:
    """Dilation -> the output channels that are best off with it; the `most` dilations that suit the most channels."""
    names = list(search.sums)
    errors = torch.stack([search.sums[name].error for name in names])  # (dilations, channels)
    liked = torch.bincount(errors.argmin(0), minlength=len(names))
    kept = sorted(torch.argsort(liked, descending=True, stable=True)[:most].tolist())
    best = errors[kept].argmin(0).tolist()
    groups: dict[Pattern, list[int]] = {}
    for place, name in enumerate(kept):
        if own := [channel for channel, chosen in enumerate(best) if chosen == place]:
            groups[names[name]] = own
    return groups


def _block(search: _Search, groups: dict[Pattern, list[int]]) -> Dilated:
    """The replacement, with the taps of the large kernel, scaled to fit its outputs."""
    layer = search.place.layer
    block = _dilated(search, groups, bias=layer.bias is not None)
    for part, (pattern, own) in zip(block.parts, groups.items(), strict=True):
        sums = search.sums[pattern]
        scale = (sums.cross / sums.power.clamp_min(1e-12))[own].to(layer.weight.dtype)
        part.weight.copy_(search.taps(pattern)[own] * scale[:, None, None, None])  # type: ignore[operator]
        if layer.bias is not None:
            part.bias.copy_(layer.bias[own])  # type: ignore[operator]
    return block
