"""Further input sizes of one bundle: the chosen network, in the chosen runtime and plan, built for each of them.

What is chosen is decided at the first size alone; at every further one the build is timed beside the baseline's plan,
scored on the same held-out images at that size, and gets golden outputs of its own. A size at which it cannot be built
or run is not in the bundle, and a stamp says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import bundle, bundle_samples, inputs, resizing, run_graphs, runlog, teacher, variants
from edgegen.candidates import Candidate, within
from edgegen.errors import ModelError, RuntimeFailed
from edgegen.final import Final, golden_of
from edgegen.report import schema
from edgegen.run import FINAL_ROUNDS, Run
from edgegen.types import Artifact, Model


@dataclass(frozen=True)
class Resolution:
    """The chosen network at one input size (H, W).

    candidate: its build, None where there is none and `reason` says why. over: which limit it breaks, in words.
    """

    size: resizing.Size
    candidate: Candidate | None = None
    golden: bundle.Golden | None = None
    over: str = ""
    reason: str = ""

    @property
    def artifact(self) -> Artifact | None:
        """What was built and ran."""
        return self.candidate.artifact if self.candidate is not None else None


def further(run: Run, model: Model, final: Final) -> list[Resolution]:
    """Every size that was asked for but the first, which is the run's own.

    Args:
        model: the chosen network; `final.chosen` is its build at the first size.
    """
    found = []
    for number, size in enumerate(run.request.resolutions[1:]):
        run.progress("resolution", resizing.told(size), number / len(run.request.resolutions))
        try:
            found.append(_at(run, model, final, size))
        except (RuntimeFailed, ModelError) as error:
            found.append(Resolution(size, reason=str(error)))
    return found


def _at(run: Run, model: Model, final: Final, size: resizing.Size) -> Resolution:
    own, of = _sized(run, size), final.chosen.of.removesuffix(variants.REWRITTEN)
    original = run_graphs.export(own, own.model, "original")
    own.bench.feeds = run_graphs.feeds(own, original)
    graph = original if of == "original" else run_graphs.export(own, resizing.at(model, size), of)
    if final.chosen.of != of:
        graph, _ = variants.rewritten(own, of, graph)
    baseline = _built(own, final.baseline, original)
    alone = final.chosen.key == final.baseline.key
    chosen = baseline if alone else _built(own, final.chosen, graph)
    timed = own.bench.time([baseline] if alone else [baseline, chosen], baseline, FINAL_ROUNDS)
    chosen = timed[-1]
    evaluations = teacher.evaluations(own, [baseline])
    if evaluations is not None and not chosen.verdict:
        chosen = own.bench.score(chosen, evaluations.test, run.gate, "test")
    if chosen.verdict:
        raise RuntimeFailed(chosen.reason)
    quality_alone = dataclasses.replace(run.budget, max_latency_ms=None, max_size_bytes=None)
    over = "" if alone else within(chosen, quality_alone, run.gate)
    feeds, outputs, tolerance = golden_of(own, dataclasses.replace(final, chosen=chosen))
    return Resolution(size, chosen, bundle.Golden(feeds, outputs, tolerance), over)


def _sized(run: Run, size: resizing.Size) -> Run:
    """The run at another size: the same images at that size, in a folder and with a log of its own.

    Only `test` is scored: nothing is decided here.
    """
    model = resizing.at(run.model, size)
    found = inputs.prepare(run.request, model)
    if found.select is not None:
        found = dataclasses.replace(found, select=found.select.subset(range(1)))
    folder = run.folder / "sizes" / resizing.told(size)
    log = runlog.RunLog(folder / "log.jsonl")
    return dataclasses.replace(
        run, model=model, data=found, folder=folder, bench=dataclasses.replace(run.bench, folder=folder, log=log)
    )


def _built(run: Run, like: Candidate, graph: Any) -> Candidate:
    """A build of `graph` in the runtime and plan of another candidate.

    Raises:
        RuntimeFailed: it cannot be built.
    """
    plan = like.graph.plan
    samples = run_graphs.calibration_folder(run) if plan.quantized or plan.precision == "fp16" else None
    made = run.bench.build(like.of, graph, like.runtime, plan, samples)
    if made.artifact is None:
        raise RuntimeFailed(f"{made.label} was not built: {made.reason}")
    return made


def rows(run: Run, final: Final, found: Sequence[Resolution]) -> list[dict[str, Any]]:
    """For `schema.Resolution`: the first size with the figures of the run, then the further ones; [] without any."""
    if not run.request.resolutions:
        return []
    first = Resolution(run.request.resolutions[0], final.chosen)
    place = 0
    told = []
    for entry in (first, *found):
        candidate = entry.candidate
        ratio = candidate.ratio if candidate is not None and candidate.label != final.baseline.label else None
        told.append({
            "size": entry.size,
            "artifact": place if candidate is not None else None,
            "latency": schema.figure(candidate.latency) if candidate and candidate.latency else None,
            "ratio": schema.figure(ratio) if ratio is not None else None,
            "size_bytes": candidate.artifact.size_bytes if candidate and candidate.artifact else None,
            "quality": [schema.figure(figure) for figure in candidate.figures] if candidate else [],
            "reason": entry.over or entry.reason,
        })  # fmt: skip
        place += candidate is not None
    return told


def stamps(found: Sequence[Resolution]) -> list[str]:
    """What the bundle lacks, or what breaks a limit, at a further size."""
    absent = [f"{resizing.told(r.size)} is not in this bundle: {r.reason}" for r in found if r.candidate is None]
    return absent + [f"at {resizing.told(r.size)}: {r.over}" for r in found if r.over]


def golden(found: Sequence[Resolution]) -> list[bundle.Golden]:
    """The golden cases of the further sizes, each for its own artifact of the bundle."""
    made = [r.golden for r in found if r.artifact is not None and r.golden is not None]
    return [dataclasses.replace(case, artifact=place) for place, case in enumerate(made, 1)]


def graphs(found: Sequence[Resolution], alone: bool) -> dict[str, Path]:
    """Name in the bundle -> ONNX graph of a further size, where the sample runs that (`alone`) and no artifact."""
    made = {r.size: r.candidate for r in found if r.candidate is not None} if alone else {}
    return {bundle_samples.graph_name(size): candidate.graph.onnx for size, candidate in made.items()}
