"""The decisions of a run: which candidates there are, which one is chosen, and why the others are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgegen import quality, reasons
from edgegen.candidates import LEAST_GAIN, Candidate, is_faster, within
from edgegen.errors import BudgetError
from edgegen.final import Final, final_figures
from edgegen.run import Run
from edgegen.teacher import Evaluations
from edgegen.variants import REWRITTEN, repairs

ASKED = "kept because you asked (--keep)"


@dataclass(frozen=True)
class Demand:
    """What --keep asks of the result: made from one of `networks`, in one of `precisions`; empty: any."""

    networks: frozenset[str] = field(default_factory=frozenset)
    precisions: frozenset[str] = field(default_factory=frozenset)

    def met(self, candidate: Candidate) -> bool:
        """Whether the candidate holds every pass that was asked for."""
        made = not self.networks or candidate.of.removesuffix(REWRITTEN) in self.networks
        return made and (not self.precisions or candidate.graph.plan.precision in self.precisions)

    def __bool__(self) -> bool:
        return bool(self.networks or self.precisions)


NO_DEMAND = Demand()


def group_verdict(
    best: Candidate, before: float, broken: str, forced: bool, here: bool, smaller: bool = False
) -> tuple[str, str]:
    """(status, reason) of a group of structural passes after its best unquantized build was timed and scored.

    before: the gain of the best build so far. broken: which limit it breaks, or "". smaller: size is limited, and this
    is smaller than all before. Status as in `report.schema.Step`.
    """
    figure = f"{best.gain:.2f}x against the best unquantized build of the original (before this step {before:.2f}x)"
    if not here:
        figure = f"predicted {figure}"
    if best.unknown:
        figure = f"no gain can be shown: {best.unknown}"
    pays = smaller or (not best.unknown and best.gain >= before * LEAST_GAIN)
    figure += "; smaller than all before, for --max-size" if smaller else ""
    if forced and (broken or not pays):
        return "forced", f"{ASKED}, although: {broken or 'no gain'}; {figure}"
    if broken:
        return "undone", f"{broken}; {figure}"
    if not pays:
        return "undone", f"no gain on this target: {figure}"
    return ("kept" if here else "predicted"), figure


def cause(run: Run, build: Candidate, beaten: Candidate) -> str:
    """Why a build is not faster than another, as the end of a reason; empty where nothing speaks for a cause."""
    made = [reasons.read(c.graph, c.runtime, c.latency.value if c.latency else math.nan, c.inspection)
            for c in (build, beaten) if c.graph.onnx.is_file()]  # fmt: skip
    both = [one for one in made if one is not None]
    return reasons.told(reasons.why(both[0], both[1], run.target)) if len(both) == 2 else ""


def unrecovered(status: str, reason: str, advice: str, holds: bool) -> tuple[str, str]:
    """(status, reason) of a group that no training ends. holds: its quality was measured, and keeps the budget.

    Without that it is no success, however fast and whoever asked for it; with it, it is one as it stands.
    """
    if status == "undone":
        return status, f"{reason}; {advice}"
    if holds:
        return status, f"{reason}; inside the quality budget without recovery"
    return "needs recovery", f"{advice}; {reason}"


def preparing_verdict(broken: str, forced: bool) -> tuple[str, str]:
    """(status, reason) of passes that only prepare for INT8: whether they pay is decided by the INT8 builds.

    broken: which limit the float build of the prepared network breaks, or "".
    """
    if broken and not forced:
        return "undone", f"the prepared network breaks the budget in float already: {broken}"
    return ("forced" if forced else "kept"), f"{ASKED}{f', although: {broken}' if broken else ''}" if forced else ""


def _ranked(candidates: list[Candidate], baseline: Candidate) -> list[Candidate]:
    """Faster ones first, then the baseline, then the rest (for budgets that speed alone does not meet)."""
    alive = sorted((c for c in candidates if not c.verdict and c.ratio is not None), key=lambda c: c.gain, reverse=True)
    others = [c for c in alive if c.label != baseline.label]
    faster = [c for c in others if is_faster(c)]
    rest = [c for c in others if not is_faster(c)]
    return [*faster, *(c for c in alive if c.label == baseline.label), *rest]


def choose(
    run: Run,
    baseline: Candidate,
    pool: list[Candidate],
    found: Evaluations | None,
    demand: Demand = NO_DEMAND,
    refuted: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Candidate, list[Candidate]]:
    """The fastest candidate inside every budget, on both held-out parts; (chosen, all other candidates with verdicts).

    demand: only what meets it is chosen, and where none is inside the quality budget the nearest is. refuted: key of a
    candidate -> why it must not be chosen.

    Raises:
        BudgetError: none is inside; names the nearest one and the constraint that binds.
    """
    pool = [c if demand.met(c) else c.judged("not chosen", "without the pass that --keep asks for") for c in pool]
    judged: list[Candidate] = [c for c in pool if c.verdict]
    queue = _ranked(pool, baseline)
    repaired: set[str] = set()
    rejected: list[tuple[Candidate, str]] = []
    while queue:
        candidate, broken = _examined(run, queue.pop(0), found, baseline)
        broken = broken or refuted.get(candidate.key, "")
        if not broken:
            rest = [c.judged("not chosen", _why_not(run, c, candidate, baseline)) for c in queue]
            more = quality.gained(candidate.drop, run.budget.max_quality_drop, run.gate.unit)
            return candidate.judged("chosen", _why(candidate, baseline, demand) + more), [*judged, *rest]
        rejected.append((candidate, broken))
        judged.append(candidate.judged("undone", broken))
        family = f"{candidate.of} {candidate.runtime}"
        repairable = candidate.quantized and found is not None and "drop" in broken and len(repaired) < 3
        if repairable and family not in repaired:
            repaired.add(family)
            made = repairs(run, candidate, baseline)
            judged += [c for c in made if c.verdict]
            queue = _ranked(queue + made, baseline)
    return _despite(run, rejected, judged, demand)


def _despite(
    run: Run, rejected: list[tuple[Candidate, str]], judged: list[Candidate], demand: Demand
) -> tuple[Candidate, list[Candidate]]:
    """What --keep asks for although it breaks the quality budget: the nearest one; without --keep a BudgetError."""
    if not rejected:
        failed = "; ".join(f"{c.label}: {c.reason}" for c in judged if c.verdict == "failed")
        raise BudgetError(f"--keep: no build holds the pass that it asks for ({failed or 'none was planned'})")
    alone = dataclasses.replace(run.budget, max_quality_drop=None)
    usable = [(c, why) for c, why in rejected if not c.verdict and not within(c, alone, run.gate)]
    if not demand or not usable:
        raise BudgetError(_nearest(run, rejected))
    candidate, broken = min(usable, key=lambda entry: _excess(run, entry[0]))
    others = [c for c in judged if c.key != candidate.key]
    return candidate.judged("chosen", f"{ASKED}, although: {broken}"), others


def settle(
    run: Run,
    baseline: Candidate,
    pool: list[Candidate],
    floats: list[Candidate],
    found: Evaluations | None,
    demand: Demand,
) -> tuple[Final, list[Candidate]]:
    """Choose, and time the choice once more, long: what does not hold then is undone, and the next one is tried.

    Of several candidates the one with the luckiest short timing is first, so the long timing has the last word.
    """
    refuted: dict[str, str] = {}
    while True:
        chosen, judged = choose(run, baseline, pool, found, demand, refuted)
        final = final_figures(run, baseline, chosen, floats, found)
        why = "" if demand else _refuted(run, chosen, final)
        if not why:
            return final, judged
        refuted[chosen.key] = why


def _refuted(run: Run, chosen: Candidate, final: Final) -> str:
    """Why the long timing speaks against the choice; empty when it does not."""
    if not run.bench.measures or chosen.label == final.baseline.label:
        return ""
    if final.chosen.verdict == "failed":
        return final.chosen.reason
    if is_faster(chosen) and not final.chosen.gain > 1.0:
        return f"not faster than {final.baseline.label} in the long timing ({final.chosen.gain:.2f}x)"
    return within(final.chosen, dataclasses.replace(run.budget, max_quality_drop=None), run.gate)


def _examined(run: Run, candidate: Candidate, found: Evaluations | None, baseline: Candidate) -> tuple[Candidate, str]:
    """The candidate with its figures, and which limit it breaks.

    The best unquantized build of the original is never refused for quality: it is what the user has without edgegen,
    and without it a budget of zero would end with something slower.
    """
    budget = run.budget
    if candidate.key == baseline.key:
        budget = dataclasses.replace(budget, max_quality_drop=None)
    if found is None:
        return candidate, within(candidate, budget, run.gate)
    scored = run.bench.score(candidate, found.select, run.gate, "select")
    broken = scored.reason if scored.verdict else within(scored, budget, run.gate)
    if broken:
        return scored, broken
    held_out = run.bench.score(candidate, found.test, run.gate, "test")
    broken = held_out.reason if held_out.verdict else within(held_out, budget, run.gate)
    return held_out, f"on the second held-out part: {broken}" if broken else ""


def _why(candidate: Candidate, baseline: Candidate, demand: Demand) -> str:
    if candidate.unknown:
        return f"{f'{ASKED}, although: ' if demand else ''}what is faster cannot be said: {candidate.unknown}"
    if demand and not is_faster(candidate):
        return f"{ASKED}, although: not faster than {baseline.label} ({candidate.gain:.2f}x)"
    if candidate.label == baseline.label:
        return "nothing faster keeps the budget: this is the best unquantized build itself"
    return f"the fastest inside the budget: {candidate.gain:.2f}x against {baseline.label} in the first timing"


def _why_not(run: Run, candidate: Candidate, chosen: Candidate, baseline: Candidate) -> str:
    if candidate.label == baseline.label:
        return "the baseline"
    if candidate.unknown:
        return f"what is faster cannot be said: {candidate.unknown}"
    noise = " beyond noise" if candidate.gain > 1 else ""
    if candidate.quantized and not is_faster(candidate):
        why = cause(run, candidate, baseline)
        return f"INT8 is not faster than {baseline.label} here{noise} ({candidate.gain:.2f}x){why}"
    if candidate.gain > chosen.gain:
        return f"not faster than {chosen.label}{noise} ({candidate.gain:.2f}x)"
    return f"slower than {chosen.label} ({candidate.gain:.2f}x against {chosen.gain:.2f}x)"


def _excess(run: Run, candidate: Candidate) -> float:
    """By which share a candidate misses the limit that it misses most."""
    budget, shares = run.budget, [math.inf if candidate.verdict else 0.0]
    if budget.max_latency_ms and candidate.latency is not None:
        shares.append(candidate.latency.value / budget.max_latency_ms - 1)
    if budget.max_size_bytes and candidate.artifact is not None:
        shares.append(candidate.artifact.size_bytes / budget.max_size_bytes - 1)
    if budget.max_quality_drop is not None and candidate.drop is not None:
        shares.append((candidate.drop - budget.max_quality_drop) / max(budget.max_quality_drop, 0.1))
    return max(shares)


def _nearest(run: Run, rejected: list[tuple[Candidate, str]]) -> str:
    candidate, broken = min(rejected, key=lambda entry: _excess(run, entry[0]))
    size = candidate.artifact.size_bytes / 1e6 if candidate.artifact is not None else math.nan
    latency = candidate.latency.value if candidate.latency is not None else math.nan
    lost = f", drop {candidate.drop:.3g} {run.gate.unit}" if candidate.drop is not None else ""
    return (
        f"no candidate meets the budget; the constraint that binds: {broken}. Nearest: {candidate.label} with"
        f" {latency:.3g} ms, {size:.3g} MB{lost}; loosen that limit, or give a stronger --recipe"
    )
