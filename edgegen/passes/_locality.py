"""How far attention looks: the share of its mass within a radius, for each attention of a network.

As in CLEAR (Liu et al., 2024, arXiv:2412.16112) and ΔConvFusion (Dong et al., 2025, arXiv:2504.21292), which find that
most attention of image networks is local: where it is, a convolution or a window can take its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.nn import attention
from edgegen.passes._attention import Site

RADII = (1.0, 2.0, 4.0, 8.0)


def profile(
    module: nn.Module, sites: Mapping[str, Site], samples: Sequence[Sequence[torch.Tensor]], radius: float
) -> dict[str, dict[str, float]]:
    """Path -> {radius in tokens: share of the attention mass between patches that lies within it, "even": the share
    that attention to all patches alike would have at `radius`}; mean over samples, heads and queries.

    Sites with a problem are left out. Class and register tokens are left out of the mass.
    """
    total: dict[str, dict[float, float]] = {}
    radii = sorted({radius, *RADII})
    good = {path: site for path, site in sites.items() if not site.problem}
    for sample in samples:
        for path, (q, k) in _queries_and_keys(module, good, sample).items():
            found = _shares(q, k, good[path], radii)
            sums = total.setdefault(path, dict.fromkeys(radii, 0.0))
            for r in radii:
                sums[r] += found[r] / len(samples)
    return {
        path: {**{f"{r:g}": round(share, 4) for r, share in sums.items()},
               "even": round(float(_near(good[path].grid, radius).mean()), 4)}
        for path, sums in total.items()
    }  # fmt: skip


def _queries_and_keys(
    module: nn.Module, sites: Mapping[str, Site], sample: Sequence[torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path -> queries and keys (N, heads, tokens, D), what the projections gave, after norms of the heads."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, out))
        for path, site in sites.items() for name in _names(path, site)
    ]  # fmt: skip
    with graph.hooked(handles):
        graph.outputs(module, sample)
    found = {}
    for path, site in sites.items():
        part: Any = module.get_submodule(path)
        parts = [_tokens(seen[name]) for name in _names(path, site)]
        q, k = parts[0].chunk(3, -1)[:2] if len(parts) == 1 else parts[:2]
        heads = attention.heads_of(part)
        norms = [attention.or_identity(part, (f"{x}_norm", f"norm_{x}")) for x in "qk"]
        with torch.no_grad():
            found[path] = tuple(
                norm(t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2))
                for norm, t in zip(norms, (q, k), strict=True)
            )
    return found


def _names(path: str, site: Site) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name in site.names[:2]]


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def _shares(q: torch.Tensor, k: torch.Tensor, site: Site, radii: Sequence[float]) -> dict[float, float]:
    """Radius -> share of the mass, mean over samples, heads and queries; one head at a time."""
    sums = dict.fromkeys(radii, 0.0)
    masks = {radius: _near(site.grid, radius) for radius in radii}
    for mine, theirs in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True):
        logits = mine[site.prefix :].float() @ theirs[site.prefix :].float().T * mine.shape[-1] ** -0.5
        mass = logits.softmax(-1)
        for radius, mask in masks.items():
            sums[radius] += float((mass * mask).sum(-1).mean()) / (q.shape[0] * q.shape[1])
    return sums


def _near(grid: tuple[int, int], radius: float) -> torch.Tensor:
    """(H * W, H * W): 1 where a key lies within the radius of a query, by Euclidean distance in tokens."""
    y, x = (p.flatten() for p in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    far = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    return (far <= radius**2).float()
