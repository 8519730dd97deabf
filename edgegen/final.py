"""The end of a run: what was chosen, timed once more and long, its memory, its figures and its golden outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgegen import files, judgement, measuring, quality, samplers
from edgegen.candidates import Candidate
from edgegen.errors import RuntimeFailed
from edgegen.run import FINAL_ROUNDS, Run
from edgegen.teacher import Evaluations, teacher_build
from edgegen.types import Artifact, Measurement


@dataclass(frozen=True)
class Curve:
    """Quality of the chosen build by number of calibration samples, the fewest first; reason: what is left out."""

    points: tuple[tuple[int, Measurement], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Final:
    """The end of a run, from one interleaved timing: rows with latency, peak memory and figures on `test`.

    throughput: label -> images a second, several at once; it and `curve` are from `finishing`.
    """

    baseline: Candidate
    chosen: Candidate
    reference: Candidate
    memory: dict[str, int]
    throughput: Mapping[str, Measurement] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)


def final_figures(
    run: Run, baseline: Candidate, chosen: Candidate, floats: list[Candidate], found: Evaluations | None
) -> Final:
    """Time baseline, FP32 reference and the chosen build once more, long and interleaved; figures on `test`."""
    reference = teacher_build(run, floats)
    # Without its verdict, so that a failure shows. The teacher of a target without FP32 builds has no latency there.
    afresh = dataclasses.replace(chosen, verdict="", reason="")
    compared = [c for c in (baseline, reference, afresh) if c.runtime in run.target.runtimes]
    rows = list({c.key: c for c in compared}.values())
    timed = {c.label: c for c in run.bench.time(rows, baseline, FINAL_ROUNDS)}
    timed.setdefault(reference.label, reference)
    key = files.key("memory", [c.key for c in rows])
    memory = run.log.once(key, lambda: {c.label: _peak_memory(run, c) for c in rows})
    if found is not None:
        timed = {k: _scored(run, c, reference, found) for k, c in timed.items()}
    end = timed[chosen.label].judged(chosen.verdict, chosen.reason)
    return Final(timed[baseline.label], end, timed[reference.label], memory)


def _scored(run: Run, candidate: Candidate, reference: Candidate, found: Evaluations) -> Candidate:
    """The candidate with its figures on `test`; those of the FP32 reference are the teacher's, which it gave."""
    if candidate.key != reference.key or candidate.verdict:
        return run.bench.score(candidate, found.test, run.gate, "test")
    teacher = run.bench.teacher_figures(found.test, "test")
    return dataclasses.replace(candidate, figures=teacher, drop=quality.drop(run.model, run.gate, teacher, teacher))


def _peak_memory(run: Run, candidate: Candidate) -> int:
    if candidate.artifact is None or not run.bench.here:
        return 0
    try:
        total, between = 0, candidate.graph.partial
        for part in candidate.artifact.parts:
            with measuring.Worker(part, run.bench.limits) as worker:
                own = total > 0 and between is not None  # the partial one, in the same process as the full one
                given = judgement.partial_feeds(between) if own and between is not None else run.bench.feeds
                worker.time(given, 3, warmup=1)
                total += int(worker.peak_memory_bytes()) - (int(worker.baseline_memory_bytes()) if own else 0)
        return total
    except RuntimeFailed:
        return 0


def golden_of(run: Run, final: Final, count: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """(feeds, expected outputs, tolerance) for `verify`, from the chosen artifact on held-out samples."""
    spec = final.chosen.graph.inputs[0].name
    if run.data.test is None:
        inputs = run.bench.feeds[spec]
    else:
        inputs = np.stack([run.data.test[i].input for i in range(min(count, len(run.data.test)))]).astype(np.float32)
    loop, artifact = final.chosen.graph.sampler, final.chosen.artifact
    more = run.bench.feeds if run.data.test is None else {}  # further inputs are there under --latency-only alone
    given = {**more, spec: inputs} if loop is None else samplers.feeds(loop, inputs)
    if artifact is None:
        raise RuntimeFailed(f"{final.chosen.label} was not built")
    return given, *_answers(run, artifact, given)


def golden_between(
    run: Run, final: Final, count: int = 3
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float] | None:
    """The same for the partial artifact, on inputs along the way from noise to image; None where there is none."""
    artifact, graph = final.chosen.artifact, final.chosen.graph.partial
    if artifact is None or artifact.partial is None or graph is None or graph.samples is None:
        return None
    names = [spec.name for spec in graph.inputs]
    given = {name: np.load(graph.samples / f"{name}.npy", allow_pickle=False)[:count] for name in names}
    return given, *_answers(run, artifact.partial, given)


def _answers(run: Run, artifact: Artifact, given: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Outputs, and how far another machine's may be away."""
    with measuring.Worker(artifact, run.bench.limits) as worker:
        outputs = worker.run_many(given)
    widest = max(float(np.ptp(value)) for value in outputs.values())
    # Another CPU may round differently: INT8 and BF16 steps are about 1/128 of the range.
    share = 1e-3 if artifact.plan.precision in ("fp32", "fp16") else 0.05
    return outputs, share * widest
