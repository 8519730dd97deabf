"""Times of single operators that a pass asks for while it works, kept in an operator table that can be shared.

The table is that of `edgegen profile-device`: what it holds already is not measured again, and a run that was cut off
goes on where it stopped. Unlike there, a busy machine is no reason to stop: its samples are marked and count as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgegen import files, latency, measuring, operator_table, profiling
from edgegen.devices import local
from edgegen.types import Measurement, Target

Wanted = Sequence[Mapping[str, Any]]
SECONDS = 0.02  # of runs of each network in each round: what is compared differs by tens of percent


def table_file(target: Target, device: str, runtime: str, version: str) -> Path:
    """Where the table of this target, device, runtime and version is kept, in the cache folder."""
    machine = (local.cpu_model(), local.cores()) if device == "local" else ()
    key = files.key(target.name, device, target.threads, machine, runtime, version)
    return files.cache_folder() / "operators" / f"{target.name}-{runtime}-{key[:8]}.json"


def times(
    wanted: Wanted, target: Target, pair: profiling.Pair, version: str, *, device: str = "local",
    minutes: float = 20.0, limits: measuring.Limits = profiling.LIMITS,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> list[Measurement]:  # fmt: skip
    """The latency of each small network (see `probes`) in one runtime and precision, in order.

    Each has `conditions["table"]`, the file; what could not be built, or was not reached in the minutes, is "not
    measured" with its reason.

    Raises:
        UsageError: the pair is not to be had on this machine.
    """
    file = table_file(target, device, pair[0], version)
    different = list({_key(probe): dict(probe) for probe in wanted}.values())
    how = profiling.Settings(minutes, len(different), seconds=SECONDS, warm_seconds=0.05, device=device, limits=limits)
    if profiling.busy(device):  # what was timed on a busy machine is timed again on a quiet one only
        entries = profiling.open_table(file, target, device)["entries"]
        held = {_key(e["probe"]) for e in entries if _of(e, pair) and e["status"] == "measured"}
        different = [probe for probe in different if _key(probe) not in held]
    table = profiling.profile(target, [pair], file, different, how, progress, while_busy=True)
    if not file.is_file():
        operator_table.save(table, file)
    found = {_key(e["probe"]): e for e in table["entries"] if _of(e, pair)}
    told = {"device": device, "runtime": pair[0], "precision": pair[1], "table": str(file)}
    return [_measurement(found.get(_key(probe)), told, minutes) for probe in wanted]


def _of(entry: Mapping[str, Any], pair: profiling.Pair) -> bool:
    return (entry["runtime"], entry["precision"]) == pair


def _key(probe: Mapping[str, Any]) -> str:
    return files.key(probe["input"], probe["layers"])


def _measurement(entry: Mapping[str, Any] | None, told: Mapping[str, Any], minutes: float) -> Measurement:
    if entry is None:
        return latency.not_measured("latency", "ms", f"the {minutes:g} minutes were up before it", told)
    if entry["status"] != "measured":
        return latency.not_measured("latency", "ms", str(entry["reason"]), told)
    made = Measurement("latency", "ms", float(entry["ms"]), tuple(entry["interval"]), tuple(entry["samples"]))
    more = {"n": entry["n"], "deviation": entry["deviation"], "spread": operator_table.spread(entry),
            "busy": entry["busy"]}  # fmt: skip
    return dataclasses.replace(made, conditions={**told, **more})
