"""Samplers by name: host-side loops over any runtime's `run` that turn a denoiser into a generator of images.

The settings are plain data: a model's options hold "sampler" (what the user chooses) and, beside it, the facts of the
training: "prediction", "schedule", "train_steps", "labels".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import registry
from edgegen.errors import UsageError
from edgegen.samplers import _core
from edgegen.samplers._core import Denoiser, Level, Run, alpha_bars, epsilon, estimate, guided, levels

__all__ = [
    "Denoiser", "Level", "Run", "alpha_bars", "cached", "calls", "complete", "epsilon", "estimate", "feeds", "generate",
    "guided", "inputs", "levels", "nfe", "of", "sources", "trajectory",
]  # fmt: skip


def of(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The complete settings of a model's options; None where the model makes its output in one run.

    Raises:
        UsageError: unknown sampler or setting, a value out of range.
    """
    if not options.get("sampler"):
        return None
    facts = {key: options[key] for key in _core.OF_NETWORK if key in options}
    return complete({**facts, **options["sampler"]})


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every default filled in.

    Raises:
        UsageError: as for `of`.
    """
    registry.check("samplers", str(given.get("name", _core.SHARED["name"])))
    try:
        return _core.complete(given)
    except (ValueError, TypeError) as error:
        raise UsageError(f"sampler settings: {error}") from error


def generate(
    settings: Mapping[str, Any], run: Run | Mapping[str, Run], latents: np.ndarray, labels: np.ndarray | None = None
) -> np.ndarray:
    """`_core.generate`, with settings checked: images (N, C, H, W) float32 from latents N(0, 1)."""
    return _core.generate(complete(settings), run, latents, labels)


def calls(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(NFE: runs of the network for one image, how many of them are of the partial graph)."""
    return _core.calls(complete(settings))


def cached(settings: Mapping[str, Any]) -> bool:
    """Whether some runs of the network are partial ones, which take the deep features of a step before."""
    return calls(settings)[1] > 0


def nfe(settings: Mapping[str, Any]) -> int:
    """Runs of the network for one image; guidance counts twice where it is applied."""
    return calls(settings)[0]


def sources(settings: Mapping[str, Any]) -> dict[str, Path]:
    """The files that make images without edgegen: name below `samplers/` in a bundle -> file."""
    folder = Path(_core.__file__).parent
    return {name: folder / name for name in ("_core.py", f"{complete(settings)['name']}.py")}


def inputs(settings: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What a denoiser takes beside the sample, float32 (1,), and in which range: the time, the label of classes."""
    found = {"timestep": (0.0, float(settings["train_steps"] - 1))}
    return {**found, "label": (0.0, float(settings["labels"] - 1))} if settings["labels"] else found


def feeds(settings: Mapping[str, Any], samples: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs for some samples (N, C, H, W), at times spread over the levels: for timing, parity and golden outputs."""
    visited = levels(settings)[:-1]
    places = (np.arange(len(samples)) + 0.5) / len(samples) * len(visited)
    given = {"sample": samples.astype(np.float32)}
    given["timestep"] = np.array([visited[int(place)].t for place in places], np.float32)
    if settings["labels"]:
        given["label"] = (np.arange(len(samples)) % settings["labels"]).astype(np.float32)
    return given


def trajectory(
    settings: Mapping[str, Any], run: Run | Mapping[str, Run], latents: np.ndarray, count: int, *, naive: bool = False
) -> dict[str, np.ndarray]:
    """Inputs of a denoiser as they come up while it makes images: `count` of them, input name -> (count, ...).

    Even over the whole run and over the latents, as activations differ from time to time (Shang et al., 2023, PTQ4DM,
    arXiv:2211.15736). naive: the first call alone, which is pure noise at one time; to compare with. With cached blocks
    (run: "full" and "partial") they are the inputs of the partial network, the cache among them.
    """
    seen: list[dict[str, np.ndarray]] = []

    parts = dict(run) if isinstance(run, Mapping) else {"full": run}
    last = "partial" if "partial" in parts else "full"
    plain = parts[last]

    def watched(given: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        seen.append({name: value.copy() for name, value in given.items()})
        return plain(given)

    if naive and last == "full":
        given = feeds(settings, latents[np.arange(count) % len(latents)])
        return {**given, "timestep": np.full(count, levels(settings)[0].t, np.float32)}
    generate(settings, {**parts, last: watched}, latents)
    seen = seen[:1] if naive else seen
    picked = [(i * len(seen) // count, i % len(latents)) for i in range(count)]
    return {name: np.stack([seen[call][name][place] for call, place in picked]) for name in seen[0]}
