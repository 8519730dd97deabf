"""Throughput: an artifact in several processes at once, each with its share of the threads.

Engines differ in how they serve requests side by side, and artifacts have a fixed batch; processes serve all alike.
Artifacts take turns, as in `measuring.time_interleaved`, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from edgegen import errors, latency, measuring
from edgegen.types import Artifact, Measurement

MOST_STREAMS = 4
"""Processes at once; with more threads than these, each takes several."""
_MANY = 100_000  # runs in a round: time ends it


def split(threads: int) -> tuple[int, int]:
    """(streams, threads of each) for a device with `threads` threads: (2, 1) for 2, (4, 4) for 16."""
    count = max(1, min(threads, MOST_STREAMS))
    return count, max(1, threads // count)


def throughput(
    artifacts: Sequence[Artifact],
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    rounds: int = 5,
    seconds: float = 0.3,
    seed: int = 0,
    limits: measuring.Limits = measuring.DEFAULT_LIMITS,
    module: str = "",
) -> list[Measurement]:
    """Samples a second of each artifact with `split(threads)` streams at once, in the order of `artifacts`.

    Returns:
        "throughput" Measurements in 1/s: the median over rounds of the sum over streams, its 95 % interval, a sample a
        round. What crashed or ran out of its limits is "not measured" with the reason.
    """
    count, each = split(threads)
    told: dict[str, Any] = {"device": "local", "streams": count, "threads": each, "rounds": rounds, "seconds": seconds,
            "batch": next((len(value) for value in feeds.values() if np.ndim(value)), 1), "run": uuid.uuid4().hex[:12]}
    found: list[list[float]] = [[] for _ in artifacts]
    failed: dict[int, str] = {}
    lanes: dict[int, list[measuring.Worker]] = {}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        for place, artifact in enumerate(artifacts):
            own = dataclasses.replace(artifact, options={**artifact.options, "threads": each, "streams": count})
            with _failure(failed, place):
                # in this thread: a worker ends with the thread that started it
                lanes[place] = [_warm(stack.enter_context(measuring.Worker(own, limits, module=module)), feeds)
                                for _ in range(count)]  # fmt: skip
        order = random.Random(seed)
        for _ in range(rounds):
            for place in order.sample(range(len(artifacts)), len(artifacts)):
                if place in failed:
                    continue
                time.sleep(measuring.SETTLE_SECONDS)
                with _failure(failed, place):
                    parts = pool.map(lambda worker: worker.time(None, _MANY, 1, at_most=seconds), lanes[place])
                    found[place].append(sum(1e3 * told["batch"] * len(ms) / sum(ms) for ms in parts))
    return [_measurement(one, rates, failed.get(place, ""), told, seed)
            for place, (one, rates) in enumerate(zip(artifacts, found, strict=True))]  # fmt: skip


@contextlib.contextmanager
def _failure(failed: dict[int, str], place: int) -> Iterator[None]:
    try:
        yield
    except errors.RuntimeFailed as error:
        failed[place] = str(error)


def _warm(worker: measuring.Worker, feeds: Mapping[str, np.ndarray]) -> measuring.Worker:
    worker.feed(feeds)
    worker.warm(0.1, at_most=1.0)
    return worker


def _measurement(
    artifact: Artifact, rates: list[float], failure: str, told: Mapping[str, Any], seed: int
) -> Measurement:
    conditions = {**told, "runtime": artifact.runtime, "precision": artifact.plan.label}
    if failure:
        missing = latency.not_measured("throughput", "1/s", failure, conditions)
        return dataclasses.replace(missing, direction="higher")
    interval = latency.interval_of_rounds(rates, seed=seed)
    return Measurement("throughput", "1/s", float(np.median(rates)), interval, tuple(rates), "higher", conditions)
