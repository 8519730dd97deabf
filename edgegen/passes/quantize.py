"""Plan a post-training INT8 build: which layers become INT8, in which format, and what the rest stays in.

Jacob et al., 2018, arXiv:1712.05877. The pass writes `model.plan` only; runtimes calibrate and build by it, and what
they really made is read back from the file. With a budget the layers are chosen: what each costs in INT8 is measured
(Dong et al., 2019, HAWQ, arXiv:1905.03696, asks the Hessian; here the output is looked at), and an integer program
leaves in float what buys the most quality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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
            the output in dB) with the most MACs in INT8. Where `weights` has int4, each layer that stays in INT8 gets
            8 or 4 bits for its weights as well.
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
    wide: tuple[str, ...] = ()
    if sensitivity or budget:
        ask = _Ask(names, tuple(float_types), rest, sensitivity or "output", budget, samples, "int4" in weights)
        names, wide, told = _measured(model, job, ask)
        notes |= told
    plan = PrecisionPlan(
        "int8", formats[0] if len(formats) == 1 else "", rest, float_layers=names, float_types=tuple(float_types),
        eight_bits=wide, scales=model.plan.scales,
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


@dataclass(frozen=True)
class _Ask:
    """What `_measured` is to find: layers and operation types in float anyway, and the options of `quantize`."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    rest: str
    by: str
    budget: str
    samples: int
    narrow: bool


def _measured(model: Model, job: Job, ask: _Ask) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """(Layers in float, those with weights in 8 bits beside others in 4, notes) by measured sensitivity."""
    samples, source = _sensitivity.inputs_of(model, job, ask.samples)
    score = _sensitivity.figure(model, job, ask.samples) if ask.by == "metric" else None
    with _sensitivity.simulator(model, job, samples) as sim:
        found = _sensitivity.measure(job, sim, ask.by, score, narrow=bool(ask.narrow and ask.budget))
        notes: dict[str, Any] = {
            "sensitivity": ask.by, "inputs": source, "int8_sqnr_db": found.sqnr_db, "recovers_by_group": found.groups,
            "sqnr_db": {row.name: row.sqnr_db for row in found.rows},
            "recovers": {row.name: row.recovers for row in found.rows},
        }  # fmt: skip
        if found.figure is not None:
            notes["int8_figure"] = found.figure
        if not ask.budget:
            return ask.names, (), notes
        free = [row for row in found.rows if row.name not in ask.names and row.kind not in ask.types]
        kept, four = _allocated(sim, free, ask, job, found.rows)
        chosen = (*ask.names, *kept)
        reached = _sensitivity.sqnr(sim.exact, sim.outputs(chosen, four))
    share = sum(row.macs for row in free if row.name not in kept) / max(1, sum(row.macs for row in found.rows))
    notes |= {"budget": ask.budget, "left_in_float": len(kept), "reached_sqnr_db": reached, "int8_macs_share": share}
    if not ask.narrow:
        return chosen, (), notes
    notes |= {"weights": ["int4" if four else "int8"], "in_four_bits": list(four)}
    wide = tuple(row.name for row in free if row.name not in (*kept, *four)) if four else ()
    return chosen, wide, notes


def _allocated(
    sim: _sensitivity.Simulator, free: Sequence[_sensitivity.Row], ask: _Ask, job: Job,
    rows: Sequence[_sensitivity.Row],
) -> tuple[tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """(Layers to leave in float beside those that were named, those whose weights get 4 bits)."""
    limit, narrow = _allocate.parse(ask.budget), any(row.four_bits is not None for row in rows)
    able = [row.four_bits is not None for row in rows] if narrow else []
    every = _allocate.gains(limit, [r.macs for r in rows], [r.weights for r in rows], ask.rest, job.target, able)
    gain = [g for r, g in zip(rows, every, strict=True) if r in free]

    def costs(row: _sensitivity.Row, place: int) -> list[float]:
        """Of each width: noise (place 0), or its power (place 1)."""
        told = [(row.noise, row.sqnr_db), row.four_bits or (row.noise, row.sqnr_db)][: 1 + narrow]
        return [10 ** (-cost[1] / 10) if place else cost[0] for cost in told]

    def names(widths: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        kept = tuple(r.name for r, width in zip(free, widths, strict=True) if not width)
        four = (r.name for r, width in zip(free, widths, strict=True) if width == 2 and r.four_bits is not None)
        return kept, tuple(four)

    if limit.kind != "quality":
        return names(_allocate.cheapest([costs(r, 0) for r in free], gain, _allocate.needed(limit, ask.rest)))
    noise, allowed, best = [costs(r, 1) for r in free], 10 ** (-limit.value / 10), 0.0
    for _ in range(_TIGHTENINGS):
        kept, four = names(_allocate.most(noise, gain, allowed))
        reached = _sensitivity.sqnr(sim.exact, sim.outputs((*ask.names, *kept), four))
        if reached >= limit.value:
            return kept, four
        best = max(best, reached)
        allowed *= min(0.7, 10 ** ((reached - limit.value) / 10))
    raise ValueError(f"budget quality:{limit.value:g}: at best {best:.1f} dB were reached with a layer in INT8")
