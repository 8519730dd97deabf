"""New blocks that learn alone: each from what the module that it replaces was given and gave, all side by side.

Ni et al., 2022, Deep Model Assembling, arXiv:2212.04129 (module incubation; there in a small meta model, here in the
network itself). It is frozen, so that no block sees what another one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.passes import _lessons

Loss = Callable[[nn.Module, _lessons.Batch, int], dict[str, torch.Tensor]]


@dataclass
class Seen:
    """What the watched modules of a network were given and gave in its last run."""

    x: dict[str, torch.Tensor]
    y: dict[str, torch.Tensor]


def watch(module: nn.Module, paths: Sequence[str]) -> tuple[Seen, list[Any]]:
    """Watch modules; the handles are to be removed."""
    seen = Seen({}, {})

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen.x[path], seen.y[path] = graph.flatten([args, kwargs])[0], graph.flatten(out)[0]

    return seen, [
        module.get_submodule(path).register_forward_hook(
            lambda _, args, kwargs, out, path=path: note(path, args, kwargs, out), with_kwargs=True)
        for path in paths
    ]  # fmt: skip


def errors(
    module: nn.Module, fresh: Mapping[str, nn.Module], inputs: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """Path -> squared error of the block's output relative to the squares of what the module there gave."""
    seen, handles = watch(module, list(fresh))
    sums = {path: [0.0, 1e-12] for path in fresh}
    with graph.hooked(handles), torch.no_grad():
        for sample in inputs:
            graph.outputs(module, sample)
            for path, block in fresh.items():
                sums[path][0] += float((block(seen.x[path]) - seen.y[path]).square().sum())
                sums[path][1] += float(seen.y[path].square().sum())
    return {path: wrong / power for path, (wrong, power) in sums.items()}


def teach(
    module: nn.Module, fresh: Mapping[str, nn.Module], inputs: Sequence[Sequence[torch.Tensor]], device: str,
    train: Callable[[nn.Module, Loss], None],
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Errors of the blocks before and after each has learned by itself; one that got worse is put back to its start.

    train: trains a module by a loss, on `device`, and gives it back on the CPU.
    """
    before = errors(module, fresh, inputs)
    start = {path: copy.deepcopy(block.state_dict()) for path, block in fresh.items()}
    learner = nn.ModuleDict({str(index): block for index, block in enumerate(fresh.values())}).requires_grad_(True)
    module.to(device)
    seen, handles = watch(module, list(fresh))

    def loss(_: nn.Module, batch: _lessons.Batch, step: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            module(*batch["input"])
        return {path: relative(block(seen.x[path]), seen.y[path]) for path, block in fresh.items()}

    with graph.hooked(handles):
        train(learner, loss)
    module.to("cpu")
    after = errors(module, fresh, inputs)
    for path in [path for path in fresh if not after[path] <= before[path]]:  # too high a rate for its good start
        fresh[path].load_state_dict(start[path])
        after[path] = before[path]
    return before, after


def relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error relative to the squares of what is wanted."""
    return (found - wanted).float().square().sum() / wanted.float().square().sum().clamp_min(1e-12)
