"""Make the ranges of a layer's channels alike before quantization, without changing what the network computes.

Cross-layer equalization: Nagel, van Baalen, Blankevoort, Welling, 2019, Data-Free Quantization Through Weight
Equalization and Bias Correction, arXiv:1906.04721, section 4.1: s = sqrt(r1 / r2) makes the ranges of output channel i
of a layer and of input channel i of the next equal, where what lies between is positively homogeneous (f(s x) = s f(x)
for s > 0: ReLU, leaky ReLU, pooling). Batch norms are folded first; ReLU6 is no such function and is left alone.

Activations: Xiao et al., 2023, SmoothQuant, arXiv:2211.10438: a layer norm's output is divided by s = max|X|^a /
max|W|^(1 - a) and the linear layers behind it are multiplied by it: outliers move from activations, which have one
scale, into weights, which have one a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.passes import _flow, _lessons, _scaling
from edgegen.types import Job, Model, PassResult

HOMOGENEOUS = (
    "relu", "leaky_relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout", "mean",
    "flatten", "contiguous", "interpolate", "identity",
)  # fmt: skip
_MOST = 1e4  # a channel that is nearly dead would be blown up without end


def equalize(
    model: Model, job: Job, *, iterations: int = 20, smooth: float = 0.5, samples: int = 16
) -> PassResult:
    """Equalize weight ranges across pairs of layers, and activations behind layer norms; exact in float.

    Args:
        iterations: sweeps over all pairs; it ends earlier when no factor differs from 1 by more than 0.1 %.
        smooth: share of the difficulty that moves from activations to weights behind a layer norm, 0..1 (0: none).
        samples: how many inputs give the activation ranges that `smooth` needs.
    Returns:
        PassResult; `changed` has the layers whose weights changed and why, folded batch norms included.
    Raises:
        ValueError: an option out of range, or a model without a network.
    """
    if iterations < 1 or samples < 1 or not 0 <= smooth <= 1:
        raise ValueError(
            f"iterations and samples must be at least 1 and smooth lie in [0, 1], got {iterations}, {samples}, {smooth}"
        )
    inputs, source = batches(model, job, samples, "equalize")
    result = graph.clone(model.stage.module).eval()
    with torch.no_grad(), training.use_threads(job.threads):
        folded = _flow.fold(result, inputs[0])
        calls = _flow.record(result, inputs[0])
        found = pairs(result, calls)
        changed = {path: f"took in batch norm {norm}" for path, norm in folded.items()}
        before = _spread(result, found)
        sweeps = _equalized(result, found, iterations)
        for first, second in found:
            changed[first] = f"channels equalized with those of {second}"
            changed.setdefault(second, f"channels equalized with those of {first}")
        smoothed = _smoothed(result, calls, inputs, smooth) if smooth else {}
        changed |= smoothed
    if not found and not smoothed:
        result, changed = graph.clone(model.stage.module).eval(), {}
    skipped = dict.fromkeys(
        (path for path in graph.layers(result) if path not in changed),
        "no layer that it could share a factor with: a sum, a concatenation or another function lies between",
    )
    notes = {
        "pairs": len(found), "sweeps": sweeps, "inputs": source,
        "channel_spread_before": before, "channel_spread_after": _spread(result, found),
    }  # fmt: skip
    return PassResult(model.with_module(result), changed, skipped, notes)


def batches(model: Model, job: Job, samples: int, name: str) -> tuple[list[tuple[torch.Tensor, ...]], str]:
    """Inputs one by one, and what they are; raises ValueError for an ONNX file."""
    if model.stage.module is None:
        raise ValueError(f"{name} needs a network, and {model.name} is an ONNX file; use quantize or cast")
    return _lessons.some_inputs(model, job, samples)


def pairs(module: nn.Module, calls: Sequence[_flow.Call]) -> list[tuple[str, str]]:
    """(layer, next layer) where only homogeneous functions lie between and nothing else looks at what is between."""
    found = _flow.layers(module, calls)
    result = []
    for index, path in found.items():
        call = calls[index]
        while len(call.users) == 1 and call.users[0] >= 0:
            following = calls[call.users[0]]
            if following.index in found:
                second = found[following.index]
                if _scaling.widths(module.get_submodule(path))[1] == _scaling.widths(module.get_submodule(second))[0]:
                    result.append((path, second))
                break
            if following.name not in HOMOGENEOUS or len(following.sources) != 1 or not _keeps_channels(call, following):
                break
            call = following
    return result


def _keeps_channels(call: _flow.Call, following: _flow.Call) -> bool:
    """Whether channel i stays channel i: a flattening or a mean may only do away with places."""
    if following.name not in ("flatten", "mean"):
        return True
    return len(following.shape) > 1 and following.shape[1] == call.shape[1]


def _equalized(module: nn.Module, found: Sequence[tuple[str, str]], iterations: int) -> int:
    """Equalize in place; how many sweeps it took."""
    for sweep in range(iterations):
        largest = 0.0
        for first, second in found:
            a, b = module.get_submodule(first), module.get_submodule(second)
            one, two = _scaling.output_range(a).double(), _scaling.input_range(b).double()
            alive = (one > 0) & (two > 0)
            factor = torch.where(alive, (one / two.clamp_min(1e-30)).sqrt(), torch.ones_like(one))
            factor = factor.clamp(1 / _MOST, _MOST)
            _scaling.scale_outputs(a, (1 / factor).float())
            _scaling.scale_inputs(b, factor.float())
            largest = max(largest, float((factor - 1).abs().max()))
        if largest < 1e-3:
            return sweep + 1
    return iterations if found else 0


def _spread(module: nn.Module, found: Sequence[tuple[str, str]]) -> float:
    """Largest ratio, over the layers of all pairs, of the widest to the median range of the input channels."""
    worst = 1.0
    for _, second in found:
        ranges = _scaling.input_range(module.get_submodule(second))
        alive = ranges[ranges > 0]
        if len(alive):
            worst = max(worst, float(alive.max() / alive.median()))
    return worst


def _smoothed(
    module: nn.Module, calls: Sequence[_flow.Call], inputs: Sequence[tuple[torch.Tensor, ...]], share: float
) -> dict[str, str]:
    """Move outliers from the outputs of layer norms into the linear layers behind them, in place."""
    found = _flow.layers(module, calls)
    groups: dict[str, list[str]] = {}
    for call in calls:
        norm: Any = module.get_submodule(call.path)
        users = list(call.users)
        runs = sum(other.name == "layer_norm" and other.path == call.path for other in calls)
        fits = call.name == "layer_norm" and isinstance(norm, nn.LayerNorm) and norm.weight is not None and runs == 1
        linear = [found[user] for user in users if user in found and calls[user].name == "linear"]
        if fits and users and len(linear) == len(users) and len(norm.normalized_shape) == 1:
            groups[call.path] = linear
    peaks = _peaks(module, list(groups), inputs)
    changed = {}
    for path, followers in groups.items():
        norm = module.get_submodule(path)
        layers = [module.get_submodule(name) for name in followers]
        weight = torch.stack([_scaling.input_range(layer) for layer in layers]).amax(0)
        factor = peaks[path].clamp_min(1e-5) ** share / weight.clamp_min(1e-5) ** (1 - share)
        factor = (factor / factor.log().mean().exp()).clamp(1 / _MOST, _MOST)  # only ratios matter
        norm.weight.data = norm.weight.data / factor
        if norm.bias is not None:
            norm.bias.data = norm.bias.data / factor
        for name, layer in zip(followers, layers, strict=True):
            _scaling.scale_inputs(layer, factor)
            changed[name] = f"took outliers of the activations over from {path}"
    return changed


def _peaks(
    module: nn.Module, norms: Sequence[str], inputs: Sequence[tuple[torch.Tensor, ...]]
) -> dict[str, torch.Tensor]:
    """Largest magnitude of each channel of the norms' outputs."""
    peaks: dict[str, torch.Tensor] = {}

    def catch(name: str, out: torch.Tensor) -> None:
        found = out.abs().flatten(0, -2).amax(0)
        peaks[name] = torch.maximum(peaks[name], found) if name in peaks else found

    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: catch(name, out))
        for name in norms
    ]
    with graph.hooked(handles):
        for sample in inputs if norms else ():
            module(*sample)
    return peaks
