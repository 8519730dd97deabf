"""A candidate: one build of one network with its figures, and what compares two: latency of an image, gain, limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgegen import files, measuring, quality, samplers
from edgegen.errors import RuntimeFailed
from edgegen.types import Artifact, Budget, Graph, Inspection, Measurement

# Gains below this are noise on a shared machine, whatever the interval says.
LEAST_GAIN = 1.02


@dataclass(frozen=True)
class Candidate:
    """One build of one network. `of` says which network.

    ratio: latency divided by that of the run's baseline, from one interleaved run (below 1: faster). drop: loss of
    quality in the unit of the gate. verdict: "", "chosen", "not chosen", "undone" or "failed". build_s: seconds that
    the build took.
    """

    of: str
    runtime: str
    graph: Graph
    artifact: Artifact | None = None
    inspection: Inspection | None = None
    latency: Measurement | None = None
    ratio: Measurement | None = None
    figures: tuple[Measurement, ...] = ()
    drop: float | None = None
    verdict: str = ""
    reason: str = ""
    build_s: float = 0.0

    @property
    def label(self) -> str:
        """`network: runtime precision`."""
        return f"{self.of}: {self.runtime} {self.graph.plan.label}"

    @property
    def key(self) -> str:
        """Identity for logs: everything that makes this build; labels are for people and need not tell builds apart."""
        loop = [self.graph.sampler] if self.graph.sampler else []
        return files.key(self.of, self.runtime, self.graph.sha256, dataclasses.asdict(self.graph.plan), *loop)

    @property
    def gain(self) -> float:
        """How many times faster than the baseline; 0 when it was not timed."""
        return 1.0 / self.ratio.value if self.ratio is not None and self.ratio.value > 0 else 0.0

    @property
    def unknown(self) -> str:
        """Why there is neither a measured latency nor an estimate; empty when there is one, or it was not timed."""
        return self.latency.reason if self.latency is not None and self.latency.status == "not measured" else ""

    @property
    def quantized(self) -> bool:
        """Whether this is an INT8 build, or one whose weights are stored in less than 16 bits."""
        return self.graph.plan.quantized

    def judged(self, verdict: str, reason: str) -> Candidate:
        """The same candidate with a verdict; the first verdict stays."""
        return self if self.verdict else dataclasses.replace(self, verdict=verdict, reason=reason)


def fastest(candidates: list[Candidate]) -> Candidate:
    """The unquantized candidate with the least latency.

    Raises:
        RuntimeFailed: none has a latency; the message holds every reason.
    """
    timed = [c for c in candidates if c.latency is not None and not c.quantized]
    if not timed:
        raise RuntimeFailed("no build runs: " + "; ".join(f"{c.label}: {c.reason}" for c in candidates))
    return min(timed, key=lambda c: c.latency.value if c.latency else math.inf)


def is_faster(candidate: Candidate) -> bool:
    """Whether it is faster than the baseline beyond noise: by `LEAST_GAIN`, and the whole interval below 1."""
    ratio = candidate.ratio
    if ratio is None or not candidate.gain >= LEAST_GAIN:
        return False
    return ratio.interval is None or ratio.interval[1] < 1.0


def within(candidate: Candidate, budget: Budget, gate: quality.Gate) -> str:
    """Which limit the candidate breaks, in words with figures; empty when none."""
    latency, artifact = candidate.latency, candidate.artifact
    if budget.max_latency_ms is not None and latency is not None and latency.status == "not measured":
        return f"latency is not known, and --max-latency asks for it: {latency.reason}"
    if budget.max_latency_ms is not None and latency is not None and latency.value > budget.max_latency_ms:
        return f"latency {latency.value:.3g} ms is over --max-latency {budget.max_latency_ms:g} ms"
    if budget.max_size_bytes is not None and artifact is not None and artifact.size_bytes > budget.max_size_bytes:
        return f"size {artifact.size_bytes / 1e6:.3g} MB is over --max-size {budget.max_size_bytes / 1e6:g} MB"
    if budget.max_quality_drop is not None and candidate.drop is not None and candidate.drop > budget.max_quality_drop:
        told = f"drop of {candidate.drop:.3g} is over the budget of {budget.max_quality_drop:g} {gate.unit}"
        return told + quality.undecided(gate, candidate.figures, budget.max_quality_drop)
    return "" if budget.max_quality_drop is None else quality.spoilt(candidate.figures)


def per_image(
    latency: Measurement, sampler: Mapping[str, Any] | None, partial: Measurement | None = None
) -> Measurement:
    """The latency of one image from that of one run of a denoiser; the loop's own arithmetic is left out.

    partial: of a run of the partial network, where blocks are cached.
    """
    if sampler is None:
        return latency
    calls, between = samplers.calls(sampler)
    told = {"nfe": calls, "ms_per_run": latency.value, "sampler": sampler["name"]}
    if partial is not None:
        whole = measuring.together([(calls - between, latency), (between, partial)])
        told |= {"partial_runs": between, "ms_per_partial_run": partial.value, "cache_every": sampler["cache_every"]}
        return dataclasses.replace(whole, conditions={**whole.conditions, **told})
    if "round_medians" in latency.conditions:  # what ratios are made of
        told["round_medians"] = [calls * median for median in latency.conditions["round_medians"]]
    interval = latency.interval and (calls * latency.interval[0], calls * latency.interval[1])
    return dataclasses.replace(
        latency, value=calls * latency.value, interval=interval, conditions={**latency.conditions, **told},
        samples=tuple(calls * sample for sample in latency.samples),
    )  # fmt: skip
