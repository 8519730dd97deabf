"""Building, running and timing artifacts in worker processes. A crash there is a RuntimeFailed here, not the end.

Latency: every artifact has a process of its own; rounds go ABAB, in an order shuffled per round, so that what else the
machine does falls on all of them alike; only one process works at a time. Ratios are paired by round.
"""

from __future__ import annotations

import contextlib
import glob
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, serial
from edgegen.isolation import DEFAULT_LIMITS, Limits, Process, host_threads
from edgegen.latency import not_measured, percentile, ratio, speedup, spread, steady, summarise, together
from edgegen.types import Artifact, Graph, Inspection, Measurement, Target

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "Worker",
    "build_isolated",
    "host_threads",
    "percentile",
    "ratio",
    "runs",
    "speedup",
    "spread",
    "steady",
    "time_interleaved",
    "together",
]

Feeds = Mapping[str, np.ndarray]

ROUND_SECONDS = 0.15  # of each artifact in each round, when the number of iterations is not given
SETTLE_SECONDS = 0.05  # thread pools of the process before go on spinning for a while


def build_isolated(
    graph: Graph,
    out: Path,
    *,
    runtime: str,
    calibration: Path | None,
    target: Target,
    limits: Limits = DEFAULT_LIMITS,
    module: str = "",
) -> Artifact:
    """`runtimes.<runtime>.build` in a worker process.

    When it fails, an `out` that was not there before is removed again, and so is what was half written beside it.

    Args:
        module: where `build` is found, when not in `edgegen.runtimes.<runtime>`.
    Raises:
        RuntimeFailed: the runtime raised, crashed, or exceeded the limits; says which, "at build".
        EdgegenError: what the runtime module itself raised, of the same class.
    """
    before = _traces(out)
    process = Process(runtime, limits)
    try:
        reply = process.request(
            "build",
            module=module or f"edgegen.runtimes.{runtime}",
            graph=serial.to_json(graph),
            out=str(out),
            calibration=str(calibration) if calibration else None,
            target=serial.to_json(target),
        )
    except errors.EdgegenError:
        for trace in _traces(out) - before:
            shutil.rmtree(trace, ignore_errors=True) if trace.is_dir() else trace.unlink(missing_ok=True)
        raise
    finally:
        process.close()
    return serial.from_json(Artifact, reply["artifact"])


def _traces(out: Path) -> set[Path]:
    """`out` when it is there, and the temporary folders beside it in which `files.whole` prepares it."""
    return {*([out] if out.exists() else []), *out.parent.glob(f".{glob.escape(out.name)}.*")}


class Worker:
    """An artifact loaded in a process of its own: `with Worker(artifact) as worker: worker.run(feeds)`.

    limits: for each request, and for the memory of the process. module: where the runtime is found, when not in
    `edgegen.runtimes.<artifact.runtime>`. All methods raise RuntimeFailed when the process dies or exceeds its limits.
    """

    def __init__(self, artifact: Artifact, limits: Limits = DEFAULT_LIMITS, *, module: str = ""):
        self.artifact, self.limits = artifact, limits
        self._module = module or f"edgegen.runtimes.{artifact.runtime}"
        self._stack = contextlib.ExitStack()
        self._process: Process | None = None
        self._folder = Path()
        self.host: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgegen-")))
            self._process = Process(self.artifact.runtime, self.limits)
            stack.callback(self._process.close)
            self.host = self._request("open", module=self._module, artifact=serial.to_json(self.artifact))["host"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._open().pid

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Outputs of one run."""
        return self._exchange("run", feeds)

    def run_many(self, stacks: Feeds) -> dict[str, np.ndarray]:
        """Outputs for a stack of samples: every input is mapped to an array whose first axis is samples.

        The worker steps through the stack in steps of the artifact's batch and fills up the last step, so the number of
        samples is free and a stack costs one round trip. Outputs are stacked in the same way. Call it once a chunk to
        keep memory bounded.

        Raises:
            DataError: no samples, or not the same number for all inputs.
        """
        counts = {name: len(value) for name, value in stacks.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise errors.DataError(f"all inputs of a stack must have the same number of samples >= 1, got {counts}")
        return self._exchange("run_many", stacks)

    def feed(self, feeds: Feeds) -> None:
        """Hand over what `time` and `warm` run on."""
        self._request("feed", feeds=self._write(feeds))

    def time(
        self, feeds: Feeds | None, iterations: int, warmup: int = 3, *, at_most: float | None = None
    ) -> list[float]:
        """Milliseconds of each of `iterations` runs after `warmup` others; None: the feeds handed over before.

        The clock is read inside the worker, around the run alone: numpy in and out are included, the pipe is not.
        at_most: seconds after which it stops early, once there are three samples.
        """
        if feeds is not None:
            self.feed(feeds)
        # looking at memory seldom: the looking itself takes time on a small machine
        return self._request("time", iterations=iterations, warmup=warmup, at_most=at_most, poll=0.25)["ms"]

    def warm(self, seconds: float = 0.3, at_most: float = 3.0) -> dict[str, Any]:
        """Run until runs no longer get faster: {"ms": last median, "runs": how many, "settled": before `at_most`}."""
        return self._request("warm", seconds=seconds, at_most=at_most)

    def peak_memory_bytes(self) -> int:
        """Largest resident size of the worker process so far (Python, numpy and the runtime included)."""
        return int(self._request("memory")["peak"])

    def baseline_memory_bytes(self) -> int:
        """Resident size of the worker process before it loaded the artifact."""
        return int(self._request("memory")["baseline"])

    def host_now(self) -> dict[str, Any]:
        """Facts of the machine as `devices.local.probe` gives them, with its clock and load now."""
        return self._request("host")["host"]

    def inspect(self) -> Inspection:
        """What the built file contains, read back by its runtime."""
        return serial.from_json(Inspection, self._request("inspect")["inspection"])

    def layer_times(self, feeds: Feeds, iterations: int = 20) -> tuple[list[dict[str, Any]], str]:
        """({"name", "op", "kernel", "ms": samples} of each kernel, why there is none); counting costs time itself."""
        self.feed(feeds)
        reply = self._request("layers", iterations=iterations)
        return reply["layers"], reply["reason"]

    def _open(self) -> Process:
        if self._process is None:
            raise errors.RuntimeFailed(f"{self.artifact.label}: the worker is not open; use it in a with statement")
        return self._process

    def _request(self, op: str, **fields: Any) -> dict[str, Any]:
        return self._open().request(op, **fields)

    def _exchange(self, op: str, feeds: Feeds) -> dict[str, np.ndarray]:
        reply = self._request(op, feeds=self._write(feeds), folder=str(self._folder))
        return {name: np.load(file, allow_pickle=False) for name, file in reply["outputs"].items()}

    def _write(self, feeds: Feeds) -> dict[str, str]:
        self._open()
        files = {name: str(self._folder / f"in{index}.npy") for index, name in enumerate(feeds)}
        for name, file in files.items():
            array = np.asarray(feeds[name])
            if array.dtype.hasobject:
                raise errors.DataError(f"input {name!r} must hold numbers, got an array of objects")
            np.save(file, array, allow_pickle=False)
        return files


def runs(artifact: Artifact, stack: contextlib.ExitStack, limits: Limits = DEFAULT_LIMITS) -> Any:
    """`run_many` of a worker that the stack closes; with cached blocks {"full": ..., "partial": ...} (see samplers)."""
    opened = [stack.enter_context(Worker(part, limits)).run_many for part in artifact.parts]
    return opened[0] if artifact.partial is None else dict(zip(("full", "partial"), opened, strict=True))


@dataclass
class _Lane:
    """One artifact in a timing run."""

    artifact: Artifact
    feeds: Feeds
    worker: Worker | None = None
    host: dict[str, Any] = field(default_factory=dict)
    iterations: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    failure: str = ""


def time_interleaved(
    items: Sequence[Artifact | Worker],
    feeds: Feeds | Sequence[Feeds],
    *,
    rounds: int = 15,
    iterations: int | None = None,
    seconds: float = ROUND_SECONDS,
    warm_seconds: float = 0.3,
    seed: int = 0,
    limits: Limits = DEFAULT_LIMITS,
    module: str = "",
) -> list[Measurement]:
    """Latency in ms of several artifacts, measured in turns; in the order of `items`.

    Args:
        items: artifacts, or workers that are open (they stay open).
        feeds: inputs for all, or one mapping for each of `items`.
        iterations: runs in each round; None: as many as take `seconds`, between 3 and 400, and fewer in a round that
            takes four times as long because the machine does something else.
        seed: of the order in each round.
    Returns:
        "latency" Measurements: median, 95 % bootstrap interval over rounds, every sample, conditions. What crashed or
        ran out of its limits is "not measured" with the reason, and the others are measured nevertheless.
    """
    each = [feeds] * len(items) if isinstance(feeds, Mapping) else list(feeds)
    if rounds < 1 or len(each) != len(items):
        raise errors.UsageError(f"rounds must be >= 1 and feeds one mapping or {len(items)}, got {rounds}, {len(each)}")
    run = uuid.uuid4().hex[:12]
    with contextlib.ExitStack() as stack:
        lanes = [_Lane(item.artifact if isinstance(item, Worker) else item, mine) for item, mine in zip(items, each)]
        for item, lane in zip(items, lanes):
            with _failure_of(lane):
                opened = item if isinstance(item, Worker) else stack.enter_context(Worker(item, limits, module=module))
                opened.feed(lane.feeds)
                warmed = opened.warm(warm_seconds, at_most=max(3.0, 10 * warm_seconds))["ms"]
                lane.iterations = iterations or max(3, min(400, round(1000 * seconds / max(warmed, 1e-6))))
                lane.worker = opened
        _rounds(lanes, rounds, random.Random(seed), None if iterations else 4 * seconds)
    return [_measurement(lane, {"run": run, "rounds": rounds, "seed": seed}) for lane in lanes]


def _rounds(lanes: list[_Lane], rounds: int, order: random.Random, at_most: float | None) -> None:
    for number in range(rounds):
        for lane in order.sample(lanes, len(lanes)):
            if lane.worker is None or lane.failure:
                continue
            with _failure_of(lane):
                time.sleep(SETTLE_SECONDS)
                if number == 0:
                    lane.host = lane.worker.host_now()
                warmup = max(2, lane.iterations // 8)
                lane.rounds.append(lane.worker.time(None, lane.iterations, warmup, at_most=at_most))


@contextlib.contextmanager
def _failure_of(lane: _Lane) -> Iterator[None]:
    try:
        yield
    except errors.RuntimeFailed as error:
        lane.failure = str(error)


def _measurement(lane: _Lane, run: dict[str, Any]) -> Measurement:
    artifact = lane.artifact
    conditions: dict[str, Any] = {
        "device": "local",
        "runtime": artifact.runtime,
        "precision": artifact.plan.label,
        "threads": artifact.options.get("threads"),
        "batch": next((len(value) for value in lane.feeds.values() if np.ndim(value)), 1),
        "io": "numpy in and out included",
        **run,
        **{key: lane.host[key] for key in ("cpu_model", "cores", "governor", "mhz") if key in lane.host},
    }
    if lane.failure:
        return not_measured("latency", "ms", lane.failure, conditions)
    conditions |= {"iterations": lane.iterations, "load_before": lane.host.get("load")}
    return summarise(lane.rounds, conditions, seed=run["seed"])
