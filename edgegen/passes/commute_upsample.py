"""1x1 convolutions behind an upsampling run before it, on the small image: exact, and s^2 times fewer of their MACs.

Hu et al., 2023, You Only Segment Once (YOSO), arXiv:2303.14651, the convolution-first aggregator. Nearest and bilinear
enlargement make each pixel a weighted mean of pixels with weights that sum to 1, the same for all channels; so they
commute with 1x1 convolutions, biases and batch norms in eval mode, and nearest also with any function of one pixel.

The rewrite `merge_upsampling` is another matter: it makes nearest x2 and a 3x3 convolution one transposed convolution
in the ONNX graph. A 3x3 convolution looks at neighbours and does not commute; a 1x1 is not touched there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.nn.upsample import EnlargeAfter
from edgegen.passes import _swap
from edgegen.types import Job, Model, PassResult

TOLERANCE = 1e-5  # of the largest output, in float64
_MODES = ("nearest", "nearest-exact", "bilinear")
# functions of one pixel and channel: only a copy of pixels commutes with them
_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Mish, nn.Hardtanh,
)  # fmt: skip
PROBES: tuple[dict[str, bool], ...] = ({},)  # what `edgegen probe` times
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode


def commute_upsample(model: Model, job: Job, *, layers: Sequence[str] = (), skip: Sequence[str] = ()) -> PassResult:
    """Move each `nn.Upsample` behind the 1x1 convolutions that follow it, and prove the network unchanged.

    Args:
        model: one stage with a module. Not modified.
        layers: only these 1x1 convolutions (or modules for all in them); skip: not these.
    Returns:
        PassResult; `changed` has the convolutions that run on the small image, `skipped` why the others do not; `notes`
        the MACs and the greatest deviation (of the largest output, in float64). Never needs recovery.
    Raises:
        ValueError: a model without a network, or a name that does not exist.
    """
    module = _swap.network(model, "commute_upsample")
    inputs, _ = _swap.samples(model, job, 2)
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, inputs[0], layers=layers, skip=skip, kinds=(nn.Conv2d,))
        wanted = {place.name for place in places}
        skipped |= {
            place.name: "no nn.Upsample comes right before it" if max(place.layer.kernel_size) == 1
            else "looks at neighbours, which does not commute with upsampling" for place in places
        }  # fmt: skip
        double = graph.clone(module).eval().double()
        exact = [tuple(x.double() if x.is_floating_point() else x for x in sample) for sample in inputs]
        result, worst = graph.clone(module).eval(), 0.0
        changed: dict[str, str] = {}
        for first, chain in _chains(module, inputs[0]):
            convs = [name for name in chain if isinstance(module.get_submodule(name), nn.Conv2d)]
            if reason := _unfit(module, first, chain, wanted):
                skipped |= dict.fromkeys((name for name in convs if name in wanted), reason)
                continue
            last = max(index for index, name in enumerate(chain) if name in convs)
            error = _deviation(double, exact, first, chain[: last + 1])
            if error > TOLERANCE:
                skipped |= dict.fromkeys(convs, f"moving the upsampling changes the output by {error:.2g} of its size")
                continue
            _move(result, first, chain[last])
            _move(double, first, chain[last])
            worst = max(worst, error)
            changed |= dict.fromkeys(convs, f"runs before {first} instead of after it")
        kept = {name: why for name, why in skipped.items() if name not in changed}
        return _swap.result(model, module, result, inputs, changed, kept, {"deviation": worst}, needs_recovery=False)


def _chains(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[tuple[str, list[str]]]:
    """(upsampling, modules that follow it one after the other as far as upsampling commutes with them)."""
    parts = {name: part for name, part in module.named_modules() if name and not any(part.children())}
    calls: list[tuple[str, Any, Any]] = []  # the tensors are kept, so that no other gets the same id

    with _swap.hooked(parts, lambda name, args, out: calls.append((name, args[0] if args else None, out))):
        graph.outputs(module, inputs)
    found, counts = [], [name for name, _, _ in calls]
    for index, (name, _, out) in enumerate(calls):
        part = parts[name]
        if not isinstance(part, nn.Upsample) or part.mode not in _MODES or counts.count(name) > 1:
            continue
        chain: list[str] = []
        for follower, source, made in calls[index + 1 :]:
            if source is not out or counts.count(follower) > 1 or not _commutes(parts[follower], part.mode):
                break
            chain, out = [*chain, follower], made
        found.append((name, chain))
    return found


def _commutes(part: Any, mode: str) -> bool:
    if isinstance(part, nn.Conv2d):
        return part.kernel_size == (1, 1) and part.stride == (1, 1) and part.padding in ((0, 0), "valid", "same")
    if isinstance(part, nn.BatchNorm2d):
        return part.running_mean is not None
    return isinstance(part, _NOTHING) or (isinstance(part, _POINTWISE) and mode.startswith("nearest"))


def _unfit(module: nn.Module, first: str, chain: Sequence[str], wanted: set[str]) -> str:
    """Why nothing is moved, or an empty string."""
    convs = [name for name in chain if isinstance(module.get_submodule(name), nn.Conv2d)]
    if not convs:
        return "no 1x1 convolution follows"
    if missing := [name for name in convs if name not in wanted]:
        return f"{missing[0]} behind {first} is not to be moved"
    upsample: Any = module.get_submodule(first)
    scale = upsample.scale_factor
    scales = scale if isinstance(scale, tuple) else (scale,)
    return f"{first} does not enlarge" if scale is not None and min(scales) < 1 else ""


def _move(module: nn.Module, first: str, last: str) -> None:
    """Put an identity in the place of the upsampling, and the upsampling behind the module `last`, in place."""
    enlarge: Any = module.get_submodule(first)
    size, scale = (list(value) if isinstance(value, tuple) else value for value in (enlarge.size, enlarge.scale_factor))
    block = EnlargeAfter(module.get_submodule(last), size, scale, enlarge.mode, enlarge.align_corners)
    _swap.put(module, last, block)
    _swap.put(module, first, nn.Identity())


def _deviation(module: nn.Module, inputs: _swap.Inputs, first: str, chain: Sequence[str]) -> float:
    """The greatest change of an output by the move, relative to the largest output; infinite where it fails."""
    trial = graph.clone(module)
    _move(trial, first, chain[-1])
    worst = 0.0
    for sample in inputs:
        try:
            pairs = zip(graph.outputs(trial, sample), graph.outputs(module, sample), strict=True)
            for got, expected in pairs:
                worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
        except (RuntimeError, ValueError):  # somebody else looks at the large image
            return float("inf")
    return worst
