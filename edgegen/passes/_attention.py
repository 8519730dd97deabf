"""Where a network has self-attention over a grid of tokens, what each one was given, and what its blocks may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.nn import attention, tokens
from edgegen.types import Model

_MAX_PREFIX = 16  # class and register tokens in front of the grid
EXACT = 1e-4  # a block with the same weights against the attention that it replaces, relative to the largest output


@dataclass
class Site:
    """One self-attention. `problem` says why it cannot be changed, "" if it can.

    tokens: with the `prefix` ones in front. grid: (H, W) of the others. names: the projections to q, k and v, one name
    where they are fused. x, y: what it was given and gave on the first input. calls: how often it runs.
    """

    path: str
    names: tuple[str, ...]
    tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    problem: str = ""
    x: Any = None
    y: Any = None
    calls: int = 0
    maps: list[tuple[int, int]] = field(default_factory=list)


def network(model: Model, name: str) -> nn.Module:
    """The network of a model.

    Raises:
        ValueError: an ONNX file.
    """
    if model.stage.module is None:
        raise ValueError(f"{name} needs a network, and {model.name} is an ONNX file; use quantize or cast")
    module: nn.Module = model.stage.module
    return module


def find(module: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, Site]:
    """Every self-attention of a known form, in the order in which they run; those that do not run are left out."""
    sites = {path: Site(path, names) for path, part in module.named_modules() if (names := _form(part))}
    order: list[str] = []
    given: dict[str, torch.Tensor] = {}
    with _hooks(module, sites, order, given):
        graph.outputs(module, inputs)
    sizes: list[Any] = [getattr(part, "grid_size", None) for part in module.modules()]
    grids = [tuple(size) for size in sizes if _is_pair(size)]
    found = {path: sites[path] for path in dict.fromkeys(order)}
    fewer = {path: part for path, part in module.named_modules() if isinstance(part, tokens.TokenStages)}
    for path, site in found.items():
        if any(path.startswith(f"{at}.") and int(path[len(at) + 1 :].split(".")[0]) > min(part.counts, default=0)
               for at, part in fewer.items()):  # fmt: skip
            site.problem = "its tokens were merged or dropped before: they are no grid"
        site.problem = site.problem or _problem(module.get_submodule(path), site, given)
        if not site.problem and not _place(site, grids):
            site.problem = f"its {site.tokens} tokens are no grid"
    return found


def _form(part: nn.Module) -> tuple[str, ...]:
    """Names of its projections, () for what is no attention."""
    if isinstance(part, attention.Projections):
        return ("q", "kv")
    if isinstance(getattr(part, "qkv", None), nn.Linear) and isinstance(getattr(part, "num_heads", None), int):
        return ("qkv",)
    for names in attention.NAMES:
        if all(isinstance(getattr(part, name, None), nn.Linear | nn.Conv2d) for name in names):
            return names
        k = getattr(part, names[1], None)
        if isinstance(k, attention.DownsampledTokens):
            return names
    return ()


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(size, int) for size in value)


@contextmanager
def _hooks(
    module: nn.Module, sites: dict[str, Site], order: list[str], given: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Note what attentions and their projections are given, and the maps (N, C, H, W) of the modules around them."""
    maps: dict[str, tuple[int, int]] = {}

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = graph.flatten([args, kwargs])
        if tensors and tensors[0].ndim == 4:
            maps[path] = (tensors[0].shape[2], tensors[0].shape[3])
        if tensors:
            given.setdefault(path, tensors[0])
        if path in sites:
            site = sites[path]
            around = [path, *(path[:i] for i in reversed(range(len(path))) if path[i] == "." or i == 0)]
            site.maps = [maps[name] for name in around if name in maps]
            site.calls += 1
            site.problem = site.problem or _extra(args, kwargs)
            site.x = tensors[0] if tensors and site.x is None else site.x

    def after(path: str, out: Any) -> None:
        order.append(path)
        tensors = graph.flatten(out)
        if sites[path].y is None and tensors:
            sites[path].y = tensors[0]
            if len(tensors) > 1:
                sites[path].problem = "gives more than one tensor"

    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True))  # fmt: skip
        if path in sites:
            handles.append(part.register_forward_hook(lambda _, args, out, path=path: after(path, out)))
    with graph.hooked(handles):
        yield


def _extra(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What the attention is given besides its tokens, in words."""
    names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name != "temb"]
    if len([value for value in args if isinstance(value, torch.Tensor)]) + len(names) > 1:
        return "is given more than its tokens: a mask, or another sequence to look at"
    return "looks at earlier tokens only" if kwargs.get("is_causal") else ""


def _problem(part: nn.Module, site: Site, given: dict[str, torch.Tensor]) -> str:
    """Why it is no plain self-attention over one sequence; sets the number of tokens."""
    if isinstance(part, attention.Projections | attention.DownsampledTokens) or any(
        isinstance(child, attention.DownsampledTokens) for child in part.children()
    ):
        return "was replaced before"
    if site.x is None or site.y is None or site.y.shape[:-1] != site.x.shape[:-1]:
        return "gives no tensor of the shape that it is given"
    inside = [given.get(f"{site.path}.{name}".lstrip(".")) for name in site.names]
    if any(x is None for x in inside) or not all(torch.equal(inside[0], x) for x in inside[1:]):  # type: ignore[arg-type]
        return "looks at another sequence (cross attention)"
    x: Any = inside[0]
    if x.ndim not in (3, 4) or x.shape[0] != site.x.shape[0]:
        return "works in windows or on other than one sequence of tokens a sample"
    site.tokens = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]
    site.maps = [(x.shape[2], x.shape[3])] if x.ndim == 4 else site.maps
    return ""


def _place(site: Site, grids: Sequence[tuple[int, ...]]) -> bool:
    """Find the grid of the tokens: a map around them, the patches of the network, else a square."""
    for height, width in site.maps:
        patch = math.isqrt(height * width // site.tokens)  # one token may be a square of the map around it
        if patch and height * width == site.tokens * patch**2 and not height % patch and not width % patch:
            site.grid, site.prefix = (height // patch, width // patch), 0
            return True
    for height, width in grids:
        if 0 <= site.tokens - height * width <= _MAX_PREFIX:
            site.grid, site.prefix = (height, width), site.tokens - height * width
            return True
    for prefix in (0, 1) if not grids else ():  # with a known grid, a square would be a coincidence
        side = math.isqrt(site.tokens - prefix)
        if side > 1 and side * side == site.tokens - prefix:
            site.grid, site.prefix = (side, side), prefix
            return True
    return False


def difference(block: nn.Module, site: Site) -> float:
    """How far the output of `block` is from that of the attention, relative to its largest value."""
    with torch.no_grad():
        got = block(site.x)
    if got.shape != site.y.shape:
        return math.inf
    return float((got - site.y).abs().max() / site.y.abs().max().clamp_min(1e-12))


def put(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put `part` in the place of a submodule, in its mode."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    holder._modules[name] = part.train(holder._modules[name].training)  # type: ignore[union-attr]


def account(
    module: nn.Module, changed: dict[str, str], skipped: dict[str, str], other: str
) -> tuple[dict[str, str], dict[str, str]]:
    """(changed, skipped) with every convolution and linear layer: by the module that it is in, else `other`."""
    for layer in graph.layers(module):
        inside = [part for part in (*changed, *skipped) if layer.startswith(f"{part}.")]
        if layer in changed or any(part in changed for part in inside):
            changed.setdefault(layer, next((changed[part] for part in inside if part in changed), ""))
        else:
            skipped.setdefault(layer, skipped[inside[0]] if inside else other)
    return changed, skipped
