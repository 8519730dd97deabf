"""Set the smallest weights to zero: any of them (magnitude), or N of every M along the inputs.

Han et al., 2015, Learning both Weights and Connections, arXiv:1506.02626; Mishra et al., 2021, Accelerating Sparse Deep
Neural Networks, arXiv:2104.08378 for 2:4. The network keeps its shapes: only a target that skips zeros gets faster
(TensorRT on Ampere and later tries sparse kernels for 2:4), and a file gets smaller only by compression.

`distill` trains all weights, the zeros too; so the order is distill, then this pass, or this pass after each distill.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgegen import graph, training
from edgegen.passes import _swap
from edgegen.types import Job, Model, PassResult

SCOPES = ("layer", "global")
_TECHNIQUE = "2:4-sparsity"  # as target files name it
NOT_PROBED = "zeros leave the shape; only sparse kernels gain by them, and only where they are"


def prune_weights(
    model: Model,
    job: Job,
    *,
    sparsity: float = 0.5,
    scope: str = "layer",
    pattern: str = "",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    samples: int = 2,
) -> PassResult:
    """Zero a `sparsity` of the weights, or by a `pattern` such as "2:4".

    Args:
        model: one stage with a module. Not modified.
        sparsity: fraction of the weights to be zero, in [0, 1); not used with a pattern.
        scope: "layer" (the fraction of each layer) or "global" (of all, the smallest anywhere).
        pattern: "N:M": of every M successive inputs (at one place of the window) the N largest weights stay.
        layers, skip: names of layers, or of modules for all in them. samples: inputs on which outputs are compared.
    Returns:
        PassResult; `changed` has the sparsity of each layer, `skipped` why others stay; `notes` the sparsity of all
        weights, the size of the weights before and after compression (deflate, byte), and what the target makes of it.
    Raises:
        ValueError: an option out of range, a model without a network, or a name that does not exist.
    """
    _swap.check_share("sparsity", sparsity)
    _swap.check_choice("scope", scope, SCOPES)
    kept, of = _pattern(pattern)
    module = _swap.network(model, "prune_weights")
    inputs, source = _swap.samples(model, job, samples)
    with torch.no_grad(), training.use_threads(job.threads):
        result = graph.clone(module).eval()
        places, skipped = _swap.find(model, result, inputs[0], layers=layers, skip=skip, kinds=graph.WEIGHTED)
        weights = {place.name: place.layer.weight for place in places}
        if of:
            unfit = {name: width for name, w in weights.items() if (width := _inputs(result, name, w)) % of}
            skipped |= {name: f"{width} inputs are no multiple of {of}" for name, width in unfit.items()}
            masks = {
                name: _n_of_m(w, kept, of, _input_axis(result, name))
                for name, w in weights.items() if name not in unfit
            }  # fmt: skip
        else:
            masks = _smallest(weights, sparsity, scope)
        changed = {}
        for name, mask in masks.items():
            weights[name].mul_(mask)
            zeros = float((weights[name] == 0).double().mean())
            if bool(mask.all()):
                skipped[name] = "no weight of it is among the smallest"
            else:
                changed[name] = f"{zeros:.3f} of its weights are zero"
        notes = {"pattern": pattern, "inputs": source, **_figures(module, result), **_effect(job, pattern)}
        return _swap.result(model, module, result, inputs, changed, skipped, notes)


def _pattern(text: str) -> tuple[int, int]:
    """(N, M) of "N:M", (0, 0) of nothing."""
    if not text:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f'pattern must be "N:M" with 0 < N < M, such as "2:4", got {text!r}')
    return int(found[1]), int(found[2])


def _input_axis(module: nn.Module, name: str) -> int:
    return 0 if getattr(module.get_submodule(name), "transposed", False) else 1


def _inputs(module: nn.Module, name: str, weight: Tensor) -> int:
    return weight.shape[_input_axis(module, name)]


def _smallest(weights: Mapping[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Layer -> mask with zeros where the smallest weights are: exactly that fraction, ties by position."""
    if scope == "layer":
        return {name: _without(weight.abs().flatten(), sparsity).view_as(weight) for name, weight in weights.items()}
    if not weights:
        return {}
    every = _without(torch.cat([weight.abs().flatten() for weight in weights.values()]), sparsity)
    parts = every.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _without(sizes: Tensor, fraction: float) -> Tensor:
    """A mask of ones with zeros at that fraction of the smallest entries, rounded to the nearest count."""
    mask = torch.ones_like(sizes)
    mask[torch.argsort(sizes, stable=True)[: round(fraction * sizes.numel())]] = 0
    return mask


def _n_of_m(weight: Tensor, kept: int, of: int, axis: int) -> Tensor:
    """A mask with `kept` ones among every `of` successive entries along an axis: the largest."""
    moved = weight.abs().movedim(axis, -1)
    groups = moved.reshape(-1, of)
    mask = torch.zeros_like(groups)
    mask.scatter_(1, torch.argsort(groups, dim=1, descending=True, stable=True)[:, :kept], 1.0)
    return mask.reshape(moved.shape).movedim(-1, axis)


def _figures(before: nn.Module, after: nn.Module) -> dict[str, float | int]:
    """Zeros and sizes of the weights of convolutions and linear layers."""
    every = torch.cat([layer.weight.detach().flatten() for layer in graph.layers(after).values()])  # type: ignore[operator]
    return {
        "sparsity": float((every == 0).double().mean()),
        "compressed_before_bytes": _compressed(before), "compressed_after_bytes": _compressed(after),
    }  # fmt: skip


def _compressed(module: nn.Module) -> int:
    """Size of all parameters after deflate, byte."""
    packed, size = zlib.compressobj(6), io.BytesIO()
    for parameter in module.parameters():
        size.write(packed.compress(parameter.detach().cpu().contiguous().numpy().tobytes()))
    size.write(packed.flush())
    return size.tell()


def _effect(job: Job, pattern: str) -> dict[str, str]:
    """What the target gains from the zeros, as its file states it."""
    if pattern == "2:4" and _TECHNIQUE in job.target.techniques.get("latency", ()):
        return {"gain": f"{job.target.name} runs 2:4 sparsity faster; to be measured"}
    only, capability = "size after compression only", job.target.compute_capability.partition(".")[0]
    if pattern == "2:4" and "tensorrt" in job.target.runtimes and int(capability or 0) >= 8:
        return {"gain": f"TensorRT tries sparse kernels on {job.target.name} and keeps what is faster; to be measured"}
    if pattern:
        return {"gain": f"{only}: no runtime on this target uses {pattern} sparsity"}
    return {"gain": f"{only}: {job.target.name} computes zeros like other numbers"}
