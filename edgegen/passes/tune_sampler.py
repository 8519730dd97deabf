"""Settings of a denoiser's sampler that bring its images nearest to the teacher's, at a number of network runs.

No training: sampler, spacing and rho of the steps (Karras et al., 2022, arXiv:2206.00364), the steps' own times, and
factors of a U-Net's skips (Ma et al., 2024, Skip-Tuning, arXiv:2402.15170; Si et al., 2024, FreeU, arXiv:2309.11497).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from edgegen import graph, samplers
from edgegen.nn import diffusion, features, mmd
from edgegen.nn.skips import ScaledSkips
from edgegen.passes import _denoising
from edgegen.passes._reals import reals
from edgegen.types import Job, Model, PassResult

METHODS = ("ddim", "euler", "heun", "dpmpp_2m")  # those whose images depend on nothing but the latent
METRICS, FEWEST = ("distance", "kid"), 64  # images from which on KID tells settings apart
Score = Callable[[Mapping[str, Any], nn.Module], float]
NOT_PROBED = "other settings of the same runs; for fewer runs see distill_steps"


def tune_sampler(
    model: Model,
    job: Job,
    *,
    nfe: int = 0,
    methods: Sequence[str] = ("ddim", "dpmpp_2m", "heun"),
    rhos: Sequence[float] = (3.0, 7.0),
    times: int = 1,
    skips: Sequence[float] = (),
    backbones: Sequence[float] = (),
    images: int = 16,
    finest: int = 0,
    metric: str = "distance",
) -> PassResult:
    """Search over settings, each judged by the distance to the teacher's images of the same latents, or by KID.

    Args:
        nfe: network runs for one image, at most, guidance counted twice where it is applied; 0: as many as now.
        methods: samplers to try, with steps spread evenly and with spacing "karras" at each of `rhos`.
        times: rounds over the steps in which each one's time is moved towards its neighbours.
        skips, backbones: factors to try on a U-Net's skips and on half of the channels from below; none: left alone.
        images: how many latents. finest: steps of the teacher's sampler; 0: as its settings say.
        metric: distance (mean square to the teacher's images of the same latents) or kid (kernel distance, in the
            features that the model's options name, to as many real images of the data, or where it has none to the
            teacher's of other latents; from 64 images on).
    Returns:
        PassResult; `notes` has every setting that was tried with its distance.
    Raises:
        ValueError: an option out of range, or an nfe in which the sampler's guidance has no room for a single step.
    """
    settings = samplers.of(model.options)
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {name!r}")
    if nfe < 0 or times < 0 or images < 1 or finest < 0:
        raise ValueError(f"nfe, times and finest must be 0 or more and images 1 or more, got {nfe}, {times}, {finest},"
                         f" {images}")  # fmt: skip
    if metric not in METRICS or (metric == "kid" and images < FEWEST):
        raise ValueError(f"metric must be distance, or kid with {FEWEST} images or more, got {metric} with {images}")
    if any(not factor > 0 for factor in (*rhos, *skips, *backbones)):
        raise ValueError("rhos, skips and backbones must be above 0")
    if settings is None or model.stage.module is None:
        return _denoising.untouched(model, "the network makes its output in one run; it has no sampler")
    runs = nfe or samplers.nfe(settings)
    score = (_distance if metric == "distance" else _kid)(model, job, settings, images, finest)
    tried: list[dict[str, Any]] = []

    def judged(candidate: Mapping[str, Any], module: nn.Module, more: Mapping[str, Any]) -> float:
        tried.append({**_told(candidate), **more, "distance": score(candidate, module)})
        return tried[-1]["distance"]

    plain = _within({**settings, "name": "ddim", "spacing": "trailing"}, runs) if nfe else settings
    if plain is None:
        raise ValueError(f"nfe must leave room for one step, which takes 2 runs with guidance; got {nfe}")
    start = judged(plain, model.stage.module, {})
    best: Mapping[str, Any] = plain
    found = start
    for candidate in _candidates(settings, runs, methods, rhos):
        if (value := judged(candidate, model.stage.module, {})) < found:
            best, found = candidate, value
    best, found = _moved(best, found, times, runs, lambda candidate: judged(candidate, model.stage.module, {}))
    module, factors, found = _factors(model, best, found, skips, backbones, judged)
    notes = {"nfe": samplers.nfe(best), "metric": metric, "distance_before": start, "distance": found, "tried": tried,
             **factors}  # fmt: skip
    if best == settings and not factors:
        return _denoising.untouched(model, "no other setting comes nearer to the teacher", **notes)
    told = {name: str(value) for name, value in factors.items()}
    changed = {"sampler": f"{_words(settings)} -> {_words(best)}", **told}
    options = {**model.options, "sampler": _told(best)}
    return PassResult(dataclasses.replace(model.with_module(module), options=options), changed, {}, notes)


def _latents(model: Model, images: int, *seed: int) -> np.ndarray:
    shape = tuple(int(d) for d in model.stage.inputs[0].shape[1:])
    return np.random.default_rng(seed).standard_normal((images, *shape), dtype=np.float32)


def _taught(model: Model, job: Job, settings: Mapping[str, Any], finest: int, latents: np.ndarray) -> np.ndarray:
    """The images of the job's teacher, or without one of the model itself."""
    origin = job.teacher if job.teacher is not None and samplers.of(job.teacher.options) else model
    truth = dict(samplers.of(origin.options) or settings)
    if finest:
        truth.update(steps=finest, timesteps=[])
    return samplers.generate(truth, diffusion.runner(origin.stage.module), latents)


def _kid(model: Model, job: Job, settings: Mapping[str, Any], images: int, finest: int) -> Score:
    """The score of (settings, module): KID of its images of fixed latents."""
    low, high = model.stage.outputs[0].value_range or (-1.0, 1.0)
    extractor = features.load_features(str(model.options.get("features", "cifar")))

    def seen(made: np.ndarray) -> np.ndarray:
        return extractor(np.clip((made - low) / (high - low), 0, 1).astype(np.float32))[1]

    latents, others = _latents(model, images, job.seed, 4), _latents(model, images, job.seed, 8)
    real = reals(job.data, model, default=(-1.0, 1.0))
    wanted = seen(_taught(model, job, settings, finest, others) if real is None else real.drawn(images, [job.seed, 8]))

    def score(candidate: Mapping[str, Any], module: nn.Module) -> float:
        return mmd.squared(wanted, seen(samplers.generate(candidate, diffusion.runner(module), latents)))

    return score


def _distance(model: Model, job: Job, settings: Mapping[str, Any], images: int, finest: int) -> Score:
    """The score of (settings, module) on fixed latents."""
    latents = _latents(model, images, job.seed, 4)
    wanted = _taught(model, job, settings, finest, latents)

    def score(candidate: Mapping[str, Any], module: nn.Module) -> float:
        made = samplers.generate(candidate, diffusion.runner(module), latents)
        return float(np.square(made.astype(np.float64) - wanted).mean())

    return score


def _within(settings: Mapping[str, Any], runs: int) -> dict[str, Any] | None:
    """The settings with as many steps as take no more than `runs` network runs; None where one step takes more."""

    def of(steps: int) -> tuple[dict[str, Any], int]:
        candidate = samplers.complete({**settings, "timesteps": [], "steps": steps})
        return candidate, samplers.nfe(candidate)

    steps = most = min(runs, settings["train_steps"])
    found, taken = of(steps)
    while taken > runs and steps > 1:
        steps = max(1, min(steps - 1, steps * runs // taken))
        found, taken = of(steps)
    while steps < most and (more := of(steps + 1))[1] <= runs:
        steps, (found, taken) = steps + 1, more
    return found if taken <= runs else None


def _candidates(
    settings: Mapping[str, Any], runs: int, methods: Sequence[str], rhos: Sequence[float]
) -> list[dict[str, Any]]:
    spacings: list[dict[str, Any]] = [{"spacing": "trailing"}, *({"spacing": "karras", "rho": rho} for rho in rhos)]
    shared = {key: value for key, value in settings.items() if key != "eta"}
    tried = [_within({**shared, "name": name, **spacing}, runs) for name in methods for spacing in spacings]
    return [candidate for candidate in tried if candidate is not None]


def _moved(
    best: Mapping[str, Any], found: float, rounds: int, runs: int, judged: Callable[[Mapping[str, Any]], float]
) -> tuple[Mapping[str, Any], float]:
    """Each time of the steps moved a third of the way to its neighbours, kept where that helps at no more runs."""
    for _ in range(rounds):
        for place in range(1, len(samplers.levels(best)) - 1):
            for side in (-1, 1):
                now = [level.t for level in samplers.levels(best)[:-1]]
                beside = now[place + side] if place + side < len(now) else 0.0
                now[place] += (beside - now[place]) / 3
                if any(a <= b for a, b in pairwise(now)):
                    continue
                candidate = {**best, "timesteps": [round(t, 3) for t in now]}
                if samplers.nfe(candidate) <= runs and (value := judged(candidate)) < found:
                    best, found = candidate, value
    return best, found


def _factors(
    model: Model, best: Mapping[str, Any], found: float, skips: Sequence[float], backbones: Sequence[float],
    judged: Callable[[Mapping[str, Any], nn.Module, Mapping[str, Any]], float],
) -> tuple[nn.Module, dict[str, float], float]:  # fmt: skip
    """The network with the factors that bring it nearest; the unchanged one where none does."""
    module, chosen = model.stage.module, {}
    if not any(hasattr(part, "up_blocks") for part in model.stage.module.modules()):
        return module, {}, found
    for skip in skips or (1.0,):
        for backbone in backbones or (1.0,):
            if (skip, backbone) == (1.0, 1.0):
                continue
            factors = {"skip": float(skip), "backbone": float(backbone)}
            scaled = graph.clone(model.stage.module)
            for part in [part for part in scaled.modules() if hasattr(part, "up_blocks")]:
                blocks: Any = part.up_blocks
                for number, block in enumerate(blocks):
                    blocks[number] = ScaledSkips(block, **factors)
            if (value := judged(best, scaled.eval(), factors)) < found:
                module, chosen, found = scaled, factors, value
    return module, chosen, found


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The user's part of complete settings."""
    return {key: value for key, value in settings.items() if key not in samplers._core.OF_NETWORK}


def _words(settings: Mapping[str, Any]) -> str:
    spread = "own times" if settings["timesteps"] else settings["spacing"]
    rho = f" {settings['rho']:g}" if spread == "karras" else ""
    return f"{settings['name']}, {settings['steps']} steps, {spread}{rho}"
