"""Which INT8 builds are tried: every plan of every runtime, and variants of those that are slow or lossy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from edgegen import files, onnx_graph, recipe, registry, rewriting, serial
from edgegen.candidates import LEAST_GAIN, Candidate, is_faster
from edgegen.devices import local
from edgegen.errors import RecipeError, RuntimeFailed
from edgegen.run import SCREEN_ROUNDS, Run, model_key
from edgegen.run_graphs import calibration_folder
from edgegen.run_jobs import job_of, unquantized
from edgegen.teacher import Evaluations
from edgegen.types import Graph, Model, PassResult, PrecisionPlan

# How many layers at the (input, output) end stay in float, from the least to the most, when INT8 breaks the budget:
# the first and last layers see pixels, where a step of the grid is visible (PITFALLS 41).
REPAIRS = ((0, 1), (1, 1), (2, 3))
REWRITTEN = ", rewritten"


def rewritten(run: Run, of: str, graph: Graph) -> tuple[Graph, dict[str, str]]:
    """The graph with every exact rewrite applied, and what was rewritten; checked on a real sample in ONNX Runtime.

    Raises:
        RuntimeFailed: the rewritten graph computes something else.
    """
    out = run.folder / "graphs" / f"{of.replace(' ', '_')}_rewritten.onnx"
    made, changed = rewriting.rewritten(graph, rewriting.OFFERS, out, feeds=run.bench.feeds)
    return made, {layer: text for found in changed.values() for layer, text in found.items()}


def add_rewritten(
    run: Run, networks: dict[str, tuple[Model, Graph]], baseline: Candidate, pool: list[Candidate]
) -> list[dict[str, Any]]:
    """Add the rewritten original and last kept network to `networks` and their float builds to `pool`; step records."""
    records: list[dict[str, Any]] = []
    for of in _last_ones(networks):
        model, graph = networks[of]
        name = of + REWRITTEN
        try:
            made, changed = rewritten(run, of, graph)
        except RuntimeFailed as error:  # a rewrite is an offer; the network is there without it
            records.append({"name": "rewrite_graph", "status": "undone", "reason": f"{of}: {error}"})
            continue
        if not changed:
            continue
        builds = unquantized(run, name, made, baseline)
        networks[name] = (model, made)
        before = max((c.gain for c in pool if c.of == of), default=0.0)
        after = max(c.gain for c in builds)
        pool += builds
        kept = after > before
        reason = f"exact rewrite of the graph of {of}: best float build {before:.2f}x -> {after:.2f}x of the baseline"
        status = ("kept" if run.bench.measures else "predicted") if kept else "undone"
        told = {"name": "rewrite_graph", "status": status, "reason": reason, "changed": changed, "network": name}
        records.append(told)
    return records


def planned(run: Run, networks: dict[str, tuple[Model, Graph]]) -> dict[str, dict[str, PassResult]]:
    """Pass name -> network -> what `quantize` and `cast` of the recipe plan for it.

    Raises:
        RecipeError: an option that the target or the network does not allow.
    """
    found: dict[str, dict[str, PassResult]] = {}
    for step in run.recipe.steps:
        if step.name in recipe.PRECISION_PASSES:
            found[step.name] = {of: _planned(run, step, networks[of][0]) for of in _last_ones(networks)}
    return found


def _planned(run: Run, step: recipe.Step, model: Model) -> PassResult:
    """What one pass plans for one network; in the run's log, because a measured sensitivity takes minutes."""
    function = getattr(registry.module("passes", step.name), step.name)

    def work() -> dict[str, Any]:
        told = lambda text, share: run.progress(step.name, text, share)  # noqa: E731
        result = function(model, job_of(run, told), **step.options)
        return {"plan": serial.to_json(result.model.plan), "changed": dict(result.changed),
                "skipped": dict(result.skipped), "notes": dict(result.notes)}  # fmt: skip

    key = files.key("planned", step.name, step.options, model_key(model), dataclasses.asdict(model.plan))
    found = run.log.once(key, work)
    planned_model = dataclasses.replace(model, plan=serial.from_json(PrecisionPlan, found["plan"]))
    return PassResult(planned_model, found["changed"], found["skipped"], found["notes"])


def prepares(network: str) -> bool:
    """Whether a network's last passes only prepare for INT8; names are those that the pipeline gives."""
    return all(name in recipe.PREPARING_PASSES for name in network.partition(" (")[0].split(" + "))


def _last_ones(networks: dict[str, tuple[Model, Graph]]) -> list[str]:
    """The original, the last kept network, what was prepared for INT8 from it, and the rewritten forms of all."""
    plain = [name for name in networks if not name.endswith(REWRITTEN)]
    last = max(place for place, name in enumerate(plain) if not prepares(name))
    wanted = dict.fromkeys((plain[0], *plain[last:]))
    return [name for of in wanted for name in (of, of + REWRITTEN) if name in networks]


def _taken_form(of: str, runtime: str, plan: PrecisionPlan, pool: list[Candidate]) -> bool:
    """Whether this form of a network, rewritten or not, is the one to quantize so.

    Weights that 4 bits hold are not those of a rewritten network, where kernels were added up (taef2-decoder, trained
    for 4 bits: 29.4 dB as it is, 23.8 dB with its upsampling merged into transposed convolutions).
    """
    if plan.precision == "int8" and plan.weights == "int4":
        return not of.endswith(REWRITTEN)
    return _better_form(of, runtime, pool)


def _better_form(of: str, runtime: str, pool: list[Candidate]) -> bool:
    """Whether this form of a network, rewritten or not, has the faster float build in this runtime."""

    floats = [c for c in pool if c.runtime == runtime and not c.quantized]
    if not floats:  # nothing was timed to choose by
        return not of.endswith(REWRITTEN)

    def gain(name: str) -> float:
        return max((c.gain for c in floats if c.of == name), default=0.0)

    # The rewritten form must win beyond noise, so that the choice does not flip between two runs.
    if of.endswith(REWRITTEN):
        return gain(of) >= LEAST_GAIN * gain(of.removesuffix(REWRITTEN))
    return gain(of + REWRITTEN) < LEAST_GAIN * gain(of)


def with_quantized(
    run: Run,
    graphs: dict[str, Graph],
    results: dict[str, PassResult],
    baseline: Candidate,
    pool: list[Candidate],
    found: Evaluations | None,
    only: str = "",
) -> list[Candidate]:
    """The pool with the INT8 builds of the planned networks, timed beside the baseline.

    only: a runtime, for builds in that one alone.
    """
    if not results:
        return pool
    calibration = calibration_folder(run)
    built = []
    for of, result in results.items():
        wanted = result.model.plan
        for runtime, plan in _quantized_plans(run, result.notes):
            if only not in ("", runtime) or not _asked(plan, result.notes["formats"]):
                continue
            if wanted.scales and plan.ranges == "minmax":
                continue  # learned ranges: there is nothing to find, and so only one such build
            if plan.ranges == "minmax" and run.model.task == "classification":
                continue  # logits have no whites to clip, and the second build takes long (ResNet-56: 13 s)
            if not _taken_form(of, runtime, plan, pool):
                continue
            chosen = dataclasses.replace(
                plan, float_layers=_there(of, wanted.float_layers, graphs[of]), float_types=wanted.float_types,
                eight_bits=_there(of, wanted.eight_bits, graphs[of]) if plan.weights == "int4" else (),
                scales=wanted.scales if plan.precision == "int8" else (),
            )  # fmt: skip
            built.append(run.bench.build(of, graphs[of], runtime, chosen, calibration))
    built, worse = _best_ranges(run, sorted(built, key=lambda c: c.label), found)
    timed = run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]
    return pool + worse + timed + _float_islands(run, baseline, timed, calibration)


def _quantized_plans(run: Run, notes: Mapping[str, Any]) -> list[tuple[str, PrecisionPlan]]:
    """(runtime, plan) of INT8, with weights stored as the recipe asks, and of float arithmetic with narrow weights."""
    found = run.bench.plans(quantized=True) if "int8" in notes["weights"] else []
    if "int4" in notes["weights"]:
        four_bits = _offered(run, "int8_from_int4")
        if not four_bits:
            where = f"{', '.join(run.target.runtimes)} of target {run.target.name}"
            raise RecipeError(f"quantize: weights in int4 are for onnxruntime and openvino, not for {where}; use int8")
        found = [*found, *four_bits]
    if narrow := notes.get("weights_only"):
        found = [*found, *(pair for pair in _offered(run, "weights_only") if pair[1].weights in narrow)]
    return found


def _asked(plan: PrecisionPlan, formats: Sequence[str]) -> bool:
    """Whether the recipe's formats have that of the plan; weights of 7 bits (u8s7) are this processor's kind of 8."""
    return not plan.format or any(plan.format[:-1] == name[:-1] for name in formats)


def _offered(run: Run, what: str) -> list[tuple[str, PrecisionPlan]]:
    """(runtime, plan) of a function that some runtimes of the target have."""
    modules = {name: registry.module("runtimes", name) for name in run.target.runtimes}
    return [
        (name, plan)
        for name, module in modules.items()
        if hasattr(module, what) and not module.missing()
        for plan in getattr(module, what)(run.target, local.cpu_flags())
    ]


def _there(of: str, names: tuple[str, ...], graph: Graph) -> tuple[str, ...]:
    """Layers to leave in float; a rewritten graph may not have all of them under their names any more."""
    if not of.endswith(REWRITTEN) or not names:
        return names
    present = {node.name for node in onnx.load(graph.onnx, load_external_data=False).graph.node}
    return tuple(name for name in names if name in present)


def _best_ranges(
    run: Run, built: list[Candidate], found: Evaluations | None
) -> tuple[list[Candidate], list[Candidate]]:
    """(best, others) of builds that differ only in how activation ranges were found: equally fast, so quality decides.

    No rule is right for all: on edsr "mean" clips white skies (34 dB to the teacher on one photo, "minmax" 51 dB), on
    style-mosaic "minmax" loses 3 dB to a few large activations.
    """
    families: dict[Any, list[Candidate]] = {}
    for candidate in built:
        plan = dataclasses.replace(candidate.graph.plan, ranges="")
        families.setdefault((candidate.of, candidate.runtime, plan), []).append(candidate)
    best, others = [], []
    for family in families.values():
        alive = [c for c in family if c.artifact is not None]
        if found is not None and len(alive) > 1:
            alive = [run.bench.score(c, found.select, run.gate, "select") for c in alive]
            alive.sort(key=lambda c: c.drop if c.drop is not None else math.inf)
        first = alive[0] if alive else family[0]
        best.append(first)
        scored = {c.key: c for c in alive}
        said = f"the same kernels as {first.label}, with more loss of quality"
        others += [scored.get(c.key, c).judged("undone", said) for c in family if c.key != first.key]
    return best, others


def _float_islands(run: Run, baseline: Candidate, timed: list[Candidate], calibration: Path) -> list[Candidate]:
    """Where INT8 is slower than float: leave one heavy operation type in float at a time, in the best INT8 build."""
    alive = [c for c in timed if c.ratio is not None]
    if not alive or any(is_faster(c) for c in alive):
        return []
    best = max(alive, key=lambda c: c.gain)
    types = {layer.op for layer in onnx_graph.cost(best.graph.onnx).layers}
    if len(types) < 2:
        return []
    asked = best.graph.plan.float_types  # what the recipe leaves in float stays there
    plans = [dataclasses.replace(best.graph.plan, float_types=(*asked, kind)) for kind in sorted(types - set(asked))]
    built = [run.bench.build(best.of, best.graph, best.runtime, plan, calibration) for plan in plans]
    return run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]


def repairs(run: Run, candidate: Candidate, baseline: Candidate) -> list[Candidate]:
    """Variants of an INT8 build that breaks the quality budget, with layers at both ends left in float."""
    names = [layer.name for layer in onnx_graph.cost(candidate.graph.onnx).layers]
    built = []
    for first, last in REPAIRS:
        if first + last >= len(names):
            break
        ends = names[:first] + names[len(names) - last :]
        kept = tuple(dict.fromkeys((*candidate.graph.plan.float_layers, *ends)))  # what the recipe asked for stays
        plan = dataclasses.replace(candidate.graph.plan, float_layers=kept)
        built.append(run.bench.build(candidate.of, candidate.graph, candidate.runtime, plan, calibration_folder(run)))
    return run.bench.time([baseline, *built], baseline, SCREEN_ROUNDS)[1:]
