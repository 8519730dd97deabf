"""The deep blocks of a denoiser run at every n-th step alone; the steps between take what they gave before.

Ma et al., 2024, DeepCache, arXiv:2312.00858, for U-Nets; Chen et al., 2024, Delta-DiT, arXiv:2406.01125, for
transformers. The network stays as it is: its sampler's settings change, and it is built twice, full and partial, with
the cache as a tensor between the two. No training, but for a small block in the partial network that corrects the cache
for the time of the step, where it is asked for (Gwilliam et al., 2025, Inner Loop Feedback, arXiv:2501.13107).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from edgegen import graph, samplers
from edgegen.nn import cached
from edgegen.passes import _denoising, _feedback
from edgegen.types import Job, Model, PassResult, Stage

CEILING_DB = 99.0
PROBES = ({"every": 2, "images": 1}, {"every": 3, "images": 1})  # what `edgegen probe` times


def cache_steps(
    model: Model,
    job: Job,
    *,
    every: int = 2,
    depth: int = 1,
    blocks: Sequence[int] = (),
    psnr: float = 0.0,
    images: int = 8,
    feedback: int = 0,
) -> PassResult:
    """Let the whole network run at every `every`-th step, and its outermost blocks alone at the others.

    Args:
        every: 2 or more. depth: blocks at each end that always run: up blocks of a U-Net, blocks of a transformer.
        blocks: of a transformer, the first of the cached blocks and the one after the last, in place of `depth`: the
            front ones make outlines and the rear ones details.
        psnr: of images against those without caching, in dB; `every` is lowered until they keep it. 0: not asked for.
        images: how many are compared.
        feedback: training steps of a block that learns, at each interval that is tried, what the full network would
            give from the cache; kept where the images come nearer. 0: none.
    Returns:
        PassResult; `notes` has NFE, how many of these runs are partial, MACs of both, the PSNR of the images, and with
        feedback the PSNR without it and the block's error on held-out latents before and after its training.
    Raises:
        ValueError: an option out of range, or a depth or blocks that the network does not have.
    """
    if every < 2 or depth < 1 or images < 1 or psnr < 0 or feedback < 0:
        given = f"{every}, {depth}, {images}, {psnr}, {feedback}"
        raise ValueError("every must be at least 2, depth and images at least 1, psnr and feedback 0 or more, got"
                         f" {given}")  # fmt: skip
    settings = samplers.of(model.options)
    module = model.stage.module
    if settings is None or module is None:
        return _denoising.untouched(model, "the network makes its output in one run; there are no steps to cache over")
    where = {"cache_depth": depth, "cache_blocks": list(blocks)}
    if why := cached.unfit(module):
        return _denoising.untouched(model, why)
    runs = cached.runs(module, {**settings, **where})
    shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
    latents = np.random.default_rng([job.seed, 5]).standard_normal((images, *shape), dtype=np.float32)
    wanted = samplers.generate({**settings, "cache_every": 1}, runs["full"], latents)
    tried: dict[str, float] = {}
    span = model.stage.outputs[0].value_range
    for interval in range(every, 1, -1):
        chosen = {**settings, **where, "cache_every": interval}
        if not samplers.cached(chosen):
            return _denoising.untouched(model, f"{settings['steps']} steps are too few to cache over")
        job.progress(f"images with a full run at every {interval}. step", (every - interval) / (every - 1))
        found = model
        more: dict[str, Any] = {}
        reached = without = _psnr(samplers.generate(chosen, runs, latents), wanted, span)
        if feedback:
            module, more = _feedback.trained(model, job, chosen, feedback)
            reached = _psnr(samplers.generate(chosen, cached.runs(module, chosen), latents), wanted, span)
            more |= {"psnr_with": reached, "psnr_without": without}
            found = model.with_module(module) if reached > without else model
        tried[str(interval)] = max(reached, without)
        if tried[str(interval)] >= psnr:
            return _result(found, chosen, tried, more)
    return _denoising.untouched(model, f"no interval keeps {psnr:g} dB to the images without caching", psnr_of=tried)


def _result(model: Model, chosen: dict, tried: Mapping[str, float], more: Mapping[str, Any]) -> PassResult:
    full, partial = cached.stages(model.stage, chosen)
    total, between = samplers.calls(chosen)
    every, depth, blocks = (chosen[key] for key in ("cache_every", "cache_depth", "cache_blocks"))
    notes = {
        "nfe": total, "partial_runs": between, "every": every, "psnr": tried[str(every)],
        "psnr_of": tried, "macs_full": _macs(full), "macs_partial": _macs(partial), **more,
    }  # fmt: skip
    told = {key: value for key, value in chosen.items() if key not in samplers._core.OF_NETWORK}
    taken = f"blocks {blocks[0]} to {blocks[1] - 1}" if blocks else f"all but the outermost {depth}"
    changed = {"sampler": f"{between} of {total} runs take {taken} from a step before"}
    if more:
        kept = "corrected by a trained block" if more["psnr_with"] > more["psnr_without"] else "left as it is"
        changed["cache"] = f"{kept}: {more['psnr_with']:.2f} dB with the block, {more['psnr_without']:.2f} dB without"
    return PassResult(dataclasses.replace(model, options={**model.options, "sampler": told}), changed, {}, notes)


def _macs(stage: Stage) -> int:
    return graph.cost(stage.module, [torch.zeros([int(d) for d in spec.shape]) for spec in stage.inputs]).macs


def _psnr(made: np.ndarray, wanted: np.ndarray, span: tuple[float, float] | None) -> float:
    low, high = span or (-1.0, 1.0)
    error = float(np.square(made.astype(np.float64) - wanted).mean())
    return min(CEILING_DB, float(10 * np.log10((high - low) ** 2 / max(error, 1e-12))))
