"""Give attention all its queries and a coarser grid of keys and values: no training, no new weights.

Smith et al., 2024, ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, arXiv:2402.13573. A
factor f divides the cost of the products of queries, keys and values by f^2, and that of making keys and values too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgegen import graph, registry
from edgegen.nn import attention
from edgegen.passes import _attention
from edgegen.passes._attention import Site
from edgegen.types import Job, Model, PassResult

# Option sets that `edgegen probe` times before any training.
PROBES = ({"factor": 2}, {"factor": 4})
_OTHER = "is in no self-attention over a grid of tokens"


def downsample_kv(
    model: Model,
    job: Job,
    *,
    factor: int = 2,
    mode: str = "average",
    min_tokens: int = 64,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> PassResult:
    """Replace the keys and values of every self-attention with `min_tokens` or more by those of a coarser grid.

    Args:
        model: one stage with a module that holds attention of timm's form (fused qkv) or with three projections to
            queries, keys and values (diffusers, convolutional attention). Cross attention and windows stay.
        factor: the grid's sides are divided by it; it must divide them. Class and register tokens stay as they are.
        mode: "average" (mean of each cell), "stride" (its upper left token) or "nearest" (the one next to its centre).
        min_tokens: attention over fewer tokens stays: there is little to gain, and more to lose.
        layers: only these attention modules; skip: not these.
    Returns:
        PassResult; `notes` has the grid of each attention, and the relative squared error of the output.
    Raises:
        ValueError: an option out of range, a name that is no attention, a model without a network.
    """
    module = _attention.network(model, "downsample_kv")
    if factor < 2 or min_tokens < 1:
        raise ValueError(f"factor must be at least 2 and min_tokens at least 1, got {factor} and {min_tokens}")
    if mode not in attention.MODES:
        raise ValueError(f"mode must be one of {', '.join(attention.MODES)}, got {mode!r}")
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    result = graph.clone(module).eval()
    sites = _attention.find(result, inputs)
    check_names(model, (*layers, *skip), sites)
    changed, skipped = {}, {}
    for path, site in sites.items():
        why = _why_not(site, factor, min_tokens, layers, skip) or _replaced(result, site, inputs, factor, mode)
        if why:
            skipped[path] = why
        else:
            height, width = site.grid
            changed[path] = f"keys and values from {height // factor}x{width // factor} instead of {height}x{width}"
    before, after = graph.cost(module, inputs), graph.cost(result, inputs)
    notes = {
        "macs_before": before.macs, "macs_after": after.macs, "grids": {p: list(sites[p].grid) for p in changed},
        "relative_error": relative_error(module, result, inputs) if changed else 0.0, "attentions": len(sites),
    }  # fmt: skip
    needs_recovery = bool(changed)
    changed, skipped = _attention.account(module, changed, skipped, _OTHER)
    return PassResult(model.with_module(result), changed, skipped, notes, needs_recovery)


def check_names(model: Model, names: Sequence[str], sites: dict[str, Site]) -> None:
    """Raises ValueError: a name that is no attention of the network."""
    for name in names:
        if name not in sites:
            there = f"{registry.near(name, list(sites))}; there are: {', '.join(sites) or 'none'}"
            raise ValueError(f"no self-attention {name!r} in {model.name}{there}")


def _why_not(site: Site, factor: int, min_tokens: int, layers: Sequence[str], skip: Sequence[str]) -> str:
    if site.path in skip or (layers and site.path not in layers):
        return "is named in skip" if site.path in skip else "not named in layers"
    if site.problem:
        return site.problem
    if site.tokens - site.prefix < min_tokens:
        return f"has {site.tokens - site.prefix} tokens, fewer than min_tokens {min_tokens}"
    if any(side % factor for side in site.grid):
        return f"its grid {site.grid[0]}x{site.grid[1]} does not divide by {factor}"
    return ""


def _replaced(module: nn.Module, site: Site, inputs: Sequence[torch.Tensor], factor: int, mode: str) -> str:
    """Put the block in; why it could not be, or "". What it computes at factor 1 must be what was there."""
    if site.names == ("qkv",):
        old = module.get_submodule(site.path)
        try:
            same = attention.DownsampledAttention(old, site.grid, site.prefix, 1, mode).eval()
        except (ValueError, AttributeError) as error:
            return str(error)
        if (off := _attention.difference(same, site)) > _attention.EXACT:
            return f"is no plain attention: recomputed, it differs by {off:.2g} of its largest output"
        block = attention.DownsampledAttention(old, site.grid, site.prefix, factor, mode)
        _attention.put(module, site.path, block)
        return _undone(module, inputs, {site.path: old})
    paths = [f"{site.path}.{name}".lstrip(".") for name in site.names[1:]]
    parts = {path: module.get_submodule(path) for path in paths}
    for path, old in parts.items():
        coarser = attention.DownsampledTokens(old, site.grid, site.prefix, factor, mode)
        _attention.put(module, path, coarser)
    return _undone(module, inputs, parts)


def _undone(module: nn.Module, inputs: Sequence[torch.Tensor], olds: dict[str, nn.Module]) -> str:
    """Run the network; where it does not stand the change, put the old modules back and say why."""
    news = {path: module.get_submodule(path) for path in olds}
    try:
        found = graph.outputs(module, inputs)
        for path, old in olds.items():
            _attention.put(module, path, old)
        if [out.shape for out in found] == [out.shape for out in graph.outputs(module, inputs)]:
            for path, new in news.items():
                _attention.put(module, path, new)
            return ""
        why = "the network's output would have another shape"
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        why = f"needs as many keys as queries: {str(error).splitlines()[0]}"
    for path, old in olds.items():
        _attention.put(module, path, old)
    return why


def relative_error(before: nn.Module, after: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Squared error of the outputs relative to their squares."""
    pairs = list(zip(graph.outputs(after, inputs), graph.outputs(before, inputs), strict=True))
    return sum(float((a - b).square().sum()) for a, b in pairs) / max(
        sum(float(b.square().sum()) for _, b in pairs), 1e-12
    )
