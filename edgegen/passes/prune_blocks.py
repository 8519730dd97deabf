"""Remove whole residual blocks: those whose removal changes the output least, one after the other.

As in BK-SDM (Kim et al., 2023, arXiv:2305.15798) and layer dropping (Fan et al., 2020, LayerDrop, arXiv:1909.11556): a
block whose input and output have one shape is replaced by the identity. The choice is label-free: after each removal
every remaining block is tried again, and the one with the least distance of the outputs goes.

In its place the identity stays, or a cheap convolution that learns alone to give what the block gave (Zhu et al., 2023,
A-SDM, arXiv:2312.15516, after Deep Model Assembling: incubate each replacement, then train end to end, which is the
recipe's `distill`). Deviation: one depthwise separable convolution, not A-SDM's conditional one with the old kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, registry, training
from edgegen.errors import PassError
from edgegen.nn.passthrough import Passthrough
from edgegen.nn.stand_in import StandIn
from edgegen.passes import _alone, _lessons
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_USED = "the network looks at what is inside this block elsewhere, so that it has to stay"

REPLACEMENTS = ("identity", "conv")
# Option sets that `edgegen probe` times before any training.
PROBES: tuple[dict[str, Any], ...] = (
    {"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.5, "replace_by": "conv", "steps": 0},
)  # fmt: skip


def prune_blocks(
    model: Model,
    job: Job,
    *,
    ratio: float = 0.25,
    blocks: Sequence[str] = (),
    skip: Sequence[str] = (),
    samples: int = 4,
    replace_by: str = "identity",
    kernel: int = 3,
    steps: int = 200,
    batch: int = 8,
    lr: float = 1e-3,
) -> PassResult:
    """Replace residual blocks: those named in `blocks`, or a `ratio` of all that can go.

    Args:
        model: one stage with a module. Not modified.
        ratio: fraction of the removable blocks to remove, in [0, 1), rounded down; not used when `blocks` are named.
        skip: blocks that stay. samples: inputs on which outputs are compared (data, or made up where there is none).
        replace_by: "identity", or "conv": a depthwise (`kernel` wide) and a pointwise convolution in place of a block
            of maps, trained alone for `steps` steps on the block's own inputs and outputs (put back to the identity
            that it starts as where that did not help).
    Returns:
        PassResult; `changed` has the layers of each removed block, with the relative squared error of the output after
        its removal; `skipped` the others, with the error that removing their block would make; `notes` the blocks, and
        for replacements their own relative squared errors before and after training.
    Raises:
        ValueError: an option out of range, a model without a network, or a name that is no removable block.
        PassError: the loss of the replacements was never finite.
    """
    module = model.stage.module
    if module is None:
        raise ValueError(f"prune_blocks needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if not 0 <= ratio < 1 or samples < 1:
        raise ValueError(f"ratio must lie in [0, 1) and samples be at least 1, got {ratio} and {samples}")
    if replace_by not in REPLACEMENTS:
        raise ValueError(f"replace_by must be one of {', '.join(REPLACEMENTS)}, got {replace_by!r}")
    if steps < 0 or batch < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"steps must not be negative, batch at least 1 and kernel odd, got {steps}, {batch}, {kernel}")
    inputs, _ = _lessons.some_inputs(model, job, samples)
    result = graph.clone(module).eval()
    found = removable(result, inputs[0])
    for name in (*blocks, *skip):
        if name not in found:
            there = f"{registry.near(name, found)}; there are: {', '.join(found) or 'none'}"
            raise ValueError(f"no removable block {name!r} in {model.name}{there}")
    before = graph.cost(module, inputs[0])
    with training.use_threads(job.threads):
        gone, left = _remove(result, found, list(blocks), set(skip), int(ratio * len(found)), inputs, job)
    told = {}
    if replace_by == "conv":
        told = _replaced(model, result, list(gone), inputs, job, kernel, steps, batch, lr)
    after = graph.cost(result, inputs[0])
    changed = {layer: why for layer in graph.layers(module) if (why := _of_block(layer, gone))}
    skipped = {
        layer: _of_block(layer, left) or "is in no block that can be removed"
        for layer in graph.layers(module) if layer not in changed
    }  # fmt: skip
    notes = {
        "macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
        "params_after": after.params, "removable": len(found), "removed": ", ".join(gone), **told,
    }  # fmt: skip
    return PassResult(model.with_module(result), changed, skipped, notes, bool(changed))


def _replaced(
    model: Model, result: nn.Module, gone: Sequence[str], inputs: Sequence[Sequence[torch.Tensor]], job: Job,
    kernel: int, steps: int, batch: int, lr: float,
) -> dict[str, Any]:  # fmt: skip
    """Put convolutions into `result` where blocks of maps were, after each has learned alone; what is told of them."""
    device = distributed.own_device(job.device)
    original = graph.clone(model.stage.module).eval().requires_grad_(False)
    seen, handles = _alone.watch(original, gone)
    with graph.hooked(handles):
        graph.outputs(original, inputs[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        fresh = {path: StandIn(x.shape[1], kernel).eval() for path, x in seen.x.items() if x.ndim == 4}
    batch_at, _ = _lessons.batches(model, job, batch)
    stopped: dict[str, Any] = {}

    def train(learner: nn.Module, loss: _alone.Loss) -> None:
        if not steps:
            return
        file = job.checkpoints / "blocks.safetensors" if job.checkpoints else None
        found = training.train(
            learner, loss, batch_at, steps=steps, lr=lr, seed=job.seed, checkpoint=file, warmup=0.05,
            progress=job.progress, threads=job.threads, device=device,
        )  # fmt: skip
        if found.stopped and not found.steps:
            raise PassError(f"prune_blocks: {found.stopped}; check the value ranges of the inputs")
        stopped.update(_lessons.told(found))

    if not fresh:
        return {"replaced": ""}
    before, after = _alone.teach(original, fresh, inputs, device, train)
    for path, block in fresh.items():
        _put(result, path, block.requires_grad_(any(p.requires_grad for p in model.stage.module.parameters())).eval())
    return {"replaced": ", ".join(fresh), "errors": {path: [before[path], after[path]] for path in fresh}, **stopped}


def _of_block(layer: str, told: dict[str, str]) -> str:
    """What is told of the block that the layer lies in."""
    return next((text for block, text in told.items() if layer.startswith(f"{block}.")), "")


def removable(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[str]:
    """Names of blocks that map their first tensor to one of the same shape and hold two or more weighted layers.

    Of nested ones the outermost, unless it holds several of one class: then it is a stage, and they are the blocks.
    """
    names: list[str] = []

    def note(name: str, args: tuple, out: object) -> None:
        tensors = bool(args) and isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)
        if tensors and args[0].shape == out.shape and name not in names:  # type: ignore[attr-defined]
            names.append(name)

    parts = {
        name: part for name, part in module.named_modules()
        if name and not isinstance(part, _CONTAINERS) and len(graph.layers(part)) >= 2
    }  # fmt: skip
    handles = [
        part.register_forward_hook(lambda _, args, out, name=name: note(name, args, out))
        for name, part in parts.items()
    ]
    with graph.hooked(handles):
        graph.outputs(module, inputs)
    ordered = [name for name in parts if name in names]
    blocks = [name for name in ordered if not _is_stage(name, ordered, parts)]
    return [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]


def _is_stage(name: str, names: Sequence[str], parts: dict[str, nn.Module]) -> bool:
    inside = [type(parts[other]) for other in names if other.startswith(f"{name}.")]
    return len(set(inside)) < len(inside)


def _remove(
    module: nn.Module, found: Sequence[str], named: list[str], kept: set[str], count: int,
    inputs: Sequence[Sequence[torch.Tensor]], job: Job,
) -> tuple[dict[str, str], dict[str, str]]:  # fmt: skip
    """Take blocks out of `module` in place; (removed -> error, left -> error that removing it would make)."""
    wanted = [graph.outputs(module, sample) for sample in inputs]
    changed: dict[str, str] = {}
    for number in range(len(named) or count):
        job.progress(f"block {number + 1}", number / max(1, len(named) or count))
        free = [named[number]] if named else [n for n in found if n not in changed and n not in kept]
        if not free:
            break
        errors = {name: _error(module, name, inputs, wanted) for name in free}
        name = min(errors, key=lambda key: errors[key])
        if errors[name] == math.inf:
            if named:
                raise ValueError(f"block {name} cannot be removed: {_USED}; name another")
            break
        _put(module, name, Passthrough().eval())
        changed[name] = f"removed with block {name}; relative squared error of the output {errors[name]:.3g}"
    left = {
        name: f"removing block {name} would make a relative squared error of {error:.3g}" if error < math.inf else _USED
        for name in found if name not in changed for error in (_error(module, name, inputs, wanted),)
    }  # fmt: skip
    return changed, left


def _error(
    module: nn.Module, name: str, inputs: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[torch.Tensor]]
) -> float:
    """Relative squared error of the outputs without this block, infinite where it cannot go; the block comes back."""
    block = module.get_submodule(name)
    _put(module, name, Passthrough())
    try:
        got = [graph.outputs(module, sample) for sample in inputs]
    except AttributeError:  # as in DiT, whose first block embeds the time for the last layer too
        return math.inf
    finally:
        _put(module, name, block)
    pairs = [(a, b) for g, w in zip(got, wanted, strict=True) for a, b in zip(g, w, strict=True)]
    return sum(float((a - b).square().sum()) for a, b in pairs) / max(
        sum(float(b.square().sum()) for _, b in pairs), 1e-12
    )


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    module.get_submodule(parent)._modules[own] = part
