"""How a run times a network: every unquantized build of it in turns; and the `Job` by which a pass asks for that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgegen import architecture, files, inputs, operator_times, profiling, run_quality
from edgegen.candidates import Candidate, fastest
from edgegen.errors import RecipeError
from edgegen.run import SCREEN_ROUNDS, Run
from edgegen.run_graphs import calibration_folder, export
from edgegen.types import Graph, Job, Measurement, Stage


def unquantized(run: Run, of: str, graph: Graph, baseline: Candidate | None, only: str = "") -> list[Candidate]:
    """Every unquantized build of a network, timed in one run (together with the baseline, when there is one).

    only: a runtime, for builds in that one alone.
    """
    plans = [pair for pair in run.bench.plans(quantized=False) if only in ("", pair[0])]
    # An FP16 build looks at activations: what FP16 cannot hold stays in FP32 (see fp16_lint).
    samples = calibration_folder(run) if any(plan.precision == "fp16" for _, plan in plans) else None
    built = [
        run.bench.build(of, graph, runtime, plan, samples if plan.precision == "fp16" else None)
        for runtime, plan in plans
    ]
    if baseline is None:
        return run.bench.time(built, None, SCREEN_ROUNDS)
    return run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]


def job_of(run: Run, progress: Callable[[str, float], None] = lambda text, fraction: None) -> Job:
    """What a pass may look at; `latency` takes any stage, of the whole network or of a part with inputs of its own."""

    def latency(stage: Stage) -> Measurement:
        shapes = [list(spec.shape) for spec in stage.inputs]
        name = f"candidate {files.key(architecture.identity(stage.module), shapes)[:12]}"
        own = run if shapes == [list(spec.shape) for spec in run.model.stage.inputs] else _apart(run, stage, name)
        graph = export(own, dataclasses.replace(own.model, stages=(stage,)), name)
        best = fastest(unquantized(own, name, graph, None))
        if best.latency is None:
            raise RecipeError(f"{name} cannot be timed")
        return best.latency

    return Job(
        target=run.target,
        data=run.data.train,
        teacher=run.model,
        budget=run.budget,
        seed=run.request.seed,
        device=run.train_device,
        threads=run.target.threads,
        progress=progress,
        latency=latency,
        quality=run_quality.judge(run),
        operators=(lambda probes: _operators(run, probes, progress)) if run.bench.measures else None,
        measured_on=run.bench.device,
    )


def _apart(run: Run, stage: Stage, name: str) -> Run:
    """The run for a stage with other inputs than the network's: random ones, and a folder of its own."""
    low = {spec.name: spec.value_range or (-1.0, 1.0) for spec in stage.inputs}
    rng = np.random.default_rng(run.request.seed)
    given = {spec.name: rng.uniform(*low[spec.name], [int(d) for d in spec.shape]).astype(np.float32)
             for spec in stage.inputs}  # fmt: skip
    folder = run.folder / "apart" / name.replace(" ", "_")
    bench = dataclasses.replace(run.bench, folder=folder, feeds=given)
    alone = dataclasses.replace(run.model, stages=(stage,), options={})
    nothing = inputs.RunData(None, None, None, None, {})
    return dataclasses.replace(run, model=alone, data=nothing, bench=bench, folder=folder)


def _operators(
    run: Run, probes: Sequence[Mapping[str, Any]], progress: Callable[[str, float], None]
) -> list[Measurement]:
    """Small networks in the runtime and precision of the original's best unquantized build (from the log)."""
    best = fastest(unquantized(run, "original", export(run, run.model, "original"), None))
    pair = (best.runtime, best.graph.plan.precision)
    version = profiling.version_of(best.runtime, best.artifact.versions) if best.artifact else ""
    device = run.bench.device or "local"
    return operator_times.times(probes, run.target, pair, version, device=device, progress=progress)
