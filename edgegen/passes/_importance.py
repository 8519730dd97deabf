"""How much a channel matters: by its weights, by what flows through it, or by what the output does without it.

l1, l2: Li et al., 2017, arXiv:1608.08710. group: Fang et al., 2023, DepGraph, arXiv:2301.12900. fpgm: He et al., 2019,
geometric median, arXiv:1811.00250. activation: Hu et al., 2016, Network Trimming, arXiv:1607.03250. taylor: Molchanov
et al., 2019, arXiv:1906.10771. output_effect: Bau et al., 2019, GAN Dissection, arXiv:1811.10597.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.passes import _removal
from edgegen.passes._groups import Coupled, Key

BY_WEIGHTS = ("l2", "l1", "group", "random", "fpgm")
BY_OUTPUT = ("taylor", "output_effect")  # in units of the output: they compare groups as they are
IMPORTANCE = (*BY_WEIGHTS, "activation", *BY_OUTPUT)
PROJECTIONS = 4  # random directions of the output for each sample
TOGETHER = 8  # units that are switched off side by side, each in a copy of the input

Inputs = Sequence[Sequence[torch.Tensor]]
See = Callable[[str, torch.Tensor], torch.Tensor | None]


def scores(
    module: nn.Module, groups: Sequence[Coupled], kind: str, seed: int, inputs: Inputs,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> list[torch.Tensor]:  # fmt: skip
    """One score a unit for every group, in float64; the smallest go first.

    Args:
        inputs: samples to run, used by "activation", "taylor" and "output_effect" only.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return [torch.rand(len(group.units), generator=generator) for group in groups]
    if kind == "fpgm":
        return [_distances(module, group) for group in groups]
    if kind == "activation":
        return _activations(module, groups, inputs)
    if kind == "taylor":
        return _first_order(module, groups, inputs, generator)
    if kind == "output_effect":
        return _effects(module, groups, inputs, progress)
    return [_norms(module, group, 1 if kind == "l1" else 2, kind == "group") for group in groups]


def _sums(group: Coupled, key: Key, channels: torch.Tensor) -> torch.Tensor:
    """What `channels` (one value each) of a layer add up to for each unit."""
    return torch.stack([channels[list(unit.get(key, ()))].sum() for unit in group.units])


def _norms(module: nn.Module, group: Coupled, power: int, everything: bool) -> torch.Tensor:
    """(sum |w|^p)^(1/p) over the filters that write a unit; with `everything` also over norms and readers."""
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for key in group.keys:
        part = _removal.part_at(module, key[0])
        slices = _removal.weight_slices(part, key[1])
        if slices is None or not (everything or _writes(module, key)):
            continue
        total += _sums(group, key, slices.double().abs().pow(power).sum(1))
    return total.pow(1 / power)


def _writes(module: nn.Module, key: Key) -> bool:
    return key[1] == "out" and isinstance(_removal.part_at(module, key[0]), graph.WEIGHTED)


def _readers(module: nn.Module, group: Coupled) -> list[Key]:
    """Layers that read the units and can be told which of their inputs they are."""
    return [
        key for key in group.keys
        if key[1] == "in" and isinstance(_removal.part_at(module, key[0]), graph.WEIGHTED)
        and _removal.weight_slices(_removal.part_at(module, key[0]), "in") is not None
    ]  # fmt: skip


def _distances(module: nn.Module, group: Coupled) -> torch.Tensor:
    """How far the filters of a unit are from all others: those next to the geometric median can be made up for."""
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for key in group.keys:
        slices = _removal.weight_slices(_removal.part_at(module, key[0]), key[1])
        if slices is not None and _writes(module, key):
            total += _sums(group, key, torch.cdist(slices.double(), slices.double()).sum(1))
    return total


@contextmanager
def _given(module: nn.Module, paths: Sequence[str], see: See) -> Iterator[None]:
    """Show what layers are given to `see`, which may give them something else."""
    def hook(path: str, args: tuple) -> tuple | None:
        new = see(path, args[0])
        return None if new is None else (new, *args[1:])

    handles = [
        module.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: hook(path, args))
        for path in paths
    ]
    with graph.hooked(handles):
        yield


def _activations(module: nn.Module, groups: Sequence[Coupled], inputs: Inputs) -> list[torch.Tensor]:
    """Mean absolute value of a unit where it is read, over samples and places; by its filters where none reads it."""
    readers = [_readers(module, group) for group in groups]
    means: dict[str, torch.Tensor] = {}

    def see(path: str, x: torch.Tensor) -> None:
        axis = x.ndim - 1 if isinstance(module.get_submodule(path), nn.Linear) else 1
        mean = x.detach().abs().double().mean([d for d in range(x.ndim) if d != axis])
        means[path] = means.get(path, 0.0) + mean / len(inputs)

    with _given(module, sorted({path for keys in readers for path, _ in keys}), see):
        for sample in inputs:
            graph.outputs(module, sample)
    return [
        torch.stack([_sums(group, key, means[key[0]]) for key in keys if key[0] in means]).sum(0) / len(keys)
        if any(key[0] in means for key in keys) else _norms(module, group, 1, False)
        for group, keys in zip(groups, readers, strict=True)
    ]  # fmt: skip


def _first_order(
    module: nn.Module, groups: Sequence[Coupled], inputs: Inputs, generator: torch.Generator
) -> list[torch.Tensor]:
    """The squared change of the output when a unit is switched off, to first order: E (v^T J w)^2 over random v.

    Gradient times weight of a loss against the teacher's output is 0 where the network still is its teacher; its
    second order there is J^T J, which random signs v of the outputs measure: (sum of w * d(v^T f)/dw)^2, over the
    columns that read a unit (the same as activation times gradient), or over its filters where none does.
    """
    net: Any = graph.clone(module).eval().requires_grad_(True)
    chosen = [_readers(net, group) or [key for key in group.keys if _writes(net, key)] for group in groups]
    paths = sorted({path for keys in chosen for path, _ in keys})
    weights = [net.get_submodule(path).weight for path in paths]
    totals = [torch.zeros(len(group.units), dtype=torch.float64) for group in groups]
    for sample in inputs:
        with torch.enable_grad():
            outs = graph.flatten(net(*sample))
        for turn in range(PROJECTIONS):
            signs = [torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1 for out in outs]
            with torch.enable_grad():
                value = torch.stack([(out * v).sum() for out, v in zip(outs, signs, strict=True)]).sum()
            found = torch.autograd.grad(value, weights, retain_graph=turn < PROJECTIONS - 1, allow_unused=True)
            products = {path: (w.detach() * g).double() for path, w, g in zip(paths, weights, found) if g is not None}
            for total, group, keys in zip(totals, groups, chosen, strict=True):
                total += _products(net, group, keys, products).square() / (len(inputs) * PROJECTIONS)
    return totals


def _products(
    net: nn.Module, group: Coupled, keys: Sequence[Key], products: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for path, side in keys:
        if path in products:
            slices = _removal.weight_slices(net.get_submodule(path), side, products[path])
            if slices is not None:
                total += _sums(group, (path, side), slices.sum(1))
    return total


def _effects(
    module: nn.Module, groups: Sequence[Coupled], inputs: Inputs, progress: Callable[[str, float], None]
) -> list[torch.Tensor]:
    """The squared change of the output when a unit is switched off where it is read, summed over samples."""
    wanted = [graph.outputs(module, sample) for sample in inputs]
    found, done, count = [], 0, sum(len(group.units) for group in groups)
    for group in groups:
        readers = _readers(module, group)
        if not readers:
            found.append(_norms(module, group, 2, False))
            continue
        score = torch.zeros(len(group.units), dtype=torch.float64)
        for start in range(0, len(group.units), TOGETHER):
            at = list(range(start, min(start + TOGETHER, len(group.units))))
            progress(f"unit {done + start} of {count}", (done + start) / count)
            for sample, outs in zip(inputs, wanted, strict=True):
                score[at] += _without(module, group, readers, at, sample, outs)
        found.append(score)
        done += len(group.units)
    return found


def _without(
    module: nn.Module, group: Coupled, readers: Sequence[Key], at: Sequence[int], sample: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Squared change of the outputs without each of the units `at`, in one run: a copy of the input for each."""
    def see(path: str, x: torch.Tensor) -> torch.Tensor:
        axis = x.ndim - 1 if isinstance(module.get_submodule(path), nn.Linear) else 1
        x = x.clone()
        each = x.shape[0] // len(at)
        for place, unit in enumerate(at):
            indices = torch.tensor(group.units[unit].get((path, "in"), ()), dtype=torch.long)
            x[place * each : (place + 1) * each].index_fill_(axis, indices, 0.0)
        return x

    copies = [torch.cat([x] * len(at)) for x in sample]
    try:
        with _given(module, [path for path, _ in readers], see):
            outs = graph.outputs(module, copies)
    except RuntimeError:
        if len(at) == 1:
            raise
        outs = ()  # the network takes one sample at a time
    if not outs or any(out.shape[0] != len(at) * want.shape[0] for out, want in zip(outs, wanted, strict=True)):
        return torch.cat([_without(module, group, readers, [unit], sample, wanted) for unit in at])
    total = torch.zeros(len(at), dtype=torch.float64)
    for out, want in zip(outs, wanted, strict=True):
        change = out.reshape(len(at), *want.shape) - want
        total += change.double().square().flatten(1).sum(1)
    return total
