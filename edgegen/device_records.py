"""What a device measured, as a record of raw samples that others can read, check and contribute (targets/results/).

A file is {"schema": 1, "records": [Record]}. A record holds no host name, user name, address or path. Times are ms.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen import errors, files, latency
from edgegen.types import Measurement

SCHEMA = 1
SLOWER = 1.10  # later rounds may take this many times the first ones
_TOLD = ("mhz", "celsius", "governor", "nvpmodel", "watts")
CLOCK_FELL = 0.95  # share of its clock that a device may lose in the run

_Ms = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Provenance(_Strict):
    """Who measured, with what. by: a name or address that the contributor chose to give."""

    edgegen: str
    made: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    tool: str
    tool_sha256: str = ""
    bundle_sha256: _Hash
    by: str = ""


class Network(_Strict):
    """The network that the bundle holds; `weights_sha256` and `graph_sha256` say exactly which."""

    name: str
    task: str
    weights_sha256: str
    graph_sha256: str
    macs: int
    params: int


class Built(_Strict):
    """The artifact that ran; `sha256` is a key over the names and hashes of its files."""

    runtime: str
    precision: str
    sha256: _Hash
    size_bytes: int
    inputs: list[dict[str, Any]]
    options: dict[str, Any]
    versions: dict[str, str]


class Cold(_Strict):
    """One load and first run in a fresh process; importing the Python packages is apart."""

    import_ms: _Ms
    load_ms: _Ms
    first_ms: _Ms
    page_cache: str


class Round(_Strict):
    """Samples with copies of inputs and outputs (ms), and without (bare_ms; empty where there is no such thing)."""

    session: int
    ms: list[_Ms]
    bare_ms: list[_Ms] = []
    state: dict[str, Any] = {}


class Warm(_Strict):
    """Runs from the first one until they were no longer getting faster."""

    session: int
    ms: list[_Ms]
    runs: int
    settled: bool


class Golden(_Strict):
    """Largest absolute difference to the bundle's golden outputs."""

    checked: bool
    samples: int = 0
    worst: float | str = 0.0
    tolerance: float = 0.0
    ok: bool = False
    reason: str = ""


class Record(_Strict):
    """One artifact on one device. `summary` holds the figures of a vendor's tool that gives no single samples."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    status: Literal["measured", "not measured"]
    reason: str = ""
    provenance: Provenance
    network: Network
    target: str
    artifact: Built
    device: dict[str, Any]
    runtime_version: str = ""
    obtained: dict[str, Any] = {}
    settings: dict[str, Any]
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    golden: Golden = Golden(checked=False, reason="not run")
    cold: list[Cold] = []
    warm: list[Warm] = []
    rounds: list[Round] = []
    summary: dict[str, Any] = {}
    peak_bytes: int = 0
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


def to_json(record: Record) -> dict[str, Any]:
    """The record as JSON values."""
    return record.model_dump(by_alias=True, mode="json")


def findings(record: Record) -> list[str]:
    """Why the figures should not be trusted as those of a steady device; empty when nothing speaks against them."""
    found = []
    medians = [statistics.median(one.ms) for one in record.rounds if one.ms]
    if len(medians) >= 6:
        third = len(medians) // 3
        change = statistics.median(medians[-third:]) / statistics.median(medians[:third])
        drift = _drift(record)
        if change > SLOWER:
            found.append(f"later rounds are {change - 1:.0%} slower than the first{': ' if drift else ''}{drift}")
        elif drift.startswith("the clock"):
            found.append(drift)
        low, high = sorted(medians)[len(medians) // 10], sorted(medians)[-1 - len(medians) // 10]
        apart = (high - low) / statistics.median(medians)
        if apart > latency.STEADY_SPREAD and change <= SLOWER:
            found.append(f"rounds lie {apart:.0%} apart")
    if any(not warm.settled for warm in record.warm):
        found.append("warm-up did not settle")
    flags = str(record.after.get("throttled", "")).rpartition("=")[2]
    if flags not in ("", "0x0"):
        found.append(f"the device reports under-voltage or throttling ({flags})")
    return found


def _drift(record: Record) -> str:
    """What clocks and temperatures did between the first and the last third of the rounds."""
    third = max(1, len(record.rounds) // 3)
    words = []
    for kind, unit in (("mhz", "MHz"), ("celsius", "degrees")):
        before, after = (_mean(rounds, kind) for rounds in (record.rounds[:third], record.rounds[-third:]))
        if not before or not after:
            continue
        if kind == "mhz" and after < CLOCK_FELL * before:
            words.append(f"the clock fell from {before:.0f} to {after:.0f} {unit}")
        if kind == "celsius" and after > before + 5:
            words.append(f"it warmed from {before:.0f} to {after:.0f} {unit}")
    return ", ".join(words)


def _mean(rounds: Sequence[Round], kind: str) -> float:
    """Mean over rounds of the highest clock or temperature."""
    highest = [
        max(value for name, value in one.state[kind].items() if not name.endswith(" max"))
        for one in rounds
        if any(not name.endswith(" max") for name in one.state.get(kind, {}))
    ]
    return statistics.mean(highest) if highest else 0.0


def measurements(record: Record) -> list[Measurement]:
    """latency, latency without copies, cold load and first run, each in ms with its conditions."""
    conditions = _conditions(record)
    if record.status != "measured":
        return [latency.not_measured("latency", "ms", record.reason, conditions)]
    made = []
    for name, kind, field, io in (
        ("latency", "whole", "ms", "copies of inputs and outputs included"),
        ("latency without copies", "bare", "bare_ms", "copies of inputs and outputs not included"),
    ):
        rounds = [samples for one in record.rounds if (samples := getattr(one, field))]
        if rounds or record.summary.get(kind):
            made.append(_latency(name, rounds, record.summary.get(kind, {}), {**conditions, "io": io}))
    for name, key in (("cold load", "load"), ("first run", "first")):
        samples = tuple(getattr(cold, f"{key}_ms") for cold in record.cold)
        if samples or key in record.summary:
            value = statistics.median(samples) if samples else float(record.summary[key])
            more = {"page_cache": record.cold[0].page_cache} if record.cold else {}
            told = {**conditions, **more, "n": len(samples) or 1}
            made.append(Measurement(name, "ms", value, None, samples, conditions=told))
    return made


def _latency(name: str, rounds: list[list[float]], summary: dict[str, Any], conditions: dict[str, Any]) -> Measurement:
    if rounds:
        made = latency.summarise(rounds, conditions)
        return Measurement(name, made.unit, made.value, made.interval, made.samples, conditions=made.conditions)
    figure = "median" if "median" in summary else "mean"
    known = {"statistic": figure, "n": int(summary.get("n", 0)), "min": summary.get("min"), "max": summary.get("max")}
    return Measurement(name, "ms", float(summary[figure]), conditions={**conditions, **known})


def _conditions(record: Record) -> dict[str, Any]:
    facts, troubles = record.device.get("facts", {}), findings(record)
    return {
        "device": facts.get("model") or facts.get("cpu_model") or facts.get("machine", "unknown"),
        "reached_by": record.device.get("kind"),
        "os": facts.get("os"),
        "runtime": record.artifact.runtime,
        "runtime_version": record.runtime_version,
        "precision": record.artifact.precision,
        "threads": record.obtained.get("threads", record.artifact.options.get("threads")),
        "batch": next((s["shape"][0] for s in record.artifact.inputs if s["shape"]), 1),
        "tool": record.provenance.tool,
        "run": record.settings.get("run", ""),
        **({"compute_unit": record.obtained["compute_unit"]} if "compute_unit" in record.obtained else {}),
        **{f"{key}_before": record.before[key] for key in _TOLD if key in record.before},
        "steady": not troubles,
        "findings": troubles,
        "golden": "within tolerance" if record.golden.ok else record.golden.reason,
    }


def submit(records: Sequence[Record], file: Path, *, by: str = "") -> int:
    """Add records to a results file, which is made when it is not there; how many it holds then.

    Raises:
        UsageError: a record that is no figure, the same one twice, or a file that is not one of results.
    """
    for record in records:
        if record.status != "measured":
            raise errors.UsageError(f"{file}: only measured records are submitted, got: {record.reason}")
    held = _read(file) if file.exists() else []
    signed = [r.model_copy(update={"provenance": r.provenance.model_copy(update={"by": by})}) for r in records]
    known = {_key(record) for record in held}
    for record in signed:
        if _key(record) in known:
            raise errors.UsageError(f"{file} holds this measurement of {record.network.name} already")
    content = [to_json(record) for record in (*held, *signed)]
    for number, one in enumerate(content):
        _checked(one, f"{file}: records[{number}]")
    files.write_json(file, {"schema": SCHEMA, "records": content})
    return len(content)


def load_records(folder: Path) -> list[Record]:
    """All records of the results files (.json) in a folder, in the order of file names; none where there is no folder.

    Raises:
        UsageError: a file with errors; names the file, the record and the field.
    """
    return [record for file in sorted(folder.glob("*.json")) for record in _read(file)]


def _read(file: Path) -> list[Record]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UsageError(f"{file}: not readable JSON ({str(error)[:120]})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("records"), list):
        raise errors.UsageError(f'{file}: must be {{"schema": {SCHEMA}, "records": [...]}}; not a results file')
    return [_checked(one, f"{file}: records[{number}]") for number, one in enumerate(content["records"])]


def _checked(one: Any, where: str) -> Record:
    try:
        return Record.model_validate(one)
    except ValidationError as error:
        first = error.errors()[0]
        raise errors.UsageError(f"{where}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _key(record: Record) -> str:
    return files.key(record.model_dump(mode="json", exclude={"provenance"}))
