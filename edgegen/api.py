"""The Python API: the commands as functions. `import edgegen` gives these names without importing anything heavy."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import ModelError
from edgegen.types import Budget, Bundle

if TYPE_CHECKING:
    from torch import nn

    from edgegen.comparing import Comparison
    from edgegen.device_records import Record
    from edgegen.evaluation_figures import Result
    from edgegen.exporting import Exported
    from edgegen.request import Request

PathLike = str | Path
PATHS = ("weights", "data", "eval_data")  # fields of a request that are paths
Progress = Callable[[str, str, float], None]


def compress(
    model: PathLike | nn.Module,
    *,
    target: str = "cpu",
    data: PathLike | None = None,
    eval_data: PathLike | None = None,
    weights: PathLike | None = None,
    recipe: str = "",
    out: PathLike | None = None,
    max_latency_ms: float | None = None,
    max_size_bytes: int | None = None,
    max_quality_drop: float | str | None = None,
    device: str = "",
    resume: bool = False,
    seed: int = 0,
    progress: bool | Progress = True,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> Bundle:
    """Take a trained network to a smaller, faster, verified bundle for a target: `edgegen compress`.

    Args:
        model: what `--model` takes, or a module in eval mode. A module comes without the code that makes it, so only
            post-training passes apply; give `FILE.py:FACTORY` and `weights` to prune and to train.
        max_quality_drop: in the unit of the task, or with "%", such as "2%".
        progress: True: bars on a terminal, lines elsewhere; False: nothing; or a function (step, text, fraction 0..1).
        model_options: what the model does not state itself: task, input_shape, value_range, mean, std, resize, scale,
            output_range. For a module at least task and input_shape.
        options: further fields of `request.Request`, such as calibration, samples, features, latency_only.
    Returns:
        The bundle; `bundle.report()` is its report.json, and a notebook shows its report.
    Raises:
        UsageError: bad input, before anything is written. BudgetError: nothing meets the limits.
        PassError, RuntimeFailed: a pass failed, or no build of the network runs at all.
    """
    from edgegen import pipeline
    from edgegen.report import terminal
    from edgegen.request import Request, parse_drop

    drop, unit = parse_drop(str(max_quality_drop)) if max_quality_drop is not None else (None, "")
    stated = dict(model_options or {})
    kept = tuple(options.pop("keep", ()))
    named = str(model) if isinstance(model, str | Path) else str(_saved(model, stated))
    request = Request(
        model=named, target=target, weights=_path(weights), data=_path(data), eval_data=_path(eval_data),
        recipe=recipe, kept=kept, budget=Budget(max_latency_ms, max_size_bytes, drop), quality_unit=unit,
        out=_path(out), resume=resume, device=device, seed=seed, model_options=stated, **options,
    )  # fmt: skip
    if callable(progress):
        return pipeline.compress(request, progress)
    with terminal.progress(quiet=not progress) as shown:
        return pipeline.compress(request, shown)


def export(
    source: Bundle | PathLike,
    targets: Sequence[str],
    *,
    out: PathLike = "out",
    progress: bool | Progress = True,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> list[Exported]:
    """A bundle for each target from the compressed network of a bundle, or from a model's name: `edgegen export`.

    Args:
        model_options: of a model's name, as for `compress`, such as {"sampler": {"name": "ddim", "steps": 10}}; a
            bundle states its own.
        options: further fields of `request.Request`, such as weights, data, calibration, latency_only, resume.
    """
    import dataclasses

    from edgegen import exporting
    from edgegen.bundle_manifest import MANIFEST
    from edgegen.report import terminal
    from edgegen.request import Request

    path = _folder(source)
    is_bundle = (path / MANIFEST).is_file()
    request: Request = exporting.request_of(path) if is_bundle else Request(model=str(source))
    stated: dict[str, Any] = {name: _path(v) if name in PATHS else v for name, v in options.items()}
    if model_options:
        stated["model_options"] = dict(model_options)
    command = shlex.join(["edgegen", "export", "--bundle" if is_bundle else "--model", str(path), "--target", *targets])
    shown = nullcontext(progress) if callable(progress) else terminal.progress(quiet=not progress)
    with shown as tell:
        return exporting.export(dataclasses.replace(request, command=command, **stated), list(targets), Path(out), tell)


def evaluate(
    *bundles: Bundle | PathLike,
    data: PathLike | None = None,
    real: PathLike | None = None,
    metrics: Sequence[str] = (),
    n: int = 0,
    features: str = "",
    seed: int = 0,
    shard: str = "",
    progress: bool | Progress = True,
) -> Result:
    """The quality of a bundle on data, or of two on the same inputs with the paired difference: `edgegen evaluate`.

    Args:
        data: inputs with what they need (labels, references); of a generator of latents, real images.
        real: real images to compare sets with, where `data` are inputs.
        metrics: names; empty for the task's own. n: samples; 0 for all, or 2,048 latents. shard: "I/N" for one part.
        features: an extractor, such as cifar, inception or clip:FILE. seed: of latents, choices and intervals.
    Returns:
        `figures` of each bundle, `paired`, `worst` (images in 0..1), `left_out`: why a metric of the task is absent.
    Raises:
        UsageError: no bundle, no data where they are needed, or metrics that do not fit.
    """
    from edgegen import evaluating
    from edgegen.report import terminal

    settings = evaluating.Settings(_path(data), tuple(metrics), n, seed, features, shard, _path(real))
    shown = nullcontext(progress) if callable(progress) else terminal.progress(quiet=not progress)
    with shown as tell:
        return evaluating.evaluate([_folder(one) for one in bundles], settings, tell)


def train(
    model: str,
    *,
    data: PathLike,
    out: PathLike,
    weights: PathLike | None = None,
    progress: bool | Progress = True,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a network on images and write its weights: `edgegen train`.

    Args:
        out: a .safetensors file; the record with the loss curve is written beside it.
        weights: to begin with. model_options: as for `compress`, such as {"config": {"size": 64}}.
        options: further fields of `trainers.Order`: steps, batch, lr, ema, optimizer, precision, seed, threads, resume.
    Returns:
        The record: steps, seconds, curve, and `stopped`: why it ended early, if it did.
    Raises:
        UsageError: an unknown model, data that do not fit it, or a setting out of range.
    """
    from edgegen import trainers
    from edgegen.records import ModelOptions
    from edgegen.report import terminal

    chosen = ModelOptions(**(model_options or {}))
    order = trainers.Order(model, Path(data), Path(out), start=_path(weights), options=chosen, **options)
    shown = nullcontext(progress) if callable(progress) else terminal.progress(quiet=not progress)
    with shown as tell:
        return trainers.train(order, lambda text, share: tell("train", text, share))


def profile(bundles: Sequence[Bundle | PathLike], *, device: str = "local", rounds: int = 15) -> list[Record]:
    """Measure bundles on a device, in turns: `edgegen profile`. Each record has every sample."""
    from edgegen import on_device

    paths = [_folder(one) for one in bundles]
    return on_device.profile(paths, device, settings=on_device.Settings(rounds=rounds))


def compare(before: Bundle | PathLike, after: Bundle | PathLike, **options: Any) -> Comparison:
    """What differs between two bundles, and what is worse beyond noise: `edgegen compare`.

    Args:
        options: measure, rounds, noise, quality_drop, as in `comparing.compare`.
    """
    from edgegen import comparing

    return comparing.compare(_folder(before), _folder(after), **options)


def load(path: PathLike) -> Bundle:
    """Open a bundle.

    Raises:
        BundleError: not a bundle, or one that is damaged.
    """
    from edgegen import bundle

    return bundle.read(Path(path))


def _folder(one: Bundle | PathLike) -> Path:
    return one.path if isinstance(one, Bundle) else Path(one)


def _path(value: PathLike | None) -> Path | None:
    return Path(value) if value is not None else None


def _saved(module: nn.Module, stated: dict[str, Any]) -> Path:
    """The module as a torch export in the cache, under a name that its weights, its code and its input decide.

    Raises:
        ModelError: no module, no input shape, or a module that torch.export cannot follow.
    """
    import torch

    from edgegen import files, weights

    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model must be a name, a path or a torch module, got {type(module).__name__}")
    shape = stated.get("input_shape")
    if not shape:
        raise ModelError("a module needs model_options={'task': ..., 'input_shape': (1, C, H, W), ...}")
    name = type(module).__name__.lower()
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (torch.zeros([int(size) for size in shape]),))
    except Exception as error:  # whatever the user's own forward raises
        raise ModelError(f"{name}: torch.export cannot follow it ({' '.join(str(error).split())[:200]})") from error
    content = files.key(weights.state_hash(module), program.graph_module.code, list(shape))
    file = files.cache_folder() / "modules" / content / f"{name}.pt2"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(file) as temporary:
        torch.export.save(program, temporary.with_suffix(".pt2"))
        temporary.with_suffix(".pt2").replace(temporary)
    return file
