"""Measuring an operator table: probes are exported once, built in one worker process a runtime, and timed in turns.

The table is written after every batch, so a run that was cut off, or whose minutes were up, goes on where it stopped.
Exports and builds are kept in the cache folder: they may be made while the machine is busy, timing may not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import errors, files, measuring, on_device, operator_table, operators, probes, profiling_builds, registry
from edgegen.devices import _spec, local
from edgegen.types import Artifact, Graph, Measurement, PrecisionPlan, Target

Progress = Callable[[str, float], None]
Pair = tuple[str, str]
LIMITS = measuring.Limits(seconds=180.0)
SAMPLES = 100
UNSTEADY = 0.3  # spread of rounds; what lies farther apart is measured again by the next call
SPARE = 0.5  # our own threads count in the load average as well


@dataclass(frozen=True)
class Settings:
    """How long and how much. minutes: for all pairs together, builds included. count: probes a pair at most. batch:
    networks that are loaded at the same time. seconds: of runs of each network in each round."""

    minutes: float = 20.0
    count: int = 150
    batch: int = 6
    rounds: int = 5
    seconds: float = 0.05
    warm_seconds: float = 0.15
    seed: int = 0
    device: str = "local"
    limits: measuring.Limits = LIMITS


DEFAULTS = Settings()


def plan_of(runtime: str, precision: str, target: Target) -> PrecisionPlan:
    """The first plan of that precision that a runtime offers on a target.

    Raises:
        UsageError: the runtime cannot run here, or offers no such plan.
    """
    module = registry.module("runtimes", runtime)
    if why := module.missing():
        raise errors.UsageError(f"{runtime} cannot run here: {why}")
    offered = module.plans(target, local.cpu_flags())
    found = next((plan for plan in offered if plan.precision == precision and not plan.weights), None)
    if found is None:
        known = ", ".join(dict.fromkeys(plan.precision for plan in offered)) or "nothing"
        raise errors.UsageError(f"{runtime} offers no {precision} on {target.name}; it offers: {known}")
    return found


def busy(device: str = "local") -> str:
    """Why this is no time to measure on this host, or an empty string."""
    if device != "local":
        return ""
    load, cores = os.getloadavg()[0], local.cores()
    return f"the load average is {load:.1f} on {cores} cores" if load > cores else ""


def time_them(artifacts: Sequence[Artifact], feeds: Sequence[Any], target: Target, how: Settings) -> list[Measurement]:
    """Latency of artifacts in turns, here or on the device."""
    if how.device != "local":
        settings = on_device.Settings(how.rounds, None, how.seconds, how.warm_seconds, cold=1, seed=how.seed)
        return on_device.time_artifacts(artifacts, target.name, how.device, settings=settings)
    with contextlib.ExitStack() as stack:
        return measuring.time_interleaved(
            _opened(artifacts, how.limits, stack), feeds, rounds=how.rounds, seconds=how.seconds,
            warm_seconds=how.warm_seconds, seed=how.seed, limits=how.limits,
        )  # fmt: skip


def _opened(
    artifacts: Sequence[Artifact], limits: measuring.Limits, stack: contextlib.ExitStack
) -> list[Artifact | measuring.Worker]:
    """Workers, started side by side, as imports take longer than timing; what does not start stays an artifact."""

    def start(artifact: Artifact) -> Artifact | measuring.Worker:
        try:
            return measuring.Worker(artifact, limits).__enter__()
        except errors.RuntimeFailed:
            return artifact

    pool = stack.enter_context(ThreadPoolExecutor(local.cores()))  # its threads live as long as the workers must
    items = list(pool.map(start, artifacts))
    for item in items:
        if isinstance(item, measuring.Worker):
            stack.callback(item.__exit__)
    return items


def open_table(file: Path, target: Target, device: str = "local") -> dict[str, Any]:
    """The table in `file`, to go on with, or a new one.

    Raises:
        UsageError: the file is no table, or one of another target, machine or number of threads.
    """
    with _spec.open_device(device) as connected:
        machine = local.probe() if device == "local" else connected.probe()
    threads = target.threads or min(2, int(machine.get("cores", 2)))
    fresh = operator_table.new(target.name, device, machine, threads, time.strftime("%Y-%m-%d"))
    if not file.is_file():
        return fresh
    table = operator_table.load(file)
    for name, held, now in (
        *((name, table[name], fresh[name]) for name in ("target", "device", "threads")),
        *((name, table["machine"].get(name), machine.get(name)) for name in ("cpu_model", "cores")),
    ):
        if held != now:
            raise errors.UsageError(f"{file}: holds a table with {name} {held!r}, this is {now!r}; give another --out")
    return table


def profile(
    target: Target, pairs: Sequence[Pair], file: Path, wanted: Sequence[probes.Probe], how: Settings,
    progress: Progress, *, build_only: bool = False, while_busy: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure probes of every (runtime, precision) pair into the table in `file`; the table.

    Every pair gets an equal share of what is left of the minutes.

    Args:
        build_only: export and build, time nothing.
        while_busy: measure although the machine is; such samples are marked, and replaced by a later quiet run.
    Raises:
        UsageError: a pair that is not to be had here, another machine's table, or a machine that is busy.
    """
    plans = {pair: plan_of(*pair, target) for pair in pairs}
    table = open_table(file, target, how.device)
    if not build_only and not while_busy and (why := busy(how.device)):
        raise errors.UsageError(f"this is no time to measure: {why}; wait, or --while-busy for a trial that counts not")
    end = time.monotonic() + 60 * how.minutes
    for number, (pair, plan) in enumerate(plans.items()):
        share = (end - time.monotonic()) / (len(plans) - number)
        _pair(table, file, target, pair, plan, wanted, how, progress, time.monotonic() + share, build_only)
    return table


def _pair(
    table: dict[str, Any], file: Path, target: Target, pair: Pair, plan: PrecisionPlan,
    wanted: Sequence[probes.Probe], how: Settings, progress: Progress, end: float, build_only: bool,
) -> None:  # fmt: skip
    runtime, precision = pair
    done = {files.key(e["probe"]["input"], e["probe"]["layers"]) for e in table["entries"]
            if (e["runtime"], e["precision"]) == pair and not e.get("busy") and not _again(e)}  # fmt: skip
    left = [probe for probe in wanted[: how.count] if files.key(probe["input"], probe["layers"]) not in done]
    with profiling_builds.building(runtime, target, how.limits) as build:
        for start in range(0, len(left), how.batch):
            if time.monotonic() > end:
                break
            batch = left[start : start + how.batch]
            progress(f"{runtime} {precision}", (len(wanted) - len(left) + start) / max(1, len(wanted)))
            made = [_built(probe, runtime, plan, build) for probe in batch]
            if build_only:
                continue
            _check_versions(table, runtime, [a for _, a, _ in made if a is not None], file)
            entries = _timed(batch, made, target, pair, plan, how)
            replaced = {files.key(probe["input"], probe["layers"]) for probe in batch}
            table["entries"] = [
                e for e in table["entries"] if (e["runtime"], e["precision"]) != pair
                or files.key(e["probe"]["input"], e["probe"]["layers"]) not in replaced
            ] + entries  # fmt: skip
            table["machine"]["busy"] = any(e.get("busy") for e in table["entries"])
            operator_table.save(table, file)
    progress(f"{runtime} {precision}", 1.0)


def _again(entry: Mapping[str, Any]) -> bool:
    """Whether something disturbed the timing, so that another call repeats it."""
    return entry["status"] == "measured" and operator_table.spread(entry) > UNSTEADY


def _built(
    probe: probes.Probe, runtime: str, plan: PrecisionPlan, build: profiling_builds.Build
) -> tuple[Graph | None, Any, str]:
    """(graph, artifact or None, why not)."""
    folder = profiling_builds.home() / files.key(probe["input"], probe["layers"])
    graph = None
    try:
        graph = dataclasses.replace(profiling_builds.export(lambda: probes.stage(probe), folder, [runtime]), plan=plan)
        return graph, build(graph, folder / f"{runtime}-{files.key(dataclasses.asdict(plan))}"), ""
    except errors.EdgegenError as error:
        return graph, None, " ".join(str(error).split())[:300]


def _timed(
    batch: Sequence[probes.Probe], made: Sequence[tuple[Graph | None, Any, str]], target: Target, pair: Pair,
    plan: PrecisionPlan, how: Settings,
) -> list[dict[str, Any]]:  # fmt: skip
    alive = [(graph, artifact) for graph, artifact, _ in made if graph is not None and artifact is not None]
    feeds = [profiling_builds.feeds_of(graph) for graph, _ in alive]
    times = iter(time_them([artifact for _, artifact in alive], feeds, target, how) if alive else [])
    entries = []
    for probe, (graph, artifact, why) in zip(batch, made, strict=True):
        entry: dict[str, Any] = {
            "runtime": pair[0], "precision": pair[1], "plan": plan.label, "probe": dict(probe),
            "date": time.strftime("%Y-%m-%d"), "status": "not measured", "reason": why, "kernels": [],
        }  # fmt: skip
        if graph is not None:
            entry["kernels"] = [operators.to_row(kernel) for kernel in operators.kernels(graph.onnx, pair[0], plan)]
        if graph is not None and artifact is not None:
            entry |= told(next(times))
        entries.append(entry)
    return entries


def told(latency: Measurement) -> dict[str, Any]:
    """A latency as JSON, with every n-th sample so that about `SAMPLES` stay; busy: the machine did more than this."""
    if latency.status != "measured":
        return {"status": latency.status, "reason": latency.reason}
    load = latency.conditions.get("load_before") or 0.0
    return {
        "status": "measured", "reason": "", "ms": latency.value, "interval": latency.interval, "load": load,
        "busy": latency.conditions.get("device") == "local" and load > local.cores() + SPARE,
        "round_medians": [_digits(v) for v in latency.conditions.get("round_medians", ())],
        "samples": [_digits(v) for v in latency.samples[:: max(1, len(latency.samples) // SAMPLES)]],
        "n": len(latency.samples), "deviation": _digits(statistics.pstdev(latency.samples)),
    }  # fmt: skip


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _check_versions(table: dict[str, Any], runtime: str, artifacts: Sequence[Artifact], file: Path) -> None:
    """All samples of a runtime are of one version."""
    for artifact in artifacts:
        now = version_of(runtime, artifact.versions)
        if (held := table["versions"].setdefault(runtime, now)) != now:
            raise errors.UsageError(f"{file}: measured with {runtime} {held}, this is {now}; give another --out")


def version_of(runtime: str, versions: Mapping[str, str]) -> str:
    """The version of the package that runs an artifact."""
    package = {"litert": "ai-edge-litert"}.get(runtime, runtime)
    return versions.get(package, "unknown")
