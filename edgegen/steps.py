"""Run the structural passes of a recipe; each finished one is kept in the cache and taken from there next time."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgegen import __version__, architecture, files, loading, registry, serial, weights
from edgegen.errors import EdgegenError, NothingChanged, PassError, RecipeError
from edgegen.recipe import Step
from edgegen.types import Job, Model, PassResult, PrecisionPlan


def run_step(step: Step, model: Model, original: Model, job: Job, data_key: str) -> PassResult:
    """Apply one pass, or take its result from the cache: the key is (input, step, options, data, seed, version).

    Raises:
        RecipeError: an option value that the pass refuses. PassError: the pass failed; says which. ModelError: the
            step's own teacher cannot be loaded.
    """
    if step.teacher:
        job = dataclasses.replace(job, teacher=teacher_of(step, original))
    teacher = architecture.identity(job.teacher.stage.module) if job.teacher is not None else ""
    module = registry.module("passes", step.name)
    timed = getattr(module, "ON_TARGET", False) or step.options.get("by") == "latency"  # by times of this target alone
    where: list[Any] = [job.target.name, dict(job.target.versions), job.measured_on] if timed else []
    if (by := getattr(module, "BY_BUDGET", ())) and not any(step.options.get(option) for option in by):
        where.append(job.budget.max_latency_ms)
    if any(step.options.get(option) for option in getattr(module, "ASKS_QUALITY", ())):
        where.append(getattr(job.quality, "key", ""))
    where += [] if job.device == "cpu" else [job.device]  # sums in another order
    key = files.key(
        architecture.identity(model.stage.module), teacher, step.name, step.options, _files(step.options), data_key,
        job.seed, __version__, _contract(model), dict(job.target.channel_multiple), job.threads,
        dataclasses.asdict(model.plan), *where,
    )  # fmt: skip
    kept = files.cache_folder() / "steps" / key
    if (kept / "result.json").is_file():
        return _restore(kept, model, original)
    job = dataclasses.replace(job, checkpoints=files.cache_folder() / "checkpoints" / key)
    scales = model.plan.scales
    function: Callable[..., PassResult] = getattr(module, step.name)
    try:
        result = function(model, job, **step.options)
    except EdgegenError:
        raise
    except ValueError as error:
        raise RecipeError(f"{step.name}: {error}") from error
    except RuntimeError as error:
        raise PassError(f"{step.name} failed: {error}") from error
    if scales and result.changed and result.model.plan.scales == scales:  # learned for weights that are no more
        plan = dataclasses.replace(result.model.plan, scales=())
        result = dataclasses.replace(result, model=dataclasses.replace(result.model, plan=plan))
    if not result.changed:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(result.skipped.items())[:3])
        warnings.warn(f"{step.name} changed nothing ({reasons or 'no layer applies'})", NothingChanged, stacklevel=2)
    _keep(kept, result, original)
    shutil.rmtree(files.cache_folder() / "checkpoints" / key, ignore_errors=True)
    return result


def teacher_of(step: Step, original: Model) -> Model:
    """The network that a step names as its teacher, which must take and give what the original does.

    A generator whose inner maps are learned from is none of its kind: it is loaded in its own size.

    Raises:
        RecipeError: another task, input, output or preprocessing. ModelError: it cannot be loaded.
    """
    weights_file = Path(step.teacher_weights) if step.teacher_weights else None
    if "generator" in (step.options.get("losses") or ()):
        return loading.load_model(step.teacher, weights=weights_file)
    shape = tuple(int(side) for side in original.stage.inputs[0].shape)
    found = loading.load_model(step.teacher, weights=weights_file, options=loading.ModelOptions(input_shape=shape))
    ours, theirs = _taken(original), _taken(found)
    if wrong := [key for key in ours if ours[key] != theirs[key]]:
        told = "; ".join(f"{key} {theirs[key]}, {original.name} {ours[key]}" for key in wrong)
        raise RecipeError(f"{step.name}: teacher {step.teacher} does not fit: {told}")
    return found


def _taken(model: Model) -> dict[str, Any]:
    """What a network is for, takes and gives, and how an image becomes its input (but for resizing)."""
    kept = ("value_range", "mean", "std", "colour")
    sides = {"inputs": model.stage.inputs, "outputs": model.stage.outputs}
    told = {name: [(tuple(spec.shape), spec.value_range) for spec in specs] for name, specs in sides.items()}
    return {"task": model.task, **told, **{key: getattr(model.preprocessing, key) for key in kept}}


def _files(options: Mapping[str, Any]) -> dict[str, str]:
    """The content of files that options name (`critic.safetensors`, `critic.py:critic`), as SHA-256."""
    named = {key: Path(value.partition(":")[0]) for key, value in options.items() if isinstance(value, str)}
    return {key: files.sha256(path) for key, path in named.items() if path.is_file()}


def _contract(model: Model) -> dict[str, Any]:
    """What decides about a pass beside weights: the code, how images become inputs, and what the outputs mean."""
    code = {name: value for name, value in model.origin.items() if name != "path"}
    stage = model.stage
    specs = [dataclasses.asdict(spec) for spec in (*stage.inputs, *stage.outputs)]
    how = dataclasses.asdict(model.preprocessing)
    return {"code": code, "task": model.task, "options": dict(model.options), "specs": specs, "preprocessing": how}


def _keep(folder: Path, result: PassResult, original: Model) -> None:
    module = result.model.stage.module
    with files.whole(folder) as temporary:
        temporary.mkdir()
        weights.save_state(module, temporary / "weights.safetensors")
        record = {
            "architecture": architecture.describe(module, original.stage.module),
            "changed": dict(result.changed),
            "skipped": dict(result.skipped),
            "notes": dict(result.notes),
            "needs_recovery": result.needs_recovery,
            "plan": serial.to_json(result.model.plan),
            "options": dict(result.model.options),
        }
        (temporary / "result.json").write_text(json.dumps(record), encoding="utf-8")


def _restore(folder: Path, model: Model, original: Model) -> PassResult:
    record: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    module = architecture.rebuild(copy.deepcopy(original.stage.module), record["architecture"])
    file = folder / "weights.safetensors"
    weights.load_into(module, weights.read_state(file), str(file))
    plan = serial.from_json(PrecisionPlan, record["plan"])
    restored = dataclasses.replace(model.with_module(module.eval()), options=record["options"], plan=plan)
    return PassResult(
        restored,
        record["changed"],
        record["skipped"],
        {**record["notes"], "from": "cache"},
        record["needs_recovery"],
    )
