"""What every runtime does alike: pick plans that a target allows, count threads, describe what was built."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgegen import errors
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Target


def allowed(plans: Iterable[PrecisionPlan], target: Target) -> tuple[PrecisionPlan, ...]:
    """The plans whose precision, and for INT8 the precision of the rest, the target offers."""
    return tuple(
        plan
        for plan in plans
        if plan.precision in target.precisions and (plan.precision != "int8" or plan.rest in target.precisions)
    )


def threads(target: Target) -> int:
    """Threads of a run: the target's, else two, or one where there is one core."""
    return target.threads or min(2, os.cpu_count() or 1)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and the named distributions."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def artifact(
    runtime: str, main: Path, graph: Graph, plan: PrecisionPlan, options: Mapping[str, Any], packages: Iterable[str]
) -> Artifact:
    """Describe a finished build; every file in the folder of `main`, and below it, belongs to it."""
    found = tuple(sorted(p for p in main.parent.rglob("*") if p.is_file()))
    size = sum(p.stat().st_size for p in found)
    return Artifact(runtime, main, found, plan, size, graph.inputs, graph.outputs, dict(options), versions(*packages))


def check_plan(runtime: str, plan: PrecisionPlan, known: Iterable[PrecisionPlan], calibration: Path | None) -> None:
    """Refuse a plan that the runtime cannot build, and INT8 without calibration data.

    Raises:
        errors.UsageError: says which plans there are, or what is missing.
    """

    def kind(p: PrecisionPlan) -> tuple[str, str, str, str]:
        return p.precision, p.format, p.rest if p.precision == "int8" else "", p.weights

    if kind(plan) not in {kind(p) for p in known}:
        labels = ", ".join(p.label for p in known)
        raise errors.UsageError(f"{runtime} cannot build {plan.label}; it can build: {labels}")
    if plan.precision == "int8" and calibration is None:
        raise errors.UsageError(f"{runtime} needs calibration data to build {plan.label}; give a calibration folder")


def saturates(cpu_flags: frozenset[str]) -> bool:
    """Whether INT8 kernels add two products of 8-bit numbers in 16 bits (vpmaddubsw), which cuts off large sums.

    True of x86 processors without VNNI. Weights of 7 bits keep every sum exact: 2 x 255 x 64 < 2^15.
    """
    return bool(cpu_flags & {"avx2", "avx512f"}) and not cpu_flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def seven_bits(plan: PrecisionPlan) -> PrecisionPlan:
    """An INT8 plan with weights of 7 bits; others as they are."""
    eight = plan.format or "u8s8"
    return dataclasses.replace(plan, format=f"{eight[:-1]}7") if plan.precision == "int8" else plan


def exact_sums(
    plans: Iterable[PrecisionPlan], target: Target, cpu_flags: frozenset[str]
) -> tuple[PrecisionPlan, ...]:
    """The plans, with weights of 7 bits where this host is the target and would cut off the sums of 8."""
    return tuple(map(seven_bits, plans)) if target.is_host and saturates(cpu_flags) else tuple(plans)


def check_promise(artifact: Artifact, found: Inspection, promised_macs_share: float) -> None:
    """Precision is read back, not believed.

    An INT8 build must store INT8 weights, and compute in INT8 at least half of the MACs it was meant to: single layers
    that a runtime's fusion misses are told by `Inspection.layers`, and cost what they cost when the build is timed. A
    build with narrow weights must have a layer that says so, such as "fp32 (weights int4)".

    Raises:
        errors.RuntimeFailed: the built file does not have the precision that the plan asked for.
    """
    got, plan = sorted(set(found.layers.values())), artifact.plan
    if plan.precision != "int8":
        if found.layers and not any(precision.startswith(plan.precision) for precision in got):
            raise errors.RuntimeFailed(f"{artifact.label}: promised {plan.precision}, layers are {got}")
        if plan.weights and not any(f"(weights {plan.weights})" in precision for precision in got):
            raise errors.RuntimeFailed(f"{artifact.label}: promised weights in {plan.weights}, layers are {got}")
    elif found.int8_weight_share == 0 or found.int8_macs_share < 0.5 * promised_macs_share:
        raise errors.RuntimeFailed(
            f"{artifact.label}: promised int8 for {promised_macs_share:.0%} of the MACs, obtained "
            f"{found.int8_macs_share:.0%} ({found.int8_weight_share:.0%} of the weight bytes); layers are {got}"
        )
