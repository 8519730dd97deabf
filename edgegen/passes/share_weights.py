"""Successive blocks of one shape share one set of weights: smaller files, never fewer MACs.

Shen et al., 2022, Sliced Recursive Transformer, arXiv:2111.05297: blocks are applied again instead of having weights of
their own. Deviations: the shared weights of a trained network are the mean of those that they replace, pairs are the
neighbours that are nearest to each other, and nothing is sliced into groups. The exporter writes equal weights once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, registry, training
from edgegen.passes import _swap
from edgegen.types import Job, Model, PassResult

_CONTAINERS = (nn.Sequential, nn.ModuleList)
NOT_PROBED = "it saves size and never time"


def share_weights(
    model: Model,
    job: Job,
    *,
    ratio: float = 0.25,
    groups: Sequence[Sequence[str]] = (),
    norms: bool = True,
    skip: Sequence[str] = (),
    samples: int = 2,
) -> PassResult:
    """Let blocks share weights: the given `groups`, or neighbours until a `ratio` of them has none of its own.

    Args:
        model: one stage with a module. Not modified.
        ratio: share of the blocks that could take a neighbour's weights to do so, in [0, 1), rounded down, but at least
            one unless it is 0; not used with `groups`.
        groups: [[names of blocks], ...]; the blocks of a group have one class and the same shapes.
        norms: share the norms too. Without, each block keeps its own, which costs little; but a batch norm is folded
            into its convolution at export, and then the file has the weights twice again.
        skip: blocks that keep their weights. samples: inputs on which outputs are compared.
    Returns:
        PassResult; `changed` has every layer with shared weights and the relative squared distance of the weights from
        their mean, `skipped` why the others have their own. Latency stays: `notes` says so.
    Raises:
        ValueError: an option out of range, a model without a network, or a group that cannot share.
    """
    _swap.check_share("ratio", ratio)
    module = _swap.network(model, "share_weights")
    inputs, source = _swap.samples(model, job, samples)
    rows = candidates(module)
    known = [name for row in rows for name in row]
    for name in (*(name for group in groups for name in group), *skip):
        if name not in known:
            there = f"{registry.near(name, known)}; there are: {', '.join(known) or 'none'}"
            raise ValueError(f"no block {name!r} in {model.name} that could share its weights{there}")
    _check_groups(module, groups)
    chosen = [list(group) for group in groups] or _nearest(module, rows, ratio, set(skip))
    result = graph.clone(module).eval()
    changed: dict[str, str] = {}
    with torch.no_grad(), training.use_threads(job.threads):
        for group in chosen:
            changed |= _share(result, group, norms)
        skipped = {
            layer: "its block keeps its weights" if any(layer.startswith(f"{name}.") for name in known)
            else "is in no block with a neighbour of the same class and shapes"
            for layer in graph.layers(module) if layer not in changed
        }  # fmt: skip
        notes = {"groups": chosen, "blocks": len(known), "inputs": source, "gain": "size only; latency stays"}
        return _swap.result(model, module, result, inputs, changed, skipped, notes)


def candidates(module: nn.Module) -> list[list[str]]:
    """Runs of two or more neighbours in one container with one class, the same shapes and the same settings."""
    rows: list[list[str]] = []
    for path, parent in module.named_modules():
        if not isinstance(parent, _CONTAINERS):
            continue
        row: list[str] = []
        for name, part in parent.named_children():
            full = f"{path}.{name}".lstrip(".")
            fits = bool(graph.layers(part)) and any(part.children())
            if row and fits and _form(part) == _form(module.get_submodule(row[-1])):
                row.append(full)
                continue
            rows, row = [*rows, row], [full] if fits else []
        rows.append(row)
    rows = [row for row in rows if len(row) > 1]
    names = [name for row in rows for name in row]
    return [row for row in rows if not any(row[0].startswith(f"{name}.") for name in names)]  # outer ones first


def _form(part: nn.Module) -> list[Any]:
    """Classes, shapes and plain attributes of a block and all in it: equal for blocks that compute alike."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (name, type(inner).__name__, {k: v for k, v in vars(inner).items() if isinstance(v, plain)},
         {k: tuple(v.shape) for k, v in (*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False))})
        for name, inner in part.named_modules()
    ]  # fmt: skip


def _check_groups(module: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    named = [name for group in groups for name in group]
    for group in groups:
        if isinstance(group, str) or len(group) < 2:
            raise ValueError(f"groups must be lists of two or more blocks, got {group!r}")
        for name in group:
            if named.count(name) > 1:
                raise ValueError(f"block {name!r} is named twice in groups")
            if _form(module.get_submodule(name)) != _form(module.get_submodule(group[0])):
                raise ValueError(f"blocks {group[0]!r} and {name!r} differ in shapes or settings and cannot share")


def _nearest(module: nn.Module, rows: Sequence[Sequence[str]], ratio: float, skip: set[str]) -> list[list[str]]:
    """Neighbours joined into groups, the nearest first, until a ratio of the blocks lost their own weights."""
    pairs = [(a, b) for row in rows for a, b in itertools.pairwise(row) if not {a, b} & skip]
    pairs.sort(key=lambda pair: _distance(*(module.get_submodule(name) for name in pair)))
    able = sum(len(row) - 1 for row in rows)  # in each row one has to keep its weights
    count = max(1, int(ratio * able)) if ratio and able else 0
    groups: list[list[str]] = []
    for a, b in pairs[:count]:
        left = next((group for group in groups if a in group), [a])
        right = next((group for group in groups if b in group), [b])
        groups = [group for group in groups if group is not left and group is not right] + [left + right]
    return sorted(groups)


def _layers(block: nn.Module) -> dict[str, Any]:
    return dict(graph.layers(block))


def _distance(a: nn.Module, b: nn.Module) -> float:
    """Squared distance of the weights of two blocks, relative to the sum of their squares."""
    first, second = ([layer.weight.detach().double() for layer in _layers(block).values()] for block in (a, b))
    apart = sum(float((x - y).square().sum()) for x, y in zip(first, second, strict=True))
    power = sum(float(x.square().sum()) for x in (*first, *second))
    return apart / max(power, 1e-12)


def _share(module: nn.Module, group: Sequence[str], norms: bool) -> dict[str, str]:
    """Average the weights of a group into its first block and put that in the place of the others, in place."""
    blocks = [module.get_submodule(name) for name in group]
    layers = [_layers(block) for block in blocks]
    told: dict[str, str] = {}
    for inner in layers[0]:
        weights = torch.stack([own[inner].weight.detach().double() for own in layers])
        spread = float((weights - weights.mean(0)).square().sum() / weights.square().sum().clamp_min(1e-300))
        text = f"shares its weights with {len(group) - 1} other: size only; they were {spread:.2g} from their mean"
        told |= {f"{name}.{inner}": text for name in group}
    shared = [""] if norms else list(layers[0])
    for inner in shared:
        parts = [block.get_submodule(inner) for block in blocks]
        for name, value in parts[0].state_dict(keep_vars=True).items():
            if value.is_floating_point():
                value.data.copy_(torch.stack([part.state_dict()[name].double() for part in parts]).mean(0))
        for name in group[1:]:
            _swap.put(module, f"{name}.{inner}".rstrip("."), parts[0])
    return told
