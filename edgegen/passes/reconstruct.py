"""Give each layer that lost inputs the weights that best reproduce its teacher's output: least squares, no training.

He, Zhang, Sun, 2017, Channel Pruning for Accelerating Very Deep Neural Networks, arXiv:1707.06168, section 3.1, the
reconstruction step: min ||Y - X W||^2 with X the inputs that are left (from the pruned network, layer after layer, so
that later layers make up for earlier ones) and Y the teacher's output. Deviation: a ridge towards the weights as they
are, and the kept channels are those of `prune_channels`, not chosen by LASSO. A good start for `distill`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgegen import graph, training
from edgegen.passes import _lessons
from edgegen.types import Job, Model, PassResult

LAYERS = (nn.Conv2d, nn.Linear)
NOT_PROBED = "fits weights and leaves the shape"


def reconstruct(
    model: Model, job: Job, *, samples: int = 16, positions: int = 1024, ridge: float = 1e-4
) -> PassResult:
    """Solve for weight and bias of every convolution or linear layer that has its teacher's outputs and fewer inputs.

    Args:
        model: the pruned network; layers have the names of the teacher's. Not modified.
        job: `data` gives the inputs (made up where there is none), `teacher` the outputs to reproduce.
        samples: how many inputs. positions: places (pixels) drawn from each. ridge: strength of the pull towards the
            weights as they are, relative to the mean square of the inputs.
    Returns:
        PassResult; `changed` has each layer's relative squared error before and after.
    Raises:
        ValueError: an option out of range, no teacher, or a model without a network.
    """
    if samples < 1 or positions < 1 or not ridge > 0:
        raise ValueError(f"samples, positions and ridge must be positive, got {samples}, {positions}, {ridge}")
    if job.teacher is None or model.stage.module is None:
        raise ValueError("reconstruct needs a network and its teacher; it follows prune_channels")
    student, teacher = graph.clone(model.stage.module).eval(), graph.clone(job.teacher.stage.module).eval()
    inputs, source = _lessons.some_inputs(model, job, samples)
    changed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad(), training.use_threads(job.threads):
        known = graph.layers(teacher, LAYERS)
        names = [name for name in _called(student, inputs[0]) if _applies(name, student, known, skipped)]
        for number, name in enumerate(names):
            job.progress(name, number / len(names))
            before, after = _solve(name, student, teacher, inputs, positions, ridge, job.seed + number)
            changed[name] = f"relative error of its output {before:.3g} -> {after:.3g}"
    for name, layer in graph.layers(student).items():
        if name not in changed and name not in skipped:
            kind = type(layer).__name__
            skipped[name] = "never ran" if isinstance(layer, LAYERS) else f"a {kind}: no solution is made for those"
    return PassResult(model.with_module(student), changed, skipped, {"inputs": source}, needs_recovery=True)


def _called(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[str]:
    """Names of the weighted layers in the order in which they run."""
    order: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, layer in graph.layers(module, LAYERS).items()
    ]
    with graph.hooked(handles):
        module(*inputs)
    return list(dict.fromkeys(order))


def _applies(name: str, student: nn.Module, known: Mapping[str, Any], skipped: dict[str, str]) -> bool:
    mine: Any = student.get_submodule(name)
    theirs = known.get(name)
    if theirs is None or theirs.weight.ndim != mine.weight.ndim:  # what was factorised or substituted before
        skipped[name] = "its teacher has no such layer"
    elif mine.weight.shape[0] != theirs.weight.shape[0]:
        skipped[name] = "has fewer outputs than its teacher"
    elif mine.weight.shape[1] == theirs.weight.shape[1]:
        skipped[name] = "lost no inputs"
    elif getattr(mine, "groups", 1) != 1:
        skipped[name] = "grouped convolution"
    return name not in skipped


def _solve(
    name: str, student: nn.Module, teacher: nn.Module, inputs: Sequence[Sequence[torch.Tensor]], positions: int,
    ridge: float, seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Put the solution into the student's layer; its relative squared error before and after."""
    layer: Any = student.get_submodule(name)
    weight = layer.weight.flatten(1).T.double()  # (inputs * kernel, outputs)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros(weight.shape[1], dtype=torch.float64)
    start = torch.cat([weight, bias[None]]) if layer.bias is not None else weight
    gram = torch.zeros(len(start), len(start), dtype=torch.float64)
    cross, power = torch.zeros_like(start), 0.0
    for x, y in _pairs(name, student, teacher, inputs, positions, seed):
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if layer.bias is not None else x
        gram, cross, power = gram + x.T @ x, cross + x.T @ y, power + float(y.square().sum())

    def error(w: torch.Tensor) -> float:
        return (float((w * (gram @ w)).sum() - 2 * (w * cross).sum()) + power) / max(power, 1e-12)

    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.linalg.solve(gram + pull, cross + pull @ start)
    layer.weight.copy_(found[: len(weight)].T.reshape(layer.weight.shape).to(layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.copy_(found[-1].to(layer.bias.dtype))
    return error(start), error(found)


def _pairs(
    name: str, student: nn.Module, teacher: nn.Module, inputs: Sequence[Sequence[torch.Tensor]], positions: int,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """(inputs of the student's layer as rows, outputs of the teacher's) at the same random places, in float64."""
    caught: dict[str, torch.Tensor] = {}
    layer = student.get_submodule(name)
    handles = [
        layer.register_forward_pre_hook(lambda _, args: caught.update(x=args[0])),
        teacher.get_submodule(name).register_forward_hook(lambda _, args, out: caught.update(y=out)),
    ]
    generator = torch.Generator().manual_seed(seed)
    with graph.hooked(handles):
        for sample in inputs:
            student(*sample)
            teacher(*sample)
            x, y = _rows(layer, caught["x"]), caught["y"]
            y = y.flatten(2)[0].T if isinstance(layer, nn.Conv2d) else y.flatten(0, -2)  # (places, outputs)
            chosen = torch.randperm(len(y), generator=generator)[:positions]
            yield x[chosen].double(), y[chosen].double()


def _rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input that each output place sees, as rows (places, inputs * kernel)."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = layer.padding
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)[0].T
