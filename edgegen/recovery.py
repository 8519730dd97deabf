"""Networks that were changed and not trained after it: what they still need, and what that would take here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from edgegen import graph as layers
from edgegen import recipe
from edgegen.run import Run
from edgegen.types import Model, PassResult

NEEDS = "needs recovery"
STEPS, BATCH = 2000, 8  # of the preset `strong`, whose distillation is advised


def open_ends(group: Sequence[recipe.Step], results: Sequence[PassResult]) -> list[str]:
    """Passes of a group that change what the network computes, with no training after them."""
    trained = max((place for place, step in enumerate(group) if step.name in recipe.TRAINS), default=-1)
    return [
        step.name for place, (step, result) in enumerate(zip(group, results, strict=True))
        if place > trained and result.needs_recovery and result.changed and step.name not in recipe.PREPARING_PASSES
    ]  # fmt: skip


def advice(names: Sequence[str], seconds: float) -> str:
    """What to write into the recipe, and how long it would take. seconds: measured of one step."""
    whole = STEPS * seconds
    length = f"{whole / 60:.0f} min" if whole >= 90 else f"{whole:.0f} s"
    return (f"{NEEDS}: after {' and '.join(names)} put pass = \"distill\", options = {{ steps = {STEPS} }} (the preset"
            f" `strong` has both); {seconds:.3g} s a step measured here x {STEPS} steps = {length}")  # fmt: skip


def step_seconds(run: Run, student: Model) -> float:
    """Seconds of a step of distillation: teacher forward, student forward and back, of one sample, times BATCH."""
    import torch

    from edgegen import training

    device = run.train_device
    teacher: Any = layers.clone(run.model.stage.module).to(device)
    net: Any = layers.clone(student.stage.module).requires_grad_(True).eval().to(device)
    generator = torch.Generator().manual_seed(run.request.seed)
    how = student.preprocessing
    specs = student.stage.inputs
    inputs = training.place([layers.example_input(spec, generator, preprocessing=how) for spec in specs], device)
    taken = []
    with training.use_threads(run.target.threads):
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            wanted = layers.outputs(teacher, inputs)
            with torch.enable_grad():
                got = layers.flatten(net(*inputs))
                torch.stack([(a - b).abs().mean() for a, b in zip(got, wanted, strict=True)]).sum().backward()
            if device != "cpu":  # there, work is only queued
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
    return BATCH * min(taken)
