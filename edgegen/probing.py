"""What each pass could gain at the most on a target, in minutes and before any training.

Every structural pass that states `PROBES` (option sets that span its range) is applied without recovery, the weights
are made random (normalisations too, so that no compiler folds a branch away), the result is built in the fastest float
precision and in the fastest INT8 with ranges from random inputs, and timed beside the original. Quality plays no part:
what does not pay here will not pay after training either.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgegen import files, recipe, registry, run, run_graphs, run_jobs, serial
from edgegen import graph as layers
from edgegen.candidates import Candidate, fastest
from edgegen.errors import EdgegenError, RecipeError, RuntimeFailed, UsageError
from edgegen.judgement import Progress
from edgegen.request import Request
from edgegen.run import Run
from edgegen.types import Graph, Measurement, PrecisionPlan

_POST_TRAINING = "post-training"


@dataclass(frozen=True)
class Probe:
    """One shape of the network. floats, int8: latency divided by the original's best unquantized build, or None.

    params, macs: of the shape (0 where it could not be made). failure: why a figure is missing.
    """

    name: str
    options: dict[str, Any]
    params: int = 0
    macs: int = 0
    floats: Measurement | None = None
    int8: Measurement | None = None
    failure: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the original's best unquantized build, at the most; 0 when nothing was timed."""
        values = [found.value for found in (self.floats, self.int8) if found is not None and found.value > 0]
        return max((1 / value for value in values), default=0.0)


@dataclass(frozen=True)
class Probed:
    """What `probe` found: the baseline's label and latency, then the original and every shape."""

    baseline: str
    latency: Measurement
    rows: tuple[Probe, ...]


def shapes(passes: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(pass, options) of every shape that is tried.

    Raises:
        RecipeError: an unknown pass, or one that changes no shape.
    """
    for name in passes:
        registry.check("passes", name)
    found = []
    for name in passes or registry.names("passes"):
        if name in recipe.PRECISION_PASSES:
            continue
        sets = getattr(registry.module("passes", name), "PROBES", ())
        if passes and not sets:
            raise RecipeError(f"pass {name} cannot be probed: it gives no other shape before training")
        found += [(name, dict(options)) for options in sets]
    return found


def probe(request: Request, passes: Sequence[str] = (), progress: Progress = run.quiet) -> Probed:
    """Time every shape of `request.model` on `request.target`.

    Raises:
        UsageError: bad input. RuntimeFailed: no build of the original runs.
    """
    wanted = shapes(passes)
    request = dataclasses.replace(request, latency_only=True, recipe=_POST_TRAINING, data=None, eval_data=None)
    opened = run.open_run(request, progress)
    if opened.model.stage.module is None:
        raise UsageError(f"{request.model} is an ONNX file, which passes cannot reshape; give the torch network")
    try:
        found = _probe(opened, wanted)
    except UsageError:
        shutil.rmtree(opened.folder, ignore_errors=True)
        raise
    shutil.rmtree(opened.folder, ignore_errors=True)
    return found


def _probe(opened: Run, wanted: list[tuple[str, dict[str, Any]]]) -> Probed:
    original = run_graphs.export(opened, opened.model, "original")
    opened.bench.feeds = run_graphs.feeds(opened, original)
    floats = run_jobs.unquantized(opened, "original", original, None)
    baseline = fastest(floats)
    quantized = _quantized(opened, original, baseline)
    int8 = quantized.ratio if quantized is not None else None
    rows = [Probe("original", {}, original.params, original.macs, baseline.ratio, int8)]
    for number, (name, options) in enumerate(wanted):
        opened.progress("probe", f"{name} {options_text(options)}", number / len(wanted))
        work = functools.partial(_row, opened, name, options, baseline, quantized)
        rows.append(serial.from_json(Probe, opened.log.once(files.key("probe", name, options), work)))
    if baseline.latency is None:
        raise RuntimeFailed(f"{baseline.label} was not timed")
    return Probed(baseline.label, baseline.latency, tuple(rows))


def _quantized(opened: Run, graph: Graph, baseline: Candidate) -> Candidate | None:
    """The fastest INT8 build of the original, or None where the target has none that runs."""
    samples = run_graphs.calibration_folder(opened)
    built = [
        opened.bench.build("original", graph, runtime, plan, samples)
        for runtime, plan in opened.bench.plans(quantized=True)
        if plan.precision == "int8" and plan.ranges != "minmax"
    ]
    timed = opened.bench.time([baseline, *built], baseline, run.SCREEN_ROUNDS)[1:]
    return max((c for c in timed if c.gain), key=lambda c: c.gain, default=None)


def _row(
    opened: Run, name: str, options: dict[str, Any], baseline: Candidate, quantized: Candidate | None
) -> dict[str, Any]:
    """`_shape` as JSON, for the log."""
    return serial.to_json(_shape(opened, name, options, baseline, quantized))


def _shape(
    opened: Run, name: str, options: dict[str, Any], baseline: Candidate, quantized: Candidate | None
) -> Probe:
    """One shape, built as the baseline and as the fastest INT8 build of the original are, and timed beside them."""
    function = getattr(registry.module("passes", name), name)
    row = Probe(name, options)
    try:
        result = function(opened.model, run_jobs.job_of(opened), **options)
        if not result.changed:
            why = next(iter(result.skipped.values()), "no layer applies")
            return dataclasses.replace(row, failure=f"changes nothing here: {why}")
        model = result.model.with_module(_random(result.model.stage.module, opened.request.seed))
        graph = run_graphs.export(opened, model, f"{name} {files.key(options)[:8]}")
    except (EdgegenError, ValueError, RuntimeError) as error:  # a shape that cannot be made is a row
        return dataclasses.replace(row, failure=" ".join(str(error).split()))
    row = dataclasses.replace(row, params=graph.params, macs=graph.macs)
    plans: list[tuple[str, PrecisionPlan]] = [(c.runtime, c.graph.plan) for c in (baseline, quantized) if c is not None]
    samples = run_graphs.calibration_folder(opened)
    of = f"{name} {options_text(options)}"
    built = [
        opened.bench.build(of, graph, runtime, plan, samples if plan.precision in ("int8", "fp16") else None)
        for runtime, plan in plans
    ]
    timed = opened.bench.time([baseline, *built], baseline, run.SCREEN_ROUNDS)[1:]
    failure = "; ".join(f"{c.graph.plan.label}: {c.reason}" for c in timed if c.verdict)
    ratios = [c.ratio for c in timed]
    return dataclasses.replace(row, floats=ratios[0], int8=ratios[1] if len(ratios) > 1 else None, failure=failure)


def _random(module: Any, seed: int) -> Any:
    """A copy with random weights, scales of norms in 0.5..1.5 (zeros would be folded away): only its shape is timed."""
    import torch

    copy = layers.clone(module).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if parameter.ndim > 1:
                spread = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            else:
                middle = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5 + middle)
    return copy


def options_text(options: dict[str, Any]) -> str:
    """`ratio=0.5, heads=true`."""
    told = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    return ", ".join(f"{name}={value}" for name, value in told.items())
