"""Train the block that corrects cached features (`nn.feedback`): the rest of the network stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgegen import graph, samplers, training
from edgegen.nn import cached
from edgegen.passes import _lessons
from edgegen.training import distributed
from edgegen.types import Job, Model

LATENTS, POINTS = 32, 256  # images on whose way the block learns, and how many steps of theirs
BATCH, RATE = 16, 2e-3
HELD_OUT = 4  # every fourth latent is not learned from


def trained(model: Model, job: Job, settings: Mapping[str, Any], steps: int) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the network with the block, and notes: its error on latents that are held out, before and after.

    What is learned is what the full network gives at the steps between, on its own way from noise to image, from the
    cache of the step before.
    """
    module = graph.clone(model.stage.module).eval().requires_grad_(False)
    full = cached.runs(module, settings)["full"]

    def exact(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": full({name: value for name, value in feeds.items() if name != cached.CACHE})["output"]}

    shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
    latents = np.random.default_rng([job.seed, 6]).standard_normal((LATENTS, *shape), dtype=np.float32)
    given = samplers.trajectory(settings, {"full": full, "partial": exact}, latents, POINTS)
    pairs = [torch.from_numpy(value) for value in (*given.values(), exact(given)["output"])]
    block = cached.add_feedback(module, given[cached.CACHE].shape, job.seed)
    for parameter in block.own():
        parameter.requires_grad_(True)
    partial = cached.Partial(module, settings["cache_depth"], settings["cache_blocks"])
    places = np.arange(POINTS)  # point i is of latent i % LATENTS
    tests, lessons = (torch.from_numpy(places[(places % HELD_OUT == 0) == chosen]) for chosen in (True, False))

    def batch_at(step: int) -> tuple[torch.Tensor, ...]:
        chosen = lessons[np.random.default_rng([job.seed, step, 7]).integers(len(lessons), size=BATCH)]
        return tuple(part[chosen] for part in pairs)

    def loss(learner: nn.Module, batch: tuple[torch.Tensor, ...], step: int) -> torch.Tensor:
        return (learner(*batch[:-1]).float() - batch[-1]).square().mean()

    def error() -> float:
        with torch.no_grad():
            return float(loss(partial.eval(), tuple(part[tests] for part in pairs), 0))

    before = error()
    result = training.train(
        partial, loss, batch_at, steps=steps, lr=RATE, seed=job.seed, warmup=0.05, precision="fp32",
        checkpoint=job.checkpoints / f"feedback-{settings['cache_every']}.safetensors" if job.checkpoints else None,
        progress=job.progress, threads=job.threads, device=distributed.own_device(job.device),
    )  # fmt: skip
    partial.to("cpu").requires_grad_(False)
    notes = {"feedback_error_before": before, "feedback_error": error(), "feedback": _lessons.told(result)}
    return module.eval(), notes | {"stopped": result.stopped}
