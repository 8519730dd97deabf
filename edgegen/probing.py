"""What each pass could gain at the most on a target, in minutes and before any training.

Every structural pass that states `PROBES` (option sets that span its range) is applied without recovery, the weights
are made random (normalisations too, so that no compiler folds a branch away), the result is built in the fastest float
precision and in the fastest INT8 with ranges from random inputs, and timed beside the original. Quality plays no part:
what does not pay here will not pay after training either. A pass that states `RUNS` changes how often a denoiser runs
and not its shape: there the figure is arithmetic. The others say why they are not tried.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgegen import faults, files, recipe, registry, run, run_graphs, run_jobs, samplers, serial
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

    params, macs: of the shape (0 where it could not be made). failure: why a figure is missing; note: what it is.
    """

    name: str
    options: dict[str, Any]
    params: int = 0
    macs: int = 0
    floats: Measurement | None = None
    int8: Measurement | None = None
    failure: str = ""
    note: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the original's best unquantized build, at the most; 0 when nothing was timed."""
        values = [found.value for found in (self.floats, self.int8) if found is not None and found.value > 0]
        return max((1 / value for value in values), default=0.0)


@dataclass(frozen=True)
class Probed:
    """What `probe` found: the baseline's label and latency, then the original and every shape.

    left: pass -> why it was not tried, where all were asked for.
    """

    baseline: str
    latency: Measurement
    rows: tuple[Probe, ...]
    left: dict[str, str] = field(default_factory=dict)


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
        module = registry.module("passes", name)
        sets = (*getattr(module, "PROBES", ()), *getattr(module, "RUNS", ()))
        if passes and not sets:
            raise RecipeError(f"pass {name} cannot be probed: {why_not(name)}")
        found += [(name, dict(options)) for options in sets]
    return found


def why_not(name: str) -> str:
    """Why a pass without shapes to try is not tried."""
    if name in recipe.PRECISION_PASSES:
        return "precisions are the columns of every row"
    if name in recipe.PREPARING_PASSES:
        return "it only prepares weights for INT8, which every row is timed in"
    if name in recipe.ROUNDS:
        return "it trains and leaves the shape"
    return str(getattr(registry.module("passes", name), "NOT_PROBED", "it states no shapes to try"))


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
    tried = {name for name, _ in wanted}
    left = {name: why_not(name) for name in registry.names("passes") if not passes and name not in tried}
    return dataclasses.replace(found, left=left)


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
    module, row = registry.module("passes", name), Probe(name, options)
    if options in getattr(module, "RUNS", ()):
        return _fewer_runs(opened, row, baseline, quantized)
    function = getattr(module, name)
    try:
        result = function(opened.model, run_jobs.job_of(opened), **options)
        if not result.changed:
            why = next(iter(result.skipped.values()), "no layer applies")
            return dataclasses.replace(row, failure=f"changes nothing here: {why}")
        model = result.model.with_module(_random(result.model.stage.module, opened.request.seed))
        graph = run_graphs.export(opened, model, f"{name} {files.key(options)[:8]}")
    except (EdgegenError, ValueError, RuntimeError) as error:  # a shape that cannot be made is a row
        return dataclasses.replace(row, failure=" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - one shape must not take the others with it
        return dataclasses.replace(row, failure=faults.told(error))
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


def _fewer_runs(opened: Run, row: Probe, baseline: Candidate, quantized: Candidate | None) -> Probe:
    """The gain of so many steps: what the network takes, times its share of the runs."""
    settings, steps = samplers.of(opened.model.options), int(row.options["steps"])
    runs = samplers.nfe(settings) if settings is not None else 1
    if runs <= steps:
        return dataclasses.replace(row, failure=f"changes nothing here: the network runs {runs} times for an image")
    note = f"arithmetic: {steps} of {runs} runs"

    def share(found: Candidate | None) -> Measurement | None:
        if found is None or found.ratio is None:
            return None
        return Measurement("latency ratio", "", found.ratio.value * steps / runs, status="estimated", reason=note)

    return dataclasses.replace(row, floats=share(baseline), int8=share(quantized), note=note)


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
