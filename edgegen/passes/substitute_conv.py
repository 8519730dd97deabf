"""Convolutions replaced by cheaper operators, which start from the dense kernel.

- depthwise_separable: Chollet, 2017, Xception, arXiv:1610.02357: depthwise k x k and 1x1; the single intra-channel
  convolution and linear channel projection of Wang et al., 2016, arXiv:1608.04337, are the same operator.
- groups: Jha et al., 2020, E2GC, arXiv:2006.15100: groups of a constant number of channels (`group_size`), here k x k
  in groups and 1x1 over all of them, so that one of size 1 is a depthwise separable convolution.
- ghost: Han et al., 2020, GhostNet, arXiv:1911.11907: part of the channels, the others from those by depthwise 3x3.
- split_large: Yu et al., 2024, InceptionNeXt, arXiv:2303.16900: a large depthwise window as square, 1 x k, k x 1 and
  untouched channels.

Start: for each group of inputs the best approximation of its kernels by as many shared ones (SVD), then the 1x1 fitted
to the layer's outputs on samples; ghosts by least squares of kernels; split windows cut out of the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen import graph, training
from edgegen.nn import chain, cheap_conv
from edgegen.passes import _refit, _swap
from edgegen.passes._swap import Place
from edgegen.types import Job, Model, PassResult

KINDS = ("depthwise_separable", "groups", "ghost", "split_large")
PROBES = tuple({"kind": kind, "samples": 1} for kind in KINDS)  # what `edgegen probe` times before any training


def substitute_conv(
    model: Model,
    job: Job,
    *,
    kind: str = "depthwise_separable",
    group_size: int = 8,
    ghosts: int = 2,
    branch: float = 0.125,
    min_window: int = 5,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    samples: int = 8,
) -> PassResult:
    """Replace convolutions by the cheaper `kind`, where that has fewer MACs. Training has to follow.

    Args:
        model: one stage with a module. Not modified.
        kind: "depthwise_separable", "groups" or "ghost" (of dense convolutions with a window), or "split_large" (of
            depthwise ones).
        group_size: channels of a group in "groups". ghosts: in "ghost", one channel of so many is computed.
        branch: share of the channels for each of the three windows in "split_large", in (0, 1/3].
        min_window: "split_large" leaves smaller windows alone.
        layers, skip: names of layers, or of modules for all in them. samples: inputs to fit and compare on.
    Returns:
        PassResult; `changed` has the replacements and parameters, `skipped` why the others stay.
    Raises:
        ValueError: an option out of range, a model without a network, or a name that does not exist.
    """
    _swap.check_choice("kind", kind, KINDS)
    if group_size < 1 or ghosts < 2 or min_window < 3:
        raise ValueError("group_size must be at least 1, ghosts at least 2 and min_window at least 3, got "
                         f"{group_size}, {ghosts} and {min_window}")  # fmt: skip
    if not 0 < branch <= 1 / 3:
        raise ValueError(f"branch must lie in (0, 1/3], got {branch}")
    module = _swap.network(model, "substitute_conv")
    inputs, source = _swap.samples(model, job, samples)
    makers: dict[str, Callable[[Place], nn.Module | str]] = {
        "depthwise_separable": lambda place: _grouped(place, 1),
        "groups": lambda place: _grouped(place, group_size),
        "ghost": lambda place: _ghost(place, ghosts),
        "split_large": lambda place: _split(place, branch, min_window),
    }
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, inputs[0], layers=layers, skip=skip, kinds=(nn.Conv2d,))
        if kind != "split_large":
            places, unfit = _swap.with_window(places)
            skipped |= unfit
        parts, changed = {}, {}
        for number, place in enumerate(places):
            job.progress(place.name, number / len(places))
            made = makers[kind](place)
            if isinstance(made, str):
                skipped[place.name] = made
            elif reason := _dearer(place, made):
                skipped[place.name] = reason
            else:
                parts[place.name] = _swap.dress(made, place.layer)
                weights = sum(p.numel() for name, p in made.named_parameters() if name.endswith("weight"))
                changed[place.name] = f"{kind}, parameters {place.params} -> {weights}"
        _refit.refit(module, parts, inputs, job.seed)
        new, refused = _swap.replace(module, parts, inputs[0])
        changed = {name: text for name, text in changed.items() if name not in refused}
        notes = {"kind": kind, "inputs": source}
        return _swap.result(model, module, new, inputs, changed, {**skipped, **refused}, notes)


def _dearer(place: Place, part: nn.Module) -> str:
    """Why the replacement does not pay in MACs, or an empty string."""
    meta = graph.clone(part).to("meta")
    macs = graph.cost(meta, [torch.empty(place.input, device="meta")]).macs
    return f"would have {macs} MACs instead of {place.macs}" if macs >= place.macs else ""


def _grouped(place: Place, size: int) -> nn.Module | str:
    """k x k in groups of `size` channels, then 1x1: the SVD of each group's kernels."""
    layer: nn.Conv2d = place.layer
    outputs, inputs, high, wide = layer.weight.shape
    if inputs % size:
        return f"{inputs} input channels are no multiple of group_size {size}"
    kernels = layer.weight.detach().double().reshape(outputs, inputs // size, size * high * wide).transpose(0, 1)
    left, values, right = torch.linalg.svd(kernels, full_matrices=False)  # (groups, outputs or less, ...)
    rank = min(size, values.shape[1])
    root = values[:, :rank].sqrt()
    mixed = F.pad(left[:, :, :rank] * root[:, None], (0, size - rank))  # (groups, outputs, size)
    windows = F.pad(right[:, :rank] * root[..., None], (0, 0, 0, size - rank))  # (groups, size, size * window)
    parts = [
        chain.like(layer, inputs, inputs, groups=inputs // size),
        chain.pointwise(inputs, outputs, bias=layer.bias is not None),
    ]
    return _swap.filled(layer, parts, [windows, mixed.transpose(0, 1)])


def _ghost(place: Place, ghosts: int) -> nn.Module | str:
    """The first channels as they are; of each of the others the depthwise kernel that makes its own kernel best."""
    layer = place.layer
    outputs, inputs = layer.weight.shape[:2]
    first = -(-outputs // ghosts)
    if outputs == first:
        return "makes one channel"
    if layer.stride != (1, 1) or layer.dilation != (1, 1):
        return "ghosts of a convolution with stride or dilation"
    bias = layer.bias is not None
    _, options = chain.like(layer, inputs, first, bias=bias)
    block = cheap_conv.Ghost(options, outputs)
    weight = layer.weight.detach().double()
    own = layer.bias.detach().double() if bias else torch.zeros(outputs, dtype=torch.float64)
    block.primary.weight.copy_(weight[:first])
    if bias:
        block.primary.bias.copy_(own[:first])  # type: ignore[union-attr]
    times = block.cheap.out_channels // first
    block.cheap.weight.zero_()
    block.cheap.bias.zero_()  # type: ignore[union-attr]
    for ghost in range(outputs - first):
        source = ghost // times
        kernel = _between(weight[source], weight[first + ghost], block.cheap.kernel_size[0])
        block.cheap.weight[ghost, 0] = kernel
        block.cheap.bias[ghost] = own[first + ghost] - (kernel.sum() * own[source] if bias else 0)  # type: ignore[index]
    return block


def _between(source: Tensor, wanted: Tensor, window: int) -> Tensor:
    """The depthwise kernel d for which d after `source` (I, kH, kW) is nearest to `wanted`: least squares."""
    reach = window // 2
    target = F.pad(wanted, [reach] * 4).flatten()
    shifted = torch.stack([
        F.pad(source, [column, window - 1 - column, row, window - 1 - row]).flatten()
        for row in range(window) for column in range(window)
    ])  # fmt: skip
    gram = shifted @ shifted.T
    gram += 1e-9 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, shifted @ target).reshape(window, window)


def _split(place: Place, branch: float, min_window: int) -> nn.Module | str:
    """Square, wide and high windows cut out of the middle of the large one."""
    layer: nn.Conv2d = place.layer
    channels, window = layer.in_channels, layer.kernel_size[0]
    if not layer.groups == layer.out_channels == channels:
        return "is not a depthwise convolution"
    if layer.kernel_size != (window, window) or window < min_window or window % 2 == 0:
        return f"its window {'x'.join(map(str, layer.kernel_size))} is not square, odd and at least {min_window}"
    plain = (layer.stride, layer.dilation, layer.padding_mode) == ((1, 1), (1, 1), "zeros")
    if not plain or layer.padding not in ("same", (window // 2, window // 2)):
        return "has a stride, a dilation, or another padding than zeros that keep the size"
    width = int(channels * branch)
    if width < 1:
        return f"{channels} channels are too few for branches of {branch:g} of them"
    block = cheap_conv.SplitLarge(channels, width, window)
    middle, start = window // 2, channels - 3 * width
    weight = layer.weight.detach()
    cuts = {
        "square": weight[..., middle - 1 : middle + 2, middle - 1 : middle + 2],
        "wide": weight[..., middle : middle + 1, :],
        "high": weight[..., middle : middle + 1],
    }
    for at, (name, cut) in enumerate(cuts.items()):
        part, own = getattr(block, name), slice(start + at * width, start + (at + 1) * width)
        part.weight.copy_(cut[own])
        part.bias.copy_(layer.bias[own] if layer.bias is not None else torch.zeros(width))
    return block
