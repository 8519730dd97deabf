"""What timed rounds say: median and interval, percentiles, steadiness, and ratios of two artifacts of one run.

Samples of one round hang together, so every interval is a percentile bootstrap over rounds (Efron and Tibshirani, 1993,
An Introduction to the Bootstrap, chapter 13), never over single samples.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgegen import errors
from edgegen.types import Measurement

STEADY_SPREAD = 0.15
RESAMPLES = 2000


def summarise(rounds: Sequence[Sequence[float]], conditions: Mapping[str, Any], *, seed: int = 0) -> Measurement:
    """The "latency" Measurement in ms of rounds of samples: median of all samples, 95 % interval.

    `conditions` gains n, rounds, and the median of each round (`round_medians`), which `ratio` pairs.
    """
    samples = tuple(float(sample) for one in rounds for sample in one)
    arrays = [np.asarray(one, dtype=np.float64) for one in rounds]

    def pooled(draws: np.ndarray) -> np.ndarray:
        return np.array([np.median(np.concatenate([arrays[row] for row in rows])) for rows in draws])

    known = {"n": len(samples), "rounds": len(arrays), "round_medians": [float(np.median(one)) for one in arrays]}
    interval = _interval(pooled, len(arrays), seed)
    return Measurement(
        "latency", "ms", statistics.median(samples), interval, samples, conditions={**conditions, **known}
    )


def ratio(a: Measurement, b: Measurement, *, seed: int = 0) -> Measurement:
    """How many times `b`, the baseline, `a` takes: the median over rounds of a's round median by b's round median.

    Pairing by round takes out what slowed both. The interval is 95 %; the samples are the rounds' ratios. Conditions
    name both sides (`candidate`, `baseline`). "not measured" when either is.

    Raises:
        UsageError: the two are not from one interleaved run.
    """
    conditions = {"candidate": _label(a), "baseline": _label(b)}
    return _paired(a, b, _pairs, Measurement(f"{a.name} ratio", "", float("nan"), conditions=conditions), seed)


def speedup(candidate: Measurement, baseline: Measurement, *, seed: int = 0) -> Measurement:
    """How many times faster `candidate` is than `baseline`: `ratio` the other way up, higher is better."""
    conditions = {"candidate": _label(candidate), "baseline": _label(baseline)}
    blank = Measurement("speed-up", "x", float("nan"), direction="higher", conditions=conditions)
    return _paired(candidate, baseline, lambda a, b: _pairs(b, a), blank, seed)


def together(parts: Sequence[tuple[int, Measurement]], *, seed: int = 0) -> Measurement:
    """What so many runs of each take one after the other: (runs, latency of one) of one interleaved run, the first two.

    The value is the sum of the medians, the interval a bootstrap over rounds. Samples: each run's quantiles times its
    number, as if all were slow together. "not measured" or "estimated" when one of them is.
    """
    first = parts[0][1]
    if bad := [one for _, one in parts if one.status == "not measured"]:
        return dataclasses.replace(first, value=float("nan"), interval=None, samples=(), status=bad[0].status,
                                   reason=bad[0].reason)  # fmt: skip
    value = sum(calls * one.value for calls, one in parts)
    if any(one.status != "measured" for _, one in parts):
        return dataclasses.replace(first, value=value, interval=None, samples=(), status="estimated")
    rounds = [calls * np.asarray(one.conditions["round_medians"], np.float64) for calls, one in parts]
    interval = _interval(lambda rows: sum(np.median(one[rows], axis=1) for one in rounds), len(rounds[0]), seed)
    places = np.linspace(0, 100, min(len(one.samples) for _, one in parts))
    samples = np.sum([calls * np.percentile(one.samples, places) for calls, one in parts], axis=0)
    told = {"round_medians": np.sum(rounds, axis=0).tolist(), "n": len(places)}
    conditions = {**first.conditions, **told}
    return dataclasses.replace(first, value=value, interval=interval, samples=tuple(samples.tolist()),
                               conditions=conditions)  # fmt: skip


def interval_of_rounds(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median of figures that are one a round."""
    each = np.asarray(values, dtype=np.float64)
    return _interval(lambda rows: np.median(each[rows], axis=1), len(each), seed)


def percentile(measurement: Measurement, q: float) -> float:
    """The q-th percentile (0..100) of a measurement's samples; NaN when it was not measured.

    Raises:
        UsageError: q outside 0..100, or a figure that kept no samples.
    """
    if not 0 <= q <= 100:
        raise errors.UsageError(f"a percentile must lie in 0..100, got {q}")
    if measurement.status == "not measured":
        return float("nan")
    if not measurement.samples:
        raise errors.UsageError(f"{measurement.name} has no samples to take a percentile of")
    return float(np.percentile(measurement.samples, q))


def spread(measurement: Measurement) -> float:
    """How far the rounds of a timing lie apart: (90th - 10th percentile) / median of the round medians."""
    low, middle, high = np.percentile(measurement.conditions["round_medians"], [10, 50, 90])
    return float((high - low) / middle)


def steady(measurement: Measurement) -> bool:
    """Whether a timing can be trusted as an absolute figure: measured, with a `spread` of at most 15 %."""
    return measurement.status == "measured" and spread(measurement) <= STEADY_SPREAD


def not_measured(name: str, unit: str, reason: str, conditions: Mapping[str, Any]) -> Measurement:
    """A Measurement that says why there is no figure."""
    return Measurement(name, unit, float("nan"), conditions=conditions, status="not measured", reason=reason)


def _paired(
    a: Measurement,
    b: Measurement,
    combine: Callable[[Measurement, Measurement], np.ndarray],
    blank: Measurement,
    seed: int,
) -> Measurement:
    for side in (a, b):
        if side.status != "measured":
            reason = f"{_label(side)} is {side.status}" + (f": {side.reason}" if side.reason else "")
            return dataclasses.replace(blank, status="not measured", reason=reason)
    runs = [side.conditions.get("run") for side in (a, b)]
    if runs[0] is None or runs[0] != runs[1]:
        raise errors.UsageError(f"a ratio needs two measurements of one interleaved run, got runs {runs[0]} and "
                                f"{runs[1]}; measure both in one time_interleaved call")
    pairs = combine(a, b)
    conditions = {**blank.conditions, "run": runs[0], "rounds": len(pairs), "seed": seed}
    interval = _interval(lambda rows: np.median(pairs[rows], axis=1), len(pairs), seed)
    samples = tuple(float(pair) for pair in pairs)
    return dataclasses.replace(
        blank, value=statistics.median(samples), interval=interval, samples=samples, conditions=conditions
    )


def _pairs(a: Measurement, b: Measurement) -> np.ndarray:
    return np.array(a.conditions["round_medians"]) / np.array(b.conditions["round_medians"])


def _interval(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of row numbers (resamples, count)."""
    draws = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    low, high = np.percentile(statistic(draws), [2.5, 97.5])
    return float(low), float(high)


def _label(measurement: Measurement) -> str:
    parts = (str(measurement.conditions.get(key, "")) for key in ("runtime", "precision"))
    return " ".join(part for part in parts if part) or measurement.name
