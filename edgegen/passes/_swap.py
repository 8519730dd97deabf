"""Putting blocks in the place of layers: which may go, what a call of them costs, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from edgegen import graph, registry
from edgegen.nn import chain
from edgegen.passes import _lessons
from edgegen.types import Job, Model, PassResult, Stage, TensorSpec

Inputs = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Place:
    """A layer that may be replaced, with the shapes of its first call."""

    name: str
    layer: Any
    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def places_in(self) -> int:
        """Positions of the input at which a pointwise layer would work."""
        return _places(self.layer, self.input)

    @property
    def places_out(self) -> int:
        """Positions of the output."""
        return _places(self.layer, self.output)

    @property
    def params(self) -> int:
        """Weights without the bias, which every replacement keeps."""
        return int(self.layer.weight.numel())

    @property
    def macs(self) -> int:
        """MACs of one call."""
        return self.places_out * self.params


def _places(layer: nn.Module, shape: Sequence[int]) -> int:
    channels = shape[-1] if isinstance(layer, nn.Linear) else shape[1]
    return torch.Size(shape).numel() // channels


def network(model: Model, name: str) -> nn.Module:
    """The network of a model. Raises ValueError: an ONNX file."""
    if model.stage.module is None:
        raise ValueError(f"{name} needs a network, and {model.name} is an ONNX file; use quantize or cast")
    module: nn.Module = model.stage.module
    return module


def samples(model: Model, job: Job, count: int) -> tuple[list[tuple[torch.Tensor, ...]], str]:
    """`count` inputs of batch 1 from the job's data, or made up, and which of the two in words.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"samples must be at least 1, got {count}")
    return _lessons.some_inputs(model, job, count)


def find(
    model: Model, module: nn.Module, inputs: Sequence[torch.Tensor], *, layers: Sequence[str] = (),
    skip: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
) -> tuple[list[Place], dict[str, str]]:  # fmt: skip
    """Layers that may be replaced, in definition order, and why each other one stays.

    Args:
        layers, skip: names of layers, or of modules for all layers in them.
    Raises:
        ValueError: a name that is neither.
    """
    known = graph.layers(module)
    for name in (*layers, *skip):
        if not any(_in(layer, name) for layer in known):
            hint = registry.near(name, list(known))
            raise ValueError(f"no layer {name!r} in {model.name}{hint}; there are: {', '.join(list(known)[:8])}")
    shapes, owners = _calls(module, inputs, known), _owners(module)
    places, skipped = [], {}
    for name, layer in known.items():
        if reason := _fixed(name, layer, layers, skip, kinds, shapes, owners):
            skipped[name] = reason
        else:
            places.append(Place(name, layer, *shapes[name]))
    return places, skipped


def _in(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _fixed(
    name: str, layer: Any, layers: Sequence[str], skip: Sequence[str], kinds: tuple[type[nn.Module], ...],
    shapes: Mapping[str, Any], owners: Mapping[int, set[int]],
) -> str:  # fmt: skip
    """Why a layer cannot be replaced, or an empty string."""
    if layers and not any(_in(name, chosen) for chosen in layers):
        return "not named in layers"
    if any(_in(name, kept) for kept in skip):
        return "named in skip"
    if parametrize.is_parametrized(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "its weight is computed from others; fold that first"
    if type(layer) not in kinds:  # a class of its own may do more than its base
        return f"is a {type(layer).__name__}, not one of {', '.join(kind.__name__ for kind in kinds)}"
    if name not in shapes:
        return "its parent reads its weight and does not call it"
    return "its weight belongs to another module too" if len(owners[id(layer.weight)]) > 1 else ""


def _calls(
    module: nn.Module, inputs: Sequence[torch.Tensor], known: Mapping[str, nn.Module]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer -> shapes of input and output at its first call; layers that are not called are missing."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def note(name: str, args: Any, out: torch.Tensor) -> None:
        shapes.setdefault(name, (tuple(args[0].shape), tuple(out.shape)))

    with hooked(known, note):
        graph.outputs(module, inputs)
    return shapes


class hooked:
    """While it is open, `note(name, args, out)` is called after every call of one of the modules."""

    def __init__(self, parts: Mapping[str, nn.Module], note: Any) -> None:
        self.parts, self.note = parts, note
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        self.handles = [
            part.register_forward_hook(lambda _, args, out, name=name: self.note(name, args, out))
            for name, part in self.parts.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _owners(module: nn.Module) -> dict[int, set[int]]:
    """id of a parameter -> ids of the modules that hold it."""
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(part))
    return owners


def put(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Put `part` in the place of the module at `name`, wherever that is used, and return the one that was there."""
    old = module.get_submodule(name)
    part.train(old.training)
    paths = [path for path, other in module.named_modules(remove_duplicate=False) if other is old]
    for path in paths:
        parent, _, own = path.rpartition(".")
        module.get_submodule(parent)._modules[own] = part
    return old


def dress(part: nn.Module, layer: Any) -> nn.Module:
    """Give a new block the type, device, gradient flags and mode of the layer that it replaces."""
    weight = layer.weight
    part = part.to(device=weight.device, dtype=weight.dtype).train(layer.training)
    return part.requires_grad_(weight.requires_grad)


def filled(layer: Any, parts: Sequence[chain.Layer], weights: Sequence[torch.Tensor]) -> nn.Module:
    """A chain with these weights, and the bias of `layer` on its last part."""
    block = chain.Chain(parts)
    made: list[Any] = list(block)
    for part, weight in zip(made, weights, strict=True):
        part.weight.copy_(weight.reshape(part.weight.shape))
    if layer.bias is not None:
        made[-1].bias.copy_(layer.bias)
    return dress(block, layer)


def with_window(places: Sequence[Place]) -> tuple[list[Place], dict[str, str]]:
    """The ungrouped convolutions that look at more than one pixel, and why the others stay."""
    good, skipped = [], {}
    for place in places:
        if place.layer.groups != 1:
            skipped[place.name] = "grouped convolution"
        elif max(place.layer.kernel_size) == 1:
            skipped[place.name] = "1x1 convolution; factorize_svd is for those"
        else:
            good.append(place)
    return good, skipped


def replace(
    module: nn.Module, parts: Mapping[str, nn.Module], inputs: Sequence[torch.Tensor]
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of `module` with the parts in their places, and why some could not be put there."""
    try:
        result = graph.clone(module).eval()
        for name, part in parts.items():
            put(result, name, part)
        graph.outputs(result, inputs)
        return result, {}
    except (AttributeError, RuntimeError, TypeError):  # a parent that looks into its child: find out which
        pass
    result, refused = graph.clone(module).eval(), {}
    for name, part in parts.items():
        old = put(result, name, part)
        try:
            graph.outputs(result, inputs)
        except (AttributeError, RuntimeError, TypeError) as error:
            put(result, name, old)
            refused[name] = f"its parent cannot use a block in its place: {str(error).splitlines()[0]}"
    return result, refused


def distance(wanted: Inputs, got: Inputs) -> float:
    """Squared distance of outputs, relative to the square of `wanted`; infinite where it is not a number."""
    pairs = [(a, b) for w, g in zip(wanted, got, strict=True) for a, b in zip(w, g, strict=True)]
    power = sum(float(a.double().square().sum()) for a, _ in pairs)
    found = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) / max(power, 1e-12)
    return found if found == found else float("inf")


def outputs(module: nn.Module, inputs: Inputs) -> list[tuple[torch.Tensor, ...]]:
    """The network's outputs for each sample."""
    return [graph.outputs(module, sample) for sample in inputs]


def alone(place: Place, part: nn.Module) -> Stage:
    """A stage of nothing but this layer or its replacement, for `job.latency`."""
    spec = TensorSpec("input", place.input), TensorSpec("output", place.output)
    return Stage(place.name.replace(".", "_"), graph.clone(part).eval(), spec[:1], spec[1:])


def result(
    model: Model, module: nn.Module, new: nn.Module, inputs: Inputs, changed: Mapping[str, str],
    skipped: Mapping[str, str], notes: Mapping[str, Any], *, needs_recovery: bool = True,
) -> PassResult:  # fmt: skip
    """The result of a pass with MACs, parameters and the distance of the outputs from before."""
    before, after = graph.cost(module, inputs[0]), graph.cost(new, inputs[0])
    moved = distance(outputs(module, inputs), outputs(new, inputs))
    figures = {
        "macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
        "params_after": after.params, "output_distance": moved if moved < float("inf") else None,
    }  # fmt: skip
    return PassResult(model.with_module(new), changed, skipped, {**figures, **notes}, needs_recovery and bool(changed))


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless a share lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in tuple(known):
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
