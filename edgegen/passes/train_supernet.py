"""Train the network so that its slices are good networks too: one training for every subnet of a search.

The sandwich rule and its papers are in `_supernet`. `slice_widths` cuts a subnet out of the result, `prune_blocks`
leaves blocks out of it, `distill` continues the subnet alone. A search trains it once: the step is kept in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.passes import _lessons, _supernet, prune_blocks
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

NOT_PROBED = "its slices have the shapes that prune_channels is probed with"


def train_supernet(
    model: Model,
    job: Job,
    *,
    steps: int = 500,
    batch: int = 8,
    lr: float = 1e-3,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    between: int = 2,
    depth: bool = False,
    crop: int | None = None,
    precision: str = "auto",
    optimizer: str = "adamw",
    samples: int = 64,
    round_to: int | None = None,
) -> PassResult:
    """Sort the channels of each free width by importance (exact), then train all slices at once against the teacher.

    Args:
        model: one stage with a module. Not modified.
        steps: of training; 0: the channels are only sorted, and the network computes what it did.
        batch, lr, crop, precision, optimizer: as in `distill`; made-up inputs where there is no data.
        shares: of each width that subnets may keep, in (0, 1], beside all of it; rounded up to `round_to` channels
            (None: the target's int8 width).
        between: subnets drawn at random in each step, beside the widest and the narrowest.
        depth: residual blocks may be left out as well. samples: inputs for the statistics of batch norms.
    Returns:
        PassResult; `changed` has all layers when it was trained, else those whose channels moved; `skipped` why nothing
        could be shared. `notes` has the widths and the loss of the widest subnet at the beginning and at the end.
    Raises:
        ValueError: an option out of range, or a model without a network.
        PassError: the loss was never finite.
    """
    _check(model, steps, batch, between, samples, round_to, shares)
    module = model.stage.module
    job = dataclasses.replace(job, device=distributed.own_device(job.device))
    batch_at, source = _lessons.batches(model, job, batch, crop)
    try:
        blocks = prune_blocks.removable(graph.clone(module).eval(), batch_at(0)["input"]) if depth else []
        space = _supernet.elastic(module, shares, round_to or job.target.width_multiple("int8"), blocks)
    except ValueError as error:
        return PassResult(model, {}, dict.fromkeys(graph.layers(module), f"no slices: {error}"))
    result = _supernet.sort_channels(module, space.widths).eval().requires_grad_(True)
    widths = {width.name: list(space.counts[width.name]) for width in space.widths}
    notes: dict[str, Any] = {"widths": widths, "blocks": blocks, "inputs": source}
    if not steps:
        moved = {name for width in space.widths for name in (*width.writers, *width.readers)}
        changed = {name: "channels sorted by importance" for name in graph.layers(module) if name in moved}
        left = {name: "its channels are not free" for name in graph.layers(module) if name not in moved}
        return PassResult(model.with_module(result), changed, left, notes)
    teacher = graph.clone((job.teacher or model).stage.module).eval().requires_grad_(False).to(job.device)
    low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
    span = max(float(high) - float(low), 1e-6)
    told = training.train(
        result, _supernet.lesson(teacher, space, between, job.seed, span), batch_at, steps=steps, lr=lr, seed=job.seed,
        precision=precision, optimizer=optimizer, threads=job.threads, device=job.device, progress=job.progress,
        checkpoint=job.checkpoints / "supernet.safetensors" if job.checkpoints else None,
    )  # fmt: skip
    if told.stopped and not told.steps:
        raise PassError(f"train_supernet: {told.stopped}; check the value ranges of the inputs")
    with training.use_threads(job.threads):
        _supernet.estimate(result, [batch_at(steps + i)["input"] for i in range(max(1, samples // batch))])
    notes |= {"steps": told.steps, "precision": told.precision, "seconds": round(told.seconds, 3),
              "curve": [list(point) for point in told.curve], "stopped": told.stopped}  # fmt: skip
    return PassResult(model.with_module(result.eval()), dict.fromkeys(graph.layers(module), "trained"), {}, notes)


def _check(
    model: Model, steps: int, batch: int, between: int, samples: int, round_to: int | None, shares: Sequence[float]
) -> None:
    if model.stage.module is None:
        raise ValueError(f"train_supernet needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if steps < 0 or between < 0:
        raise ValueError(f"steps and between must be 0 or more, got {steps} and {between}")
    if batch < 2:  # the statistics of a batch of one are no statistics
        raise ValueError(f"batch must be at least 2, got {batch}")
    if samples < 1 or (round_to is not None and round_to < 1):
        raise ValueError(f"samples and round_to must be at least 1, got {samples} and {round_to}")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must lie in (0, 1], got {list(shares)}")
