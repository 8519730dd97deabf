"""Noise schedules, and images from a denoiser by a named sampler. Needs numpy alone: bundles carry this file as it is.

A noised image at level t is x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (variance preserving: Ho et al., 2020,
arXiv:2006.11239). A sampler module has one function, named like the file:

    def <name>(denoise, x, levels, noise, *, option=default) -> x
    denoise(x, level) -> x0, the network's estimate, (N, C, H, W)
    levels: those that are visited, the last one free of noise (alpha 1, sigma 0)
    noise(number) -> standard normal numbers like x; `number` tells draws apart
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v", "x0")
SPACINGS = ("trailing", "leading", "linspace", "karras")
NULL = -1  # written as a label: the network's own "no class"
# What all samplers take; a sampler's own keyword-only options come on top. `of_network` are facts of the training.
OF_NETWORK: dict[str, Any] = {"prediction": "epsilon", "schedule": "linear", "train_steps": 1000, "labels": 0}
SHARED: dict[str, Any] = {
    "name": "ddim", "steps": 50, "seed": 0, "spacing": "trailing", "rho": 7.0, "timesteps": [], "clip": 1.0,
    "guidance": 1.0, "guidance_every": 1, "guidance_interval": [0.0, 1.0], "cache_every": 1, "cache_depth": 1,
    "cache_blocks": [],
}  # fmt: skip

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


class Level(NamedTuple):
    """Time as the network takes it, the two factors, and the number of the step that it is a run of."""

    t: float
    alpha: float
    sigma: float
    step: int


def function(name: str) -> Callable[..., np.ndarray]:
    """The sampler of that name: in edgegen, and beside this file in a bundle."""
    return getattr(importlib.import_module(f"{__package__}.{name}"), name)


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every default filled in; `given["name"]` is known to be a sampler.

    Raises:
        ValueError: an unknown setting, or a value out of range; names both.
    """
    own = dict(function(str(given.get("name", SHARED["name"]))).__kwdefaults__ or {})
    known = {**OF_NETWORK, **SHARED, **own}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"sampler {given.get('name')}: unknown setting {unknown[0]!r}; it has: {', '.join(known)}")
    found = {**known, **given}
    for key, allowed in (("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("spacing", SPACINGS)):
        if found[key] not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {found[key]!r}")
    last = int(found["train_steps"]) - 1
    for key in ("timesteps", "guidance_interval", "cache_blocks"):
        found[key] = _numbers(key, found[key])
    if times := found["timesteps"]:
        if any(not 0 <= t <= last for t in times) or any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"timesteps must fall from at most {last} to at least 0, got {times}")
        found["steps"] = len(times)
    _check_numbers(found, ("rho", "clip", "guidance", *own), last + 1)
    shares = found["guidance_interval"]
    if len(shares) != 2 or not 0 <= shares[0] <= shares[1] <= 1:
        raise ValueError(f"guidance_interval must be two shares of the time, low to high, in 0..1, got {shares}")
    blocks = found["cache_blocks"]
    if blocks and not (len(blocks) == 2 and all(type(n) is int for n in blocks) and 0 <= blocks[0] < blocks[1]):
        raise ValueError(f"cache_blocks must be empty or two block numbers, first and end, low to high; got {blocks}")
    if found["guidance"] != 1 and not found["labels"]:
        raise ValueError(f"guidance {found['guidance']} needs a network with class labels; this one has none, use 1")
    return found


def _check_numbers(found: Mapping[str, Any], real: Sequence[str], most: int) -> None:
    """Refuse whole numbers and `real` ones out of range; there are at most so many steps."""
    more = dict.fromkeys(("guidance_every", "cache_every", "cache_depth"), (1, math.inf))
    limits = {"steps": (1, most), **more}
    for key, (low, high) in limits.items():
        if type(found[key]) is not int or not low <= found[key] <= high:
            raise ValueError(f"{key} must be a whole number from {low} to {high}, got {found[key]!r}")
    for key in real:
        value = _numbers(key, found[key])
        if len(value) != 1 or not 0 <= value[0] < math.inf or (key == "rho" and not value[0]):
            least = "above 0" if key == "rho" else "of 0 or more"
            raise ValueError(f"{key} must be a number {least}, got {found[key]}")


def _numbers(key: str, value: Any) -> list[Any]:
    """A setting as a list of numbers; one alone is a list of one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in values):
        raise ValueError(f"{key} must be numbers, got {value!r}")
    return values


def alpha_bars(schedule: str, train_steps: int) -> np.ndarray:
    """Squared alpha of every training step, float64; the betas are those of Ho et al., Rombach et al., Nichol et al."""
    if schedule == "cosine":
        places = np.arange(train_steps + 1) / train_steps
        curve = np.cos((places + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, train_steps) ** 2
    else:
        betas = np.linspace(1e-4, 0.02, train_steps)
    return np.cumprod(1 - betas)


def levels(settings: Mapping[str, Any]) -> list[Level]:
    """The levels that the settings visit, from noise to image, and the end."""
    bars = alpha_bars(settings["schedule"], settings["train_steps"])
    ratios = np.sqrt((1 - bars) / bars)  # sigma / alpha: the noise level of EDM (Karras et al., 2022)
    count, total = settings["steps"], len(bars)
    times: np.ndarray
    if settings["timesteps"]:
        times = np.array(settings["timesteps"], np.float64)
    elif settings["spacing"] == "karras":
        ends = ratios[-1] ** (1 / settings["rho"]), ratios[0] ** (1 / settings["rho"])
        wanted = (ends[0] + np.linspace(0, 1, count) * (ends[1] - ends[0])) ** settings["rho"]
        times = np.interp(np.log(wanted), np.log(ratios), np.arange(total))
    elif settings["spacing"] == "leading":
        times = np.arange(count)[::-1].astype(np.float64) * (total // count)
    elif settings["spacing"] == "linspace":
        times = np.round(np.linspace(0, total - 1, count))[::-1]
    else:
        times = np.round(np.arange(total, 0, -total / count))[:count] - 1
    found = np.exp(np.interp(times, np.arange(total), np.log(ratios)))
    made = [Level(float(t), float(1 / math.hypot(1, r)), float(r / math.hypot(1, r)), i)
            for i, (t, r) in enumerate(zip(times, found))]  # fmt: skip
    return [*made, Level(0.0, 1.0, 0.0, count)]


def epsilon(x: np.ndarray, x0: np.ndarray, level: Level) -> np.ndarray:
    """The noise that is in x when x0 is the image."""
    return (x - level.alpha * x0) / level.sigma


def estimate(made: np.ndarray, x: np.ndarray, level: Level, prediction: str) -> np.ndarray:
    """The image that the network's output stands for."""
    if prediction == "epsilon":
        return (x - level.sigma * made) / level.alpha
    return level.alpha * x - level.sigma * made if prediction == "v" else made


def guided(settings: Mapping[str, Any], t: Any, step: Any) -> Any:
    """Guidance thinned: at every n-th step, and inside an interval of the time (Kynkaanniemi et al., 2024).

    t, step: of one step, or arrays of the same shape; a truth value, or as many.
    """
    low, high = settings["guidance_interval"]
    place = t / max(1, settings["train_steps"] - 1)
    return (step % settings["guidance_every"] == 0) & (low <= place) & (place <= high)


class Denoiser:
    """A network as `denoise(x, level) -> x0`: guidance, clipping and caching; `calls` counts runs of the network.

    run: feeds -> outputs of the network; with cached blocks two of them, {"full": run, "partial": run}: the full one
    gives further outputs, which the partial one takes under the same names.
    """

    def __init__(self, settings: Mapping[str, Any], run: Run | Mapping[str, Run], labels: np.ndarray | None) -> None:
        self.settings, self.labels, self.calls, self.partial_calls = settings, labels, 0, 0
        self.runs: Mapping[str, Run] = run if isinstance(run, Mapping) else {"full": run}
        self._kept: dict[bool, dict[str, np.ndarray]] = {}
        self._guided: dict[int, bool] = {}  # by step: its first run decides for all of them

    def __call__(self, x: np.ndarray, level: Level) -> np.ndarray:
        """The estimate of the image at a level, float64, inside +-clip (0: not clipped)."""
        made = self._network(x, level, self.labels)
        weight = float(self.settings["guidance"])
        if weight != 1 and self._guided.setdefault(level.step, bool(guided(self.settings, level.t, level.step))):
            free = self._network(x, level, np.full(len(x), NULL, np.float32))
            made = free + weight * (made - free)
        x0 = estimate(made, x, level, self.settings["prediction"])
        clip = float(self.settings["clip"])
        return np.clip(x0, -clip, clip) if clip else x0

    def _network(self, x: np.ndarray, level: Level, labels: np.ndarray | None) -> np.ndarray:
        feeds = {"sample": np.ascontiguousarray(x, np.float32), "timestep": np.full(len(x), level.t, np.float32)}
        if labels is not None:
            none = self.settings["labels"]
            feeds["label"] = np.where(labels == NULL, none, labels).astype(np.float32)
        branch = labels is not None and bool(np.all(labels == NULL))
        partial = "partial" in self.runs and level.step % self.settings["cache_every"] > 0 and branch in self._kept
        self.calls, self.partial_calls = self.calls + 1, self.partial_calls + partial
        made = dict(self.runs["partial" if partial else "full"]({**feeds, **(self._kept[branch] if partial else {})}))
        first = next(iter(made))
        output = made.pop(first)
        if not partial:
            self._kept[branch] = made
        return np.asarray(output, np.float64)


def generate(
    settings: Mapping[str, Any], run: Run | Mapping[str, Run], latents: np.ndarray, labels: np.ndarray | None = None
) -> np.ndarray:
    """Images (N, C, H, W) float32 from latents N(0, 1) of that shape; a function of settings, network and latents.

    Each image depends on its own latent and label alone, not on what else is in the stack.
    """
    found = complete(settings)
    keys = [zlib.crc32(np.ascontiguousarray(latent, np.float32).tobytes()) for latent in latents]
    if found["labels"] and labels is None:
        labels = np.array([key % found["labels"] for key in keys])

    def noise(number: int) -> np.ndarray:
        shape = latents.shape[1:]
        return np.stack([np.random.default_rng([found["seed"], key, number]).standard_normal(shape) for key in keys])

    denoise = Denoiser(found, run, labels if found["labels"] else None)
    sampler = function(found["name"])
    own = {key: found[key] for key in sampler.__kwdefaults__ or {}}
    return sampler(denoise, np.asarray(latents, np.float64), levels(found), noise, **own).astype(np.float32)


def calls(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(NFE: runs of the network for one image, how many of them are partial ones), counted on a pixel."""
    found, total, partial = complete(settings), 0, 0

    def full(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal total
        total += 1
        return {"output": feeds["sample"]}

    def cached(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal partial
        partial += 1
        return full(feeds)

    runs = {"full": full, "partial": cached} if found["cache_every"] > 1 else {"full": full}
    generate(found, runs, np.zeros((1, 1, 1, 1)))
    return total, partial
