"""Decisions, on candidates with known figures: what is kept, what is undone, and the reason in words."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgegen import decide, quality
from edgegen.candidates import Candidate, is_faster
from edgegen.errors import BudgetError
from edgegen.teacher import Evaluations
from edgegen.types import Artifact, Budget, Graph, Measurement, PrecisionPlan

GATE = quality.Gate("PSNR to the reference", "dB", 0.5)


def candidate(name, ratio, drop=0.0, size=1000, precision="fp32", spread=0.01, **changes):
    plan = PrecisionPlan(precision)
    graph = Graph("main", Path("m.onnx"), (), (), plan)
    artifact = Artifact("fake", Path("m"), (), plan, size, (), ())
    interval = (ratio * (1 - spread), ratio * (1 + spread))
    made = Candidate(
        of=name,
        runtime="fake",
        graph=graph,
        artifact=artifact,
        latency=Measurement("latency", "ms", 10 * ratio),
        ratio=Measurement("latency ratio", "", ratio, interval),
        drop=drop,
    )
    return replace(made, **changes)


@dataclass
class FakeBench:
    """Scores are known before; nothing is built."""

    here: bool = True
    held_out: dict = field(default_factory=dict)

    def score(self, candidate, evaluation, gate, where):
        found = self.held_out.get(candidate.of, candidate.drop) if where == "test" else candidate.drop
        return replace(candidate, drop=found)


def run_with(**limits):
    return SimpleNamespace(bench=FakeBench(), budget=Budget(**limits), gate=GATE, recipe=None)


FOUND = Evaluations(None, None)
BASE = candidate("original", 1.0)


def chosen_of(run, *others):
    chosen, pool = decide.choose(run, BASE, [BASE, *others], FOUND)
    return chosen, {c.of: c for c in pool}


def test_the_fastest_inside_the_budget_is_chosen_and_the_others_say_why_not():
    chosen, others = chosen_of(
        run_with(max_quality_drop=0.5), candidate("fast", 0.4, drop=0.9), candidate("good", 0.5, drop=0.4)
    )
    assert chosen.of == "good"
    assert "2.00x" in chosen.reason
    assert others["fast"].verdict == "undone"
    assert "0.9" in others["fast"].reason
    assert "0.5" in others["fast"].reason


def test_a_gain_beyond_what_may_be_lost_is_in_the_reason():
    chosen, _ = chosen_of(run_with(max_quality_drop=0.5), candidate("better", 0.5, drop=-2.0))
    assert chosen.reason.endswith("; it gains 2 dB on its teacher, more than the 0.5 that it may lose")
    chosen, _ = chosen_of(run_with(max_quality_drop=0.5), candidate("better", 0.5, drop=-0.4))
    assert "it gains" not in chosen.reason


def test_what_is_not_faster_than_the_baseline_is_never_chosen_for_speed():
    chosen, others = chosen_of(run_with(max_quality_drop=0.5), candidate("slow", 1.3, precision="int8"))
    assert chosen.label == BASE.label
    assert "INT8 is not faster" in others["slow"].reason


@pytest.mark.parametrize(("ratio", "spread", "faster"), [(0.9, 0.01, True), (0.9, 0.2, False), (0.99, 0.0, False)])
def test_a_gain_inside_the_noise_does_not_count(ratio, spread, faster):
    assert is_faster(candidate("c", ratio, spread=spread)) is faster


def test_the_second_held_out_part_can_reject_but_not_select():
    run = run_with(max_quality_drop=0.5)
    run.bench.held_out = {"lucky": 0.8}
    chosen, others = chosen_of(run, candidate("lucky", 0.4, drop=0.1), candidate("next", 0.6, drop=0.2))
    assert chosen.of == "next"
    assert "second held-out part" in others["lucky"].reason


def test_a_size_budget_can_take_a_build_that_is_not_faster():
    chosen, _ = chosen_of(run_with(max_quality_drop=0.5, max_size_bytes=500), candidate("small", 1.2, size=400))
    assert chosen.of == "small"


def test_a_budget_that_cannot_be_met_names_the_constraint_and_the_nearest_point():
    with pytest.raises(BudgetError, match=r"max-latency.*Nearest: near") as caught:
        chosen_of(run_with(max_latency_ms=3.0), candidate("near", 0.4), candidate("far", 0.9))
    assert "4 ms" in str(caught.value)


def test_a_drop_of_zero_ends_with_the_best_unquantized_build_even_where_that_rounds():
    rounded = candidate("original", 1.0, drop=0.002, precision="bf16")
    pool = [rounded, candidate("original", 1.8), candidate("lossy", 0.3, drop=0.01)]
    chosen, _ = decide.choose(run_with(max_quality_drop=0.0), rounded, pool, FOUND)
    assert chosen.graph.plan.precision == "bf16"


def test_a_drop_of_zero_still_leaves_the_teacher_itself():
    chosen, _ = chosen_of(run_with(max_quality_drop=0.0), candidate("lossy", 0.3, drop=0.01))
    assert chosen.label == BASE.label


@pytest.mark.parametrize(
    ("gain", "broken", "forced", "here", "status", "words"),
    [
        (2.0, "", False, True, "kept", "2.00x"),
        (1.0, "", False, True, "undone", "no gain"),
        (2.0, "drop of 3", False, True, "undone", "drop of 3"),
        (1.0, "drop of 3", True, True, "forced", "because you asked"),
        (2.0, "", False, False, "predicted", "predicted 2.00x"),
    ],
)
def test_a_structural_step_is_kept_only_if_it_pays(gain, broken, forced, here, status, words):
    found, reason = decide.group_verdict(candidate("student", 1 / gain), 1.0, broken, forced, here)
    assert found == status
    assert words in reason
