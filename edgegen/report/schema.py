"""What report.json holds: the only input of report.html and of the terminal's table.

Every model refuses unknown keys, so a misspelt field is an error when the report is written, not a gap in the page.
A number that was not measured is null (never NaN, which is not JSON) beside a status and a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgegen.types import Measurement


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Percentiles(_Part):
    """Of `n` samples, in the unit of their figure."""

    p50: float
    p90: float
    p99: float
    n: int


class Figure(_Part):
    """A `types.Measurement` as JSON. `percentiles` is filled in from `samples`; what the caller states is replaced."""

    name: str
    unit: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    samples: list[float] = []
    direction: Literal["lower", "higher"] = "lower"
    conditions: dict[str, Any] = {}
    status: Literal["measured", "estimated", "not measured"] = "measured"
    reason: str = ""
    percentiles: Percentiles | None = None

    @model_validator(mode="after")
    def _complete(self) -> Figure:
        if self.value is not None and not math.isfinite(self.value):
            self.value = None
        if self.interval is not None and not all(map(math.isfinite, self.interval)):
            self.interval = None
        if self.value is None and self.status != "not measured":
            self.reason = self.reason or f"the {self.status} value is not a finite number"
            self.status = "not measured"
        self.samples = [sample for sample in self.samples if math.isfinite(sample)]
        self.percentiles = percentiles(self.samples)
        return self


class Precision(_Part):
    """Precision read back from the built file. plan: what was asked for; layers: layer -> what it got."""

    plan: str = ""
    int8_weight_share: float | None = None
    int8_macs_share: float | None = None
    layers: dict[str, str] = {}


class Row(_Part):
    """One build of the network: the baseline (best unquantized build on the target) or the result.

    label: such as "openvino bf16". ratio: latency divided by the baseline's, from one interleaved run (below 1 is
    faster); None for the baseline itself. artifacts: file name -> bytes. throughput: samples a second with many at
    once, a figure for each way that was measured (`conditions`: "batch", and "streams" that ran side by side).
    """

    label: str
    latency: Figure
    ratio: Figure | None = None
    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    quality: list[Figure] = []
    precision: Precision = Precision()
    artifacts: dict[str, int] = {}
    throughput: list[Figure] = []


class Step(_Part):
    """A pass and what became of it.

    status: kept; undone (it did not pay, `reason` says why); forced (kept on request, although it did not pay);
    predicted (kept by the estimate, the device is not here); needs recovery (there, but nothing was trained after it
    and no quality was measured that keeps the budget); skipped (not run). changed, skipped: layer -> text.
    figures: name -> number or text, as the pass reported them.
    """

    name: str
    options: dict[str, Any] = {}
    status: Literal["kept", "undone", "forced", "predicted", "needs recovery", "skipped"]
    reason: str = ""
    changed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    figures: dict[str, Any] = {}
    seconds: float | None = None


class Candidate(_Part):
    """One build that was tried. verdict: baseline, chosen, rejected (too slow, or breaks a limit), failed (crashed)."""

    label: str
    latency: Figure | None = None
    ratio: Figure | None = None
    size_bytes: int | None = None
    quality: Figure | None = None
    verdict: Literal["baseline", "chosen", "rejected", "failed"]
    reason: str = ""


class Layer(_Part):
    """One layer of the result; None: not known.

    macs: multiply-accumulates a run. params: weights. bytes: read and written a run, calculated from shapes and the
    precision obtained. ms: median of `n` runs with the runtime's own counters on, which cost time themselves. kernel:
    what ran it, as the runtime tells. promised, obtained: precision that the plan asks for, and read back. sqnr_db:
    signal to quantization noise of its output. recovers: quality that comes back when it alone is left in float.
    """

    name: str
    op: str = ""
    macs: int | None = None
    params: int | None = None
    bytes: int | None = None
    ms: float | None = None
    n: int = 0
    kernel: str = ""
    promised: str = ""
    obtained: str = ""
    sqnr_db: float | None = None
    recovers: float | None = None


class Roof(_Part):
    """What the target states about itself: MACs a second by precision, bytes a second; empty and 0: not stated."""

    peak_macs_per_s: dict[str, float] = {}
    bytes_per_s: float = 0.0


class Dla(_Part):
    """What of the built file the deep learning accelerator of a Jetson takes, by the published rules: a prediction.

    cores: DLA cores of the target. layers: layers of the file, of which `eligible` go there. whole: why the file as it
    is does not go there at all; empty: it may. problems: layer -> operator, and the nearest cure.
    """

    cores: int
    layers: int
    eligible: int
    whole: str = ""
    problems: dict[str, str] = {}


class CalibrationPoint(_Part):
    """Quality of the same build calibrated on `images` samples (of a denoiser: inputs along its way)."""

    images: int
    quality: Figure


class Resolution(_Part):
    """The result at one input size (height, width).

    artifact: position among the bundle's artifacts, None: not in the bundle, and `reason` says why; else `reason` is a
    limit that it breaks there. ratio: latency divided by the baseline's at this size.
    """

    size: tuple[int, int]
    artifact: int | None = None
    latency: Figure | None = None
    ratio: Figure | None = None
    size_bytes: int | None = None
    quality: list[Figure] = []
    reason: str = ""


class Image(_Part):
    """A picture beside report.html: `file` is relative to its folder."""

    file: str
    caption: str = ""


class DataPart(_Part):
    """One part of the data: number of samples, SHA-256 over their content hashes."""

    count: int
    sha256: str = ""


class Spent(_Part):
    """Seconds of the run, bytes of its largest process, bytes on disk while it ran."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


class Cost(_Part):
    """What the run took, and what its plan (`--dry-run`) says. resumed: `used` has the time of its last part alone."""

    predicted: Spent
    used: Spent
    resumed: bool = False


class Report(_Part):
    """A run, from the command to the numbers. See the field types for units; `skipped_files`: file -> why."""

    schema_version: Literal[1] = 1
    headline: str
    model: str
    task: str
    target: str
    command: str
    date: str
    seed: int
    duration_s: float | None = None
    cost: Cost | None = None
    budget: dict[str, Any] = {}
    baseline: Row
    result: Row
    steps: list[Step] = []
    candidates: list[Candidate] = []
    untried: dict[str, str] = Field(default={}, description="runtime of the target -> why nothing was built for it")
    images: list[Image] = []
    layers: list[Layer] = []
    layers_reason: str = Field(default="", description="why the layers have no times")
    roof: Roof = Roof()
    dla: Dla | None = None
    resolutions: list[Resolution] = Field(default=[], description="several fixed input sizes, the first one decided at")
    calibration_curve: list[CalibrationPoint] = []
    calibration_reason: str = Field(default="", description="which points the curve lacks, or why there is none")
    data_source: str = ""
    data: dict[str, DataPart] = {}
    skipped_files: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    reproduce: str = ""
    stamps: list[str] = Field(default=[], description='warnings that belong to every number, "not for accuracy"')


def percentiles(samples: list[float]) -> Percentiles | None:
    """p50, p90 and p99 with linear interpolation between order statistics (numpy's default), None without samples."""
    if not samples:
        return None
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Percentiles(p50=at(0.5), p90=at(0.9), p99=at(0.99), n=len(ordered))


def figure(measurement: Measurement) -> dict[str, Any]:
    """A Measurement as the dict that `Figure` takes; NaN becomes null with its reason."""
    return Figure(
        name=measurement.name,
        unit=measurement.unit,
        value=measurement.value,
        interval=measurement.interval,
        samples=list(measurement.samples),
        direction=measurement.direction,
        conditions=dict(measurement.conditions),
        status=measurement.status,
        reason=measurement.reason,
    ).model_dump()


def normalise(report: Mapping[str, Any] | Report) -> dict[str, Any]:
    """The report as JSON-ready values, complete and checked.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the message names each.
    """
    checked = report if isinstance(report, Report) else Report.model_validate(report)
    return checked.model_dump(mode="json")
