"""Walking a torch module: copies, example inputs, MACs and parameters measured on real shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from edgegen.types import Preprocessing, Stage, TensorSpec

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVS, nn.Linear)
# torch's counter knows the CUDA attention kernels only
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)
}
FREE_SIZE = 64  # height and width used for a dimension that the specification leaves free


@dataclass(frozen=True)
class Cost:
    """MACs of one forward pass (1 MAC = 2 FLOPs), parameters, and the MACs of each convolution and linear layer."""

    macs: int
    params: int
    layers: dict[str, int] = field(default_factory=dict)


def clone(module: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with `module`.

    Modules may keep computed tensors with a gradient history in plain attributes (timm caches attention biases so);
    `copy.deepcopy` refuses those, hence they are detached in the copy.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in _tensors(vars(part)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in an attribute value: itself, or inside lists, tuples and dictionaries. Submodules are not entered."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def example_input(
    spec: TensorSpec, generator: torch.Generator, *, batch: int = 1, preprocessing: Preprocessing | None = None
) -> torch.Tensor:
    """One random input: N(0, 1) without a value range, else uniform in it and then (x - mean) / std.

    The first dimension becomes `batch`; a free one is FREE_SIZE. Integers are uniform in the value range, else 0.
    """
    shape = [batch, *(FREE_SIZE if isinstance(size, str) else int(size) for size in spec.shape[1:])]
    dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        low, high = spec.value_range or (0, 0)
        return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)
    if spec.value_range is None:
        return torch.randn(shape, generator=generator).to(dtype)
    low, high = spec.value_range
    values = torch.rand(shape, generator=generator) * (high - low) + low
    return (normalise(values, preprocessing) if preprocessing else values).to(dtype)


def normalise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """(x - mean) / std for images (N, C, H, W) in the preprocessing's value range; as they are without mean and std."""
    for values, apply in _by_channel(images, preprocessing, ("mean", torch.sub), ("std", torch.div)):
        images = apply(images, values)
    return images


def unnormalise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """x * std + mean: what `normalise` was given."""
    for values, apply in _by_channel(images, preprocessing, ("std", torch.mul), ("mean", torch.add)):
        images = apply(images, values)
    return images


def _by_channel(images: torch.Tensor, preprocessing: Preprocessing, *steps: tuple[str, Any]) -> list[tuple[Any, Any]]:
    """The named numbers as tensors to apply to images (N, C, H, W), where they fit the channels."""
    found = []
    for name, apply in steps:
        values = getattr(preprocessing, name)
        if values and images.ndim == 4 and images.shape[1] in (1, len(values)):
            told = torch.tensor(values[: images.shape[1]], dtype=images.dtype, device=images.device)
            found.append((told.view(1, -1, 1, 1), apply))
    return found


def example_inputs(
    stage: Stage, *, seed: int = 0, batch: int = 1, preprocessing: Preprocessing | None = None
) -> tuple[torch.Tensor, ...]:
    """Random inputs for every input of `stage`; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(example_input(spec, generator, batch=batch, preprocessing=preprocessing) for spec in stage.inputs)


def example_feeds(specs: Sequence[TensorSpec], seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Random values for some inputs by name; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: example_input(spec, generator, batch=batch).numpy() for spec in specs}


def outputs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs in eval mode without gradients, flattened to a tuple of tensors; the module's mode is kept."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return flatten(module(*inputs))
    finally:
        for part, training in modes:
            part.training = training


def flatten(value: Any) -> tuple[torch.Tensor, ...]:
    """All tensors in a module's output, in order."""
    return tuple(_tensors(value))


def layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = WEIGHTED) -> dict[str, nn.Module]:
    """Name -> layer for every layer of the given kinds, in definition order; a shared layer appears once."""
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def params(module: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were put on come off at the end of the block, whatever happened in it."""
    held = tuple(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def cost(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Cost:
    """MACs and parameters of `module` on `inputs`, counted where they happen (functional calls and attention included).

    The count covers convolutions, linear layers and matrix products; element-wise work, norms and biases count 0.
    `layers` holds convolution and linear layers that were called as modules.
    """
    counts: dict[str, int] = {}

    def count(name: str, layer: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        counts[name] = counts.get(name, 0) + _layer_macs(layer, x, out)  # a layer that is called twice costs twice

    handles = [
        part.register_forward_hook(lambda part, args, out, name=name: count(name, part, args[0], out))
        for name, part in layers(module).items()
    ]
    with hooked(handles), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        outputs(module, inputs)
    return Cost(counter.get_total_flops() // 2, params(module), counts)


def _layer_macs(layer: Any, x: torch.Tensor, out: torch.Tensor) -> int:
    """MACs of one call: a weight is used once an output position, a transposed convolution's once an input position."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return out.numel() // layer.out_features * weight.numel()
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    positions = (x if transposed else out)[:, :1].numel()
    return positions * weight.numel()
