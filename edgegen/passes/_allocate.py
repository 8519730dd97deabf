"""Mixed precision under a budget: which layers stay in float, so that the least is lost.

A layer is in INT8 or in what the plan calls `rest`: those are the widths that a build can mix. The cost of a layer in
INT8 is what it alone does to the output (`_sensitivity`), and costs are added up (Dong et al., 2020, HAWQ-V2,
arXiv:1911.03852, section 3.3; Hubara et al., 2021, AdaQuant, arXiv:2006.10518, section 4: an integer program). The
program is solved exactly by scipy's HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgegen.types import Target

KINDS = ("size", "latency", "quality")
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
INT8_RATE = 4.0  # multiply-accumulates of a 32-bit lane's time, where the target does not state its own


@dataclass(frozen=True)
class Limit:
    """kind: "size" or "latency", as a fraction of the float build (0..1), or "quality": signal to noise in dB."""

    kind: str
    value: float


def parse(text: str) -> Limit:
    """`size:0.5`, `latency:0.4` or `quality:40`.

    Raises:
        ValueError: another kind, or a value out of range.
    """
    kind, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in KINDS or not value > 0 or (kind != "quality" and value > 1):
        raise ValueError(
            f"budget must be size:FRACTION or latency:FRACTION of the float build (0..1), or quality:DB, got {text!r}"
        )
    return Limit(kind, value)


def gains(limit: Limit, macs: Sequence[int], weights: Sequence[int], rest: str, target: Target) -> np.ndarray:
    """What each layer in INT8 takes off, in units of the whole float build (FP32 for size)."""
    if limit.kind == "size":
        return np.array(weights) * (BYTES[rest] - 1.0) / max(1.0, 4.0 * sum(weights))
    return np.array(macs) * (1 - 1 / rate(rest, target)) / max(1, sum(macs))


def rate(rest: str, target: Target) -> float:
    """How many INT8 multiply-accumulates take the time of one in `rest`, by the target's own figures."""
    peaks = target.peak_macs_per_s
    return max(1.0, peaks["int8"] / peaks[rest]) if peaks.get("int8") and peaks.get(rest) else INT8_RATE


def needed(limit: Limit, rest: str) -> float:
    """How much has to be taken off altogether; a rest of 16 bits takes off a half of the size by itself."""
    return (BYTES[rest] / 4.0 if limit.kind == "size" else 1.0) - limit.value


def cheapest(noise: Sequence[float], gain: Sequence[float], least: float) -> list[bool]:
    """Which layers to put in INT8 so that the gains sum up to `least` or more, with the least noise.

    Raises:
        ValueError: all of them together do not gain enough.
    """
    noise_, gain_ = np.asarray(noise, float), np.asarray(gain, float)
    if gain_.sum() < least - 1e-9:
        found = gain_.sum()
        raise ValueError(f"all layers in INT8 take off {found:.3g} of the float build, the budget asks for {least:.3g}")
    if least <= 0:
        return [False] * len(noise_)
    return _solved(noise_, gain_, least, np.inf)


def most(noise: Sequence[float], gain: Sequence[float], allowed: float) -> list[bool]:
    """Which layers to put in INT8 so that the noise sums up to `allowed` at most, with the most gain."""
    noise_, gain_ = np.asarray(noise, float), np.asarray(gain, float)
    return _solved(-gain_, noise_, -np.inf, allowed)


def _solved(cost: np.ndarray, weight: np.ndarray, low: float, high: float) -> list[bool]:
    """Binary x with the least cost . x and low <= weight . x <= high."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    scale = max(1e-30, float(np.abs(weight).max()))  # HiGHS works with absolute tolerances
    size = max(1e-30, float(np.abs(cost).max()))
    limits = LinearConstraint(weight[None] / scale, low / scale, high / scale)
    found = milp(cost / size, constraints=limits, integrality=np.ones(len(cost)), bounds=Bounds(0, 1))
    if found.x is None:
        raise ValueError(f"no allocation found: {found.message}")
    return [bool(value > 0.5) for value in found.x]
