"""Model folders as diffusers' `save_pretrained` writes them: config.json, the weights, perhaps the noise schedule.

What they state becomes the arguments of a built-in network; what it could not compute in the same way is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgegen import registry
from edgegen.errors import ModelError
from edgegen.records import ModelOptions

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
# name of the schedule there -> here, and the first and last beta that it has here (None: they have no part in it)
SCHEDULES: dict[str, tuple[str, tuple[float, float] | None]] = {
    "linear": ("linear", (1e-4, 0.02)),
    "scaled_linear": ("scaled_linear", (0.00085, 0.012)),
    "squaredcos_cap_v2": ("cosine", None),
}


def opened(name: str, kind: str, folder: Path, options: ModelOptions) -> tuple[Path, ModelOptions, dict[str, Any]]:
    """A model folder for the network `name`: (its weights file, the user's options with its sizes, its own options).

    The last are facts of a denoiser's training, for the record: "prediction", "schedule", "train_steps", "clip".

    Raises:
        ModelError: a network that has no such folder, files that are missing or damaged, or a field that would compute
            something else. MissingExtra: no diffusers.
    """
    code: Any = registry.module("models", name) if kind == "builtin" else None
    if not hasattr(code, "FOLDER"):
        every = registry.names("models")
        known = ", ".join(other for other in every if hasattr(registry.module("models", other), "FOLDER"))
        raise ModelError(f"weights {folder}: is a folder; {name} takes a file. Folders of diffusers are for: {known}")
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise ModelError(f"weights {folder}: has no {' or '.join(WEIGHTS)}; give the folder of one network, whole")
    from edgegen.models import _diffusers

    found = _read(folder / "config.json")
    if found.get("num_class_embeds") and "labels" not in options.config:
        classes = found["num_class_embeds"] - 1
        raise ModelError(f"weights {folder}: num_class_embeds is {classes + 1}; here the last one means no class: if it"
                         f" does there, give --config labels={classes}")  # fmt: skip
    try:
        config = _diffusers.arguments(code.FOLDER, found, options.config)
    except ModelError as error:
        raise ModelError(f"weights {folder}: {error}") from error
    facts = _schedule(folder) if "sampler" in code.RECORD["options"] else {}
    return weights, dataclasses.replace(options, config=config), facts


def with_facts(raw: Mapping[str, Any], facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with the facts of a folder in its options."""
    if not facts:
        return raw
    own = raw["options"]
    sampler = {**own["sampler"], "clip": facts["clip"]}
    return {**raw, "options": {**own, **{k: v for k, v in facts.items() if k != "clip"}, "sampler": sampler}}


def _schedule(folder: Path) -> dict[str, Any]:
    """The facts of scheduler_config.json, which lies in the folder or in the pipeline's `scheduler` beside it."""
    places = [folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ModelError(f"weights {folder}: no scheduler_config.json there or in ../scheduler, and what the network"
                         " predicts is not guessed: put the pipeline's own beside config.json")  # fmt: skip
    found = {"prediction_type": "epsilon", **_read(path)}
    what, how = found["prediction_type"], found.get("beta_schedule")
    if what not in PREDICTIONS or how not in SCHEDULES:
        raise ModelError(f"{path}: prediction_type {what!r} with beta_schedule {how!r}; known are"
                         f" {', '.join(PREDICTIONS)} with {', '.join(SCHEDULES)}")  # fmt: skip
    schedule, betas = SCHEDULES[how]
    ends = (found.get("beta_start", 1e-4), found.get("beta_end", 0.02))
    if betas is not None and ends != betas:
        raise ModelError(f"{path}: beta_start, beta_end are {ends[0]}, {ends[1]}; {how} has {betas[0]}, {betas[1]}")
    if found.get("trained_betas") or found.get("rescale_betas_zero_snr"):
        raise ModelError(f"{path}: trained_betas and rescale_betas_zero_snr are not known here")
    clip = float(found.get("clip_sample_range", 1.0)) if found.get("clip_sample", True) else 0.0
    steps = found.get("num_train_timesteps", 1000)
    return {"prediction": PREDICTIONS[what], "schedule": schedule, "train_steps": steps, "clip": clip}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"weights {path.parent}: has no {path.name}; give the folder of one network, whole") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged or not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, not fields by name")
    return found
