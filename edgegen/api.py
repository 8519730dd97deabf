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
    from edgegen.exporting import Exported
    from edgegen.request import Request

PathLike = str | Path
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
    source: Bundle | PathLike, targets: Sequence[str], *, out: PathLike = "out", progress: bool | Progress = True
) -> list[Exported]:
    """A bundle for each target from the compressed network of a bundle, or from a model's name: `edgegen export`."""
    import dataclasses

    from edgegen import exporting
    from edgegen.bundle_manifest import MANIFEST
    from edgegen.report import terminal
    from edgegen.request import Request

    path = source.path if isinstance(source, Bundle) else Path(source)
    is_bundle = (path / MANIFEST).is_file()
    request: Request = exporting.request_of(path) if is_bundle else Request(model=str(source))
    command = shlex.join(["edgegen", "export", "--bundle" if is_bundle else "--model", str(path), "--target", *targets])
    shown = nullcontext(progress) if callable(progress) else terminal.progress(quiet=not progress)
    with shown as tell:
        return exporting.export(dataclasses.replace(request, command=command), list(targets), Path(out), tell)


def profile(bundles: Sequence[Bundle | PathLike], *, device: str = "local", rounds: int = 15) -> list[Record]:
    """Measure bundles on a device, in turns: `edgegen profile`. Each record has every sample."""
    from edgegen import on_device

    paths = [one.path if isinstance(one, Bundle) else Path(one) for one in bundles]
    return on_device.profile(paths, device, settings=on_device.Settings(rounds=rounds))


def compare(before: Bundle | PathLike, after: Bundle | PathLike, **options: Any) -> Comparison:
    """What differs between two bundles, and what is worse beyond noise: `edgegen compare`.

    Args:
        options: measure, rounds, noise, quality_drop, as in `comparing.compare`.
    """
    from edgegen import comparing

    paths = [one.path if isinstance(one, Bundle) else Path(one) for one in (before, after)]
    return comparing.compare(*paths, **options)


def load(path: PathLike) -> Bundle:
    """Open a bundle.

    Raises:
        BundleError: not a bundle, or one that is damaged.
    """
    from edgegen import bundle

    return bundle.read(Path(path))


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
