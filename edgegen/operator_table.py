"""Operator tables: timed small networks of a device as one JSON file that can be shared, continued and checked.

A table holds every sample, the machine, the versions, and for each runtime and precision the error on whole networks
that the fit has never seen, once `benchmarks/estimator.py` has measured it. Tables that ship lie in targets/operators/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, files, operator_fit, operators, registry
from edgegen.devices import local
from edgegen.operator_base import Sample
from edgegen.types import Target

SCHEMA = "edgegen operator table 1"
_FIELDS = {"schema": str, "target": str, "device": str, "machine": dict, "threads": int, "created": str,
           "edgegen": str, "versions": dict, "entries": list, "validation": dict}  # fmt: skip
LEAST = 30
"""Networks of a runtime and precision below which a table makes no estimate."""
_ENTRY = ("runtime", "precision", "probe", "kernels", "status")


def new(target: str, device: str, machine: Mapping[str, Any], threads: int, created: str) -> dict[str, Any]:
    """A table without entries."""
    from edgegen import __version__

    return {
        "schema": SCHEMA, "target": target, "device": device, "machine": dict(machine), "threads": threads,
        "created": created, "edgegen": __version__, "versions": {}, "entries": [], "validation": {},
    }  # fmt: skip


def load(file: Path) -> dict[str, Any]:
    """A table, checked.

    Raises:
        UsageError: not a readable table: another schema, a field that is missing or of another type, an entry whose
            kernels or times are none. The message names the file and the field.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UsageError(f"{file}: not readable JSON ({str(error)[:120]})") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        got = table.get("schema") if isinstance(table, dict) else type(table).__name__
        raise errors.UsageError(f"{file}: not an operator table: schema must be {SCHEMA!r}, got {got!r}")
    for name, kind in _FIELDS.items():
        if not isinstance(table.get(name), kind):
            raise errors.UsageError(f"{file}: {name} must be of type {kind.__name__}, got {table.get(name)!r:.60}")
    for number, entry in enumerate(table["entries"]):
        if why := _wrong(entry):
            raise errors.UsageError(f"{file}: entries[{number}]: {why}")
    return table


def _wrong(entry: Any) -> str:
    if not isinstance(entry, dict) or (lost := [name for name in _ENTRY if name not in entry]):
        return f"must hold {', '.join(_ENTRY)}" + (f"; {lost[0]} is missing" if isinstance(entry, dict) else "")
    try:
        for row in entry["kernels"]:
            operators.from_row(row)
    except (ValueError, TypeError) as error:
        return f"kernels: {error}"
    ms = entry.get("ms")
    if entry["status"] == "measured" and not (isinstance(ms, (int, float)) and math.isfinite(ms) and ms > 0):
        return f"ms must be a positive number, got {ms!r}"
    return ""


def save(table: Mapping[str, Any], file: Path) -> None:
    """Write a table, whole or not at all, an entry a line."""
    head = {name: value for name, value in table.items() if name != "entries"}
    text = json.dumps(head, indent=1, sort_keys=True, default=str)[:-2]
    lines = ",\n".join("  " + json.dumps(entry, sort_keys=True, separators=(",", ":")) for entry in table["entries"])
    files.write_text(file, text + f',\n "entries": [\n{lines}\n ]\n}}\n')


def samples(table: Mapping[str, Any], runtime: str, precision: str) -> list[Sample]:
    """The measured networks of one runtime and precision, for a fit."""
    return [
        Sample(
            tuple(operators.from_row(row) for row in entry["kernels"]), float(entry["ms"]), spread(entry),
            not entry["probe"]["layers"],
        )
        for entry in table["entries"]
        if (entry["runtime"], entry["precision"], entry["status"]) == (runtime, precision, "measured")
    ]


def spread(entry: Mapping[str, Any]) -> float:
    """How far the rounds of an entry lie apart: (90th - 10th percentile) / median of the round medians."""
    rounds = entry.get("round_medians")
    if not rounds:
        return 0.0
    low, high = np.percentile(rounds, [10, 90])
    return float((high - low) / entry["ms"])


def mismatch(table: Mapping[str, Any], target: Target, runtime: str, precision: str) -> str:
    """Why a table says nothing about a build on a target; empty when it does."""
    if table["target"] != target.name:
        return f"measured on {table['target']}, not on {target.name}"
    if target.threads and table["threads"] != target.threads:
        return f"measured with {table['threads']} threads, not {target.threads}"
    if target.is_host and (other := table["machine"].get("cpu_model")) != local.cpu_model():
        return f"measured on another machine ({other})"
    if table["machine"].get("busy"):
        return "measured while the machine was busy"
    measured, wanted = table["versions"].get(runtime, ""), target.versions.get(runtime, "")
    if wanted and measured and _short(measured) != _short(wanted):
        return f"measured with {runtime} {measured}, not {wanted}"
    count = len(samples(table, runtime, precision))
    return "" if count >= LEAST else f"holds only {count} networks of {runtime} {precision}"


def _short(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def find(target: Target, runtime: str, precision: str, folder: Path | None = None) -> tuple[Path | None, str]:
    """(the table that speaks for a build on a target or None, why the others do not).

    folder: of tables; None: targets/operators/.
    """
    reasons = []
    for file in sorted((folder or registry.folder("targets") / "operators").glob("*.json")):
        if not (why := mismatch(_cached(file, file.stat().st_mtime_ns), target, runtime, precision)):
            return file, ""
        reasons.append(f"{file.name}: {why}")
    return None, "; ".join(reasons) or "no operator table"


def fitted(file: Path, runtime: str, precision: str) -> operator_fit.Fit:
    """The fit of a table, made once in a process."""
    return _fitted(file, file.stat().st_mtime_ns, runtime, precision)


@lru_cache(maxsize=32)
def _fitted(file: Path, changed: int, runtime: str, precision: str) -> operator_fit.Fit:
    return operator_fit.fit(samples(_cached(file, changed), runtime, precision))


@lru_cache(maxsize=8)
def _cached(file: Path, changed: int) -> dict[str, Any]:
    return load(file)


def validation(file: Path, runtime: str, precision: str) -> dict[str, Any] | None:
    """Error on whole networks that were not seen: `errors_of` with its number of networks; None: not validated."""
    return _cached(file, file.stat().st_mtime_ns)["validation"].get(f"{runtime} {precision}")


def errors_of(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Figures of (estimated, measured) pairs: relative errors |estimated / measured - 1|; shares are 0..1.

    Raises:
        UsageError: no pairs, or a time that is not positive.
    """
    if not pairs or not all(estimated > 0 and measured > 0 for estimated, measured in pairs):
        raise errors.UsageError(f"errors need pairs of positive times, got {len(pairs)} pairs")
    ratio = np.array([estimated / measured for estimated, measured in pairs])
    off = np.abs(ratio - 1.0)
    return {
        "networks": len(pairs), "median": float(np.median(off)), "p90": float(np.percentile(off, 90)),
        "within10": float(np.mean(off <= 0.10)), "within20": float(np.mean(off <= 0.20)),
        "bias": float(np.median(ratio) - 1.0),
    }  # fmt: skip


def pairs_of(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every (runtime, precision) that a table holds, in order of appearance."""
    yield from dict.fromkeys((entry["runtime"], entry["precision"]) for entry in table["entries"])
