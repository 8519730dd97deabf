"""The bench: build every candidate in its runtime, time all of them together, score them.

A speed-up is always a ratio from one interleaved run against a named baseline. A build or a run that fails is a
candidate with a reason, not the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import estimate, files, measuring, on_device, quality, registry, rewriting, samplers, serial
from edgegen.candidates import Candidate, per_image
from edgegen.devices import local
from edgegen.errors import ModelError, RuntimeFailed, UsageError
from edgegen.runlog import RunLog
from edgegen.types import Artifact, Graph, Inspection, Measurement, PrecisionPlan, Target

PARTIAL = "/partial"  # behind a candidate's key: the latency of its partial graph
Progress = Callable[[str, str, float], None]


@dataclass
class Bench:
    """Where candidates are built, timed and scored; everything it finds is in the run's log."""

    target: Target
    folder: Path
    log: RunLog
    limits: measuring.Limits
    progress: Progress
    seed: int = 0
    device: str = ""
    feeds: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def here(self) -> bool:
        """Whether the target is this host."""
        return self.target.is_host

    @property
    def measures(self) -> bool:
        """Whether latency is measured: the target is this host, or a device stands for it."""
        return self.here or bool(self.device)

    def absent(self) -> dict[str, str]:
        """Runtime of the target -> why it can do nothing on this machine."""
        modules = {name: registry.module("runtimes", name) for name in self.target.runtimes}
        return {name: why for name, module in modules.items() if (why := _unusable(module, self.here))}

    def plans(self, quantized: bool) -> list[tuple[str, PrecisionPlan]]:
        """(runtime, plan) pairs that the target's runtimes offer, of one kind.

        Raises:
            UsageError: the target is this host and none of its runtimes is installed; says how to install them.
        """
        flags, absent = local.cpu_flags(), self.absent()
        present = [name for name in dict.fromkeys(self.target.runtimes) if name not in absent]
        if not present:
            raise UsageError(f"no runtime of {self.target.name} is here: {'; '.join(absent.values())}")
        return [
            (name, plan)
            for name in present
            for plan in registry.module("runtimes", name).plans(self.target, flags)
            if plan.quantized == quantized
        ]

    def build(self, of: str, graph: Graph, runtime: str, plan: PrecisionPlan, calibration: Path | None) -> Candidate:
        """Build one candidate in a worker process; a failure becomes its verdict."""
        graph = dataclasses.replace(graph, plan=plan)
        candidate = Candidate(of=of, runtime=runtime, graph=graph)
        between = [graph.partial.sha256] if graph.partial is not None else []
        key = files.key("build", graph.sha256, runtime, dataclasses.asdict(plan), str(calibration), *between)
        out = self.folder / "builds" / key
        self.progress("build", f"{runtime} {plan.label}", 0.0)

        def work() -> dict[str, Any]:
            began = time.monotonic()
            try:
                artifact = self._build(graph, out, runtime, calibration)
                seconds = time.monotonic() - began
                inspection = self._inspected(artifact)
            except (RuntimeFailed, ModelError) as error:  # ModelError: a weight that this precision cannot hold
                return {"failure": str(error)}
            return {"artifact": serial.to_json(artifact), "inspection": serial.to_json(inspection), "seconds": seconds}

        found = self.log.once(key, work)
        if "failure" in found:
            return candidate.judged("failed", found["failure"])
        artifact = serial.from_json(Artifact, found["artifact"])
        if not all(file.exists() for part in artifact.parts for file in part.files):
            self._build(graph, out, runtime, calibration)
        inspection = serial.from_json(Inspection, found["inspection"])
        return dataclasses.replace(candidate, artifact=artifact, inspection=inspection, build_s=found["seconds"])

    def _build(self, graph: Graph, out: Path, runtime: str, calibration: Path | None) -> Artifact:
        """Build a graph, and its partial one with the same plan on inputs of its own."""
        artifact = self._build_one(graph, out, runtime, calibration, self.feeds)
        if graph.partial is None:
            return artifact
        partial = dataclasses.replace(graph.partial, plan=_plan_for(graph.partial, graph.plan))
        inputs, between = partial.samples if calibration is not None else None, out.with_name(f"{out.name}-partial")
        made = self._build_one(partial, between, runtime, inputs, partial_feeds(partial))
        return dataclasses.replace(artifact, partial=made, size_bytes=artifact.size_bytes + made.size_bytes)

    def _inspected(self, artifact: Artifact) -> Inspection:
        """What the files contain; of two the lower shares, and the partial one's layers below `partial/`."""
        found = []
        for part in artifact.parts:
            with measuring.Worker(part, self.limits) as worker:
                found.append(worker.inspect())
        if len(found) == 1:
            return found[0]
        layers = {**found[0].layers, **{f"partial/{name}": kind for name, kind in found[1].layers.items()}}
        return Inspection(
            layers, min(one.int8_weight_share for one in found), min(one.int8_macs_share for one in found)
        )

    def _build_one(
        self, graph: Graph, out: Path, runtime: str, calibration: Path | None, feeds: Mapping[str, np.ndarray]
    ) -> Artifact:
        """Build in a worker; a graph that the runtime refuses is rewritten, exactly, as far as there are cures."""

        def build(made: Graph) -> Artifact:
            return measuring.build_isolated(
                made, out, runtime=runtime, calibration=calibration, target=self.target, limits=self.limits
            )

        file = self.folder / "graphs" / f"{out.name}.onnx"
        artifact, names = rewriting.built(build, graph, runtime, self.target, feeds=feeds, out=file)
        told = {"rewritten": list(names)} if names else {}
        return dataclasses.replace(artifact, options={**artifact.options, **told})

    def time(self, candidates: list[Candidate], baseline: Candidate | None, rounds: int) -> list[Candidate]:
        """Time all candidates that were built in one interleaved run; the ratio is to `baseline`, or the fastest.

        On a target that is not here, the latency is an estimate and so is the ratio.
        """
        built = [c for c in candidates if c.artifact is not None]
        if not built:
            return candidates
        key = files.key("time", [c.key for c in built], baseline and baseline.key, rounds)
        found = self.log.once(key, lambda: self._measure(built, rounds))
        taken = {key: serial.from_json(Measurement, value) for key, value in found.items()}
        times = {c.key: per_image(taken[c.key], c.graph.sampler, taken.get(c.key + PARTIAL)) for c in built}
        reference = times[baseline.key] if baseline is not None else self._least(built, times)
        return [self._timed(c, times.get(c.key), reference) for c in candidates]

    def _timed(self, candidate: Candidate, latency: Measurement | None, reference: Measurement) -> Candidate:
        if latency is None:
            return candidate
        if latency.status == "not measured" and self.measures:
            return candidate.judged("failed", latency.reason)
        if "not measured" in (latency.status, reference.status):  # a target that is not here and states too little
            ratio = Measurement("latency ratio", "", math.nan, status="not measured", reason=latency.reason)
        elif latency.status == "measured":
            ratio = measuring.ratio(latency, reference)
        else:
            ratio = Measurement("latency ratio", "", latency.value / reference.value, status="estimated")
        return dataclasses.replace(candidate, latency=latency, ratio=ratio)

    def _measure(self, built: list[Candidate], rounds: int) -> dict[str, Any]:
        if self.device:
            return self._measure_there(built, rounds)
        if not self.here:
            return {
                key: serial.to_json(
                    estimate.estimate_latency(graph, self.target, c.graph.plan.precision, runtime=c.runtime)
                )
                for c in built
                for key, graph in ((c.key, c.graph), (c.key + PARTIAL, c.graph.partial))
                if graph is not None
            }
        self.progress("time", f"{len(built)} builds, interleaved", 0.0)
        parts = _parts(built)
        feeds = [self.feeds if graph is None else partial_feeds(graph) for _, _, graph in parts]
        times = measuring.time_interleaved(
            [artifact for _, artifact, _ in parts], feeds, rounds=rounds, seed=self.seed, limits=self.limits
        )
        self.progress("time", f"{len(built)} builds, interleaved", 1.0)
        return {key: serial.to_json(latency) for (key, _, _), latency in zip(parts, times, strict=True)}

    def _measure_there(self, built: list[Candidate], rounds: int) -> dict[str, Any]:
        """On the device, in turns. When it cannot be reached the run stops: finished work is kept, --resume goes on."""
        settings = on_device.Settings(rounds=rounds, seed=self.seed, cold=1)
        parts = _parts(built)
        times = on_device.time_artifacts(
            [artifact for _, artifact, _ in parts], self.target.name, self.device, settings=settings,
            progress=lambda text, share: self.progress("device", f"{self.device}: {text}", share),
        )  # fmt: skip
        return {key: serial.to_json(latency) for (key, _, _), latency in zip(parts, times, strict=True)}

    def _least(self, built: list[Candidate], times: dict[str, Measurement]) -> Measurement:
        """The latency of the fastest unquantized build; of the first one where no latency can be had."""
        floats = [times[c.key] for c in built if not c.quantized]
        alive = [latency for latency in floats if latency.status != "not measured"]
        if not alive and (self.measures or not floats):
            reasons = "; ".join(f"{c.label}: {times[c.key].reason}" for c in built)
            raise RuntimeFailed(f"no unquantized build runs on {self.target.name}: {reasons}")
        return min(alive, key=lambda latency: latency.value) if alive else floats[0]

    def outputs(self, candidate: Candidate, dataset: Any, out: Path) -> Path:
        """The candidate's outputs on a dataset, in the .npy file `out`, whole or not at all."""
        spec_in, spec_out = candidate.graph.inputs[0].name, candidate.graph.outputs[0].name
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(files.whole(out))
            run = measuring.runs(_artifact(candidate), stack, self.limits)

            def run_many(inputs: np.ndarray) -> np.ndarray:
                if candidate.graph.sampler is not None:
                    return samplers.generate(candidate.graph.sampler, run, inputs)
                return run({spec_in: inputs})[spec_out]

            quality.collect(run_many, dataset, temporary, lambda text, share: self.progress("score", text, share))
        return out

    def score(self, candidate: Candidate, evaluation: quality.Evaluation, gate: quality.Gate, where: str) -> Candidate:
        """The candidate with its figures and its drop on `evaluation`; a crash becomes its verdict.

        where: "test", which reports all figures, or "select", where the deciding one is enough.
        """
        only = gate.figure if where == "select" else ""
        teacher = self.teacher_figures(evaluation, where, only)
        key = files.key("score", candidate.key, where)

        def work() -> Any:
            try:
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    outputs = self.outputs(candidate, evaluation.data, Path(scratch) / "outputs.npy")
                    return [serial.to_json(m) for m in evaluation.figures(outputs, only, candidate.graph.sampler)]
            except RuntimeFailed as error:
                return {"failure": str(error)}

        found = self.log.once(key, work)
        if isinstance(found, dict):
            return candidate.judged("failed", found["failure"])
        figures = tuple(serial.from_json(Measurement, value) for value in found)
        lost = quality.drop(evaluation.model, gate, teacher, figures)
        return dataclasses.replace(candidate, figures=figures, drop=lost)

    def teacher_figures(self, evaluation: quality.Evaluation, where: str, only: str = "") -> tuple[Measurement, ...]:
        """The figures of the teacher itself (its FP32 build) on the same data."""

        def work() -> list[Any]:
            loop = samplers.of(evaluation.model.options)
            return [serial.to_json(m) for m in evaluation.figures(evaluation.teacher, only, loop)]

        return tuple(serial.from_json(Measurement, value) for value in self.log.once(files.key("teacher", where), work))


def _unusable(module: Any, here: bool) -> str | None:
    """Why a runtime can build nothing on this machine; where the target is this host, also why nothing runs."""
    cannot_build = getattr(module, "cannot_build", module.missing)
    return cannot_build() or (module.missing() if here else None)


def partial_feeds(graph: Graph) -> dict[str, np.ndarray]:
    """One real input of a partial graph, the cache among it."""
    if graph.samples is None:
        raise RuntimeFailed(f"{graph.stage}: there are no inputs to run it on")
    return {
        spec.name: np.load(graph.samples / f"{spec.name}.npy", allow_pickle=False)[: int(spec.shape[0])]
        for spec in graph.inputs
    }


def _plan_for(graph: Graph, plan: PrecisionPlan) -> PrecisionPlan:
    """The plan without the layers that a partial graph does not have."""
    if not plan.float_layers and not plan.scales and not plan.eight_bits:
        return plan
    names = {node.name for node in onnx.load(graph.onnx, load_external_data=False).graph.node}
    names |= {spec.name for spec in graph.inputs}
    layers, wide = (tuple(name for name in kept if name in names) for kept in (plan.float_layers, plan.eight_bits))
    scales = tuple(s for s in plan.scales if s[0] in names)
    return dataclasses.replace(plan, float_layers=layers, eight_bits=wide, scales=scales)


def _parts(built: list[Candidate]) -> list[tuple[str, Artifact, Graph | None]]:
    """(key of its latency, artifact, its graph if that is a partial one) of everything that is to be timed."""
    parts: list[tuple[str, Artifact, Graph | None]] = []
    for candidate in built:
        artifact = _artifact(candidate)
        parts.append((candidate.key, artifact, None))
        if artifact.partial is not None:
            parts.append((candidate.key + PARTIAL, artifact.partial, candidate.graph.partial))
    return parts


def _artifact(candidate: Candidate) -> Artifact:
    if candidate.artifact is None:
        raise RuntimeFailed(f"{candidate.label} was not built: {candidate.reason}")
    return candidate.artifact
