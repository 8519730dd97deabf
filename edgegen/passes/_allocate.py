"""Mixed precision under a budget: which layers stay in float, or in 8 bits, so that the least is lost.

A layer is in what the plan calls `rest`, in INT8, or in INT8 with weights stored in 4 bits where the recipe has these:
the widths that a build can mix. The cost of a layer in one is what it alone does to the output (`_sensitivity`), and
costs are added up (Dong et al., 2020, HAWQ-V2, arXiv:1911.03852, section 3.3; Hubara et al., 2021, AdaQuant,
arXiv:2006.10518, section 4: an integer program). The program is solved exactly by scipy's HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen.types import Target

KINDS = ("size", "latency", "quality")
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
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


def gains(
    limit: Limit, macs: Sequence[int], weights: Sequence[int], rest: str, target: Target, four_bits: Sequence[bool] = ()
) -> np.ndarray:
    """What each layer takes off in each width (layers, 1 or 2), in units of the whole float build (FP32 for size).

    four_bits: whether a layer's weight can be stored so, for a second width; it takes the time of INT8, and in a budget
    of quality a tenth of what INT8 itself is worth.
    """
    share, work = np.array(weights) / max(1, sum(weights)), np.array(macs) / max(1, sum(macs))
    time = work * (1 - 1 / rate(rest, target))
    eight = share * (BYTES[rest] - BYTES["int8"]) / 4.0 if limit.kind == "size" else time
    if not len(four_bits):
        return eight[:, None]
    worth = {"size": (BYTES["int8"] - BYTES["int4"]) / 4.0, "latency": 0.0, "quality": 0.1}[limit.kind]
    less = np.array(four_bits) * share * worth
    return np.stack([eight, eight + less], 1)


def rate(rest: str, target: Target) -> float:
    """How many INT8 multiply-accumulates take the time of one in `rest`, by the target's own figures."""
    peaks = target.peak_macs_per_s
    return max(1.0, peaks["int8"] / peaks[rest]) if peaks.get("int8") and peaks.get(rest) else INT8_RATE


def needed(limit: Limit, rest: str) -> float:
    """How much has to be taken off altogether; a rest of 16 bits takes off a half of the size by itself."""
    return (BYTES[rest] / 4.0 if limit.kind == "size" else 1.0) - limit.value


def cheapest(noise: Any, gain: Any, least: float) -> list[int]:
    """The width of each layer so that the gains sum up to `least` or more, with the least noise.

    Args:
        noise, gain: (layers, widths).
    Returns:
        For each layer 0 (float) or the number of its width from 1.
    Raises:
        ValueError: all of them together do not gain enough.
    """
    noise_, gain_ = np.asarray(noise, float), np.asarray(gain, float)
    if (found := gain_.max(axis=1).sum()) < least - 1e-9:
        how = "" if gain_.shape[1] == 1 else " with weights in 4 bits"
        told = f"all layers in INT8{how} take off {found:.3g} of the float build"
        raise ValueError(f"{told}, the budget asks for {least:.3g}")
    if least <= 0:
        return [0] * len(noise_)
    return _solved(noise_, gain_, least, np.inf)


def most(noise: Any, gain: Any, allowed: float) -> list[int]:
    """The width of each layer (as in `cheapest`) so that the noise sums up to `allowed` at most, with the most gain."""
    noise_, gain_ = np.asarray(noise, float), np.asarray(gain, float)
    return _solved(-gain_, noise_, -np.inf, allowed)


def _solved(cost: np.ndarray, weight: np.ndarray, low: float, high: float) -> list[int]:
    """At most one width of each layer with the least sum of `cost`, and low <= the sum of `weight` <= high."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, widths = cost.shape
    scale = max(1e-30, float(np.abs(weight).max()))  # HiGHS works with absolute tolerances
    size = max(1e-30, float(np.abs(cost).max()))
    limits = [LinearConstraint(weight.reshape(1, -1) / scale, low / scale, high / scale)]
    if widths > 1:
        limits.append(LinearConstraint(np.kron(np.eye(layers), np.ones(widths)), -np.inf, 1))
    found = milp(cost.ravel() / size, constraints=limits, integrality=np.ones(cost.size), bounds=Bounds(0, 1))
    if found.x is None:
        raise ValueError(f"no allocation found: {found.message}")
    chosen = found.x.reshape(layers, widths) > 0.5
    return [int(row.argmax()) + 1 if row.any() else 0 for row in chosen]
