"""Plan a post-training INT8 build: which layers become INT8, in which format, and what the rest stays in.

Jacob et al., 2018, arXiv:1712.05877. The pass writes `model.plan` only; runtimes calibrate and build by it, and what
they really made is read back from the file. With a budget the layers are chosen: what each costs in INT8 is measured
(Dong et al., 2019, HAWQ, arXiv:1905.03696, asks the Hessian; here the output is looked at), and an integer program
leaves in float what buys the most quality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx

from edgegen.errors import RecipeError
from edgegen.passes import _allocate, _plans, _sensitivity
from edgegen.types import Job, Model, PassResult, PrecisionPlan

FORMATS = ("u8s8", "s8s8")
LAST = ("", "float")
_TIGHTENINGS = 6  # costs of single layers do not quite add up: the sum is checked, and allowed less the next time


def quantize(
    model: Model,
    job: Job,
    *,
    precision: str = "int8",
    formats: Sequence[str] = ("u8s8", "s8s8"),
    float_layers: Sequence[str] = (),
    float_types: Sequence[str] = (),
    rest: str = "fp32",
    weights: Sequence[str] = ("int8",),
    weights_only: Sequence[str] = (),
    sensitivity: str = "",
    budget: str = "",
    samples: int = 16,
    last_layer: str = "",
) -> PassResult:
    """Write a PrecisionPlan for INT8.

    Args:
        formats: Q/DQ formats to try where a runtime has several: u8s8 (unsigned activations), s8s8 (symmetric). The
            plan names one only if it is the only one; `notes` has them all. This host's builds have weights of 7 bits
            (u8s7, s8s7) where its processor has no VNNI and would cut off larger sums.
        float_layers: layers (or graph nodes, `path/Type`) left in `rest`; float_types: ONNX types left in it.
        rest: precision of what is not quantized: fp32, or fp16 or bf16 where the target has it.
        weights: how INT8 builds store their weights: int8, int4 (15 levels an output channel, half of the file and the
            same kernels; ONNX Runtime and OpenVINO have it). Quality suffers: see `weights` of quantize_aware.
        weights_only: builds with narrow weights and float arithmetic to try beside INT8, where a runtime has them:
            int8, int4 (block-wise). They shrink matrix products; time they gain only where reading weights takes it.
        sensitivity: measure what each layer, operation type and block costs in INT8, by the "output" (signal to noise;
            KL divergence of classes) or the "metric" (top-1 or PSNR on `samples` samples of the data).
        budget: choose the layers that stay in `rest`: "size:0.4" or "latency:0.5" (fractions of the float build; the
            time is that of the MACs at the target's rates) with the least loss, or "quality:40" (signal to noise of
            the output in dB) with the most MACs in INT8.
        samples: how many inputs sensitivity is measured on, drawn from the data. last_layer: "float" leaves the layers
            that make the outputs in `rest`: the eye sees their steps.
    Returns:
        PassResult; `changed` has the convolution and linear layers that become INT8, `skipped` the others; `notes` the
        sensitivity of each.
    Raises:
        RecipeError: a value that is not allowed, a precision that the target lacks, a name that does not exist.
        ValueError: a budget that no allocation meets, or a sensitivity that cannot be measured.
    """
    _plans.check_precision("precision", precision, ("int8",), job)
    _plans.check_precision("rest", rest, ("fp32", "fp16", "bf16"), job)
    if not formats or any(name not in FORMATS for name in formats):
        raise RecipeError(f"formats must name at least one of {', '.join(FORMATS)}, got {list(formats)}")
    for kind in float_types:
        if not onnx.defs.has(kind):
            raise RecipeError(f"float_types: {kind!r} is no ONNX operation; name one such as Conv, Gemm, MatMul")
    _check(weights, weights_only, sensitivity, budget, samples, last_layer)
    names = _plans.node_names(float_layers, model)
    notes: dict[str, Any] = {"formats": list(formats), "weights": list(weights)} | (
        {"weights_only": list(weights_only)} if weights_only else {}
    )
    names = tuple(dict.fromkeys((*names, *_output_layers(model, job))) if last_layer else names)
    if sensitivity or budget:
        names, told = _measured(model, job, names, tuple(float_types), rest, sensitivity or "output", budget, samples)
        notes |= told
    plan = PrecisionPlan(
        "int8", formats[0] if len(formats) == 1 else "", rest, float_layers=names, float_types=tuple(float_types),
        scales=model.plan.scales,
    )  # fmt: skip
    changed, skipped = {}, {}
    for path, types in _plans.layer_types(model.stage.module).items():
        if any(f"{path}/{kind}" in names for kind in types):
            skipped[path] = f"left in {rest} for the budget {budget}" if budget else "named in float_layers"
        elif set(types) <= set(float_types):
            skipped[path] = f"{types[0]} is in float_types"
        else:
            changed[path] = "int8"
    if model.stage.module is None:
        changed["graph"] = "int8"
    return PassResult(dataclasses.replace(model, plan=plan), changed, skipped, notes)


def _check(
    weights: Sequence[str], weights_only: Sequence[str], sensitivity: str, budget: str, samples: int, last_layer: str
) -> None:
    if not weights or any(name not in _plans.WEIGHTS for name in weights):
        raise RecipeError(f"weights must name at least one of {', '.join(_plans.WEIGHTS)}, got {list(weights)}")
    if any(name not in _plans.WEIGHTS for name in weights_only):
        raise RecipeError(f"weights_only may name {', '.join(_plans.WEIGHTS)}, got {list(weights_only)}")
    if sensitivity and sensitivity not in _sensitivity.MEASURES:
        raise RecipeError(f"sensitivity must be one of {', '.join(_sensitivity.MEASURES)}, got {sensitivity!r}")
    if samples < 1:
        raise RecipeError(f"samples must be at least 1, got {samples}")
    if last_layer not in LAST:
        raise RecipeError(f"last_layer must be empty or float, got {last_layer!r}")
    if budget:
        _allocate.parse(budget)


def _output_layers(model: Model, job: Job) -> tuple[str, ...]:
    """The layers that make the outputs, in graph order: of a sum or a concatenation, those of each part."""
    with _sensitivity.simulator(model, job, _sensitivity.inputs_of(model, job, 1)[0]) as sim:
        return tuple(layer.name for layer in sim.layers if layer.name in sim.last)


def _measured(
    model: Model, job: Job, names: tuple[str, ...], types: tuple[str, ...], rest: str, by: str, budget: str, count: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(Layers in float, notes) by measured sensitivity: those that were named, and those that the budget chooses."""
    samples, source = _sensitivity.inputs_of(model, job, count)
    score = _sensitivity.figure(model, job, count) if by == "metric" else None
    with _sensitivity.simulator(model, job, samples) as sim:
        found = _sensitivity.measure(job, sim, by, score)
        notes: dict[str, Any] = {
            "sensitivity": by, "inputs": source, "int8_sqnr_db": found.sqnr_db, "recovers_by_group": found.groups,
            "sqnr_db": {row.name: row.sqnr_db for row in found.rows},
            "recovers": {row.name: row.recovers for row in found.rows},
        }  # fmt: skip
        if found.figure is not None:
            notes["int8_figure"] = found.figure
        if not budget:
            return names, notes
        free = [row for row in found.rows if row.name not in names and row.kind not in types]
        kept = _allocated(sim, free, names, rest, job, _allocate.parse(budget), found.rows)
        chosen = (*names, *kept)
        reached = _sensitivity.sqnr(sim.exact, sim.outputs(chosen))
    share = sum(row.macs for row in free if row.name not in kept) / max(1, sum(row.macs for row in found.rows))
    notes |= {"budget": budget, "left_in_float": len(kept), "reached_sqnr_db": reached, "int8_macs_share": share}
    return chosen, notes


def _allocated(
    sim: _sensitivity.Simulator, free: Sequence[_sensitivity.Row], names: tuple[str, ...], rest: str, job: Job,
    limit: _allocate.Limit, rows: Sequence[_sensitivity.Row],
) -> tuple[str, ...]:  # fmt: skip
    """Layers to leave in float beside those that were named."""
    every = _allocate.gains(limit, [r.macs for r in rows], [r.weights for r in rows], rest, job.target)
    gain = [float(g) for r, g in zip(rows, every, strict=True) if r in free]
    if limit.kind != "quality":
        chosen = _allocate.cheapest([r.noise for r in free], gain, _allocate.needed(limit, rest))
        return tuple(r.name for r, narrow in zip(free, chosen, strict=True) if not narrow)
    noise = [10 ** (-r.sqnr_db / 10) for r in free]
    allowed = 10 ** (-limit.value / 10)
    best = 0.0
    for _ in range(_TIGHTENINGS):
        chosen = _allocate.most(noise, gain, allowed)
        kept = tuple(r.name for r, narrow in zip(free, chosen, strict=True) if not narrow)
        reached = _sensitivity.sqnr(sim.exact, sim.outputs((*names, *kept)))
        if reached >= limit.value:
            return kept
        best = max(best, reached)
        allowed *= min(0.7, 10 ** ((reached - limit.value) / 10))
    raise ValueError(f"budget quality:{limit.value:g}: at best {best:.1f} dB were reached with a layer in INT8")
