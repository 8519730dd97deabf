"""The passes of a group, timed one by one: what does not pay is put back before anything is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="passes need the extra `torch`")

from test_decide import candidate

from edgegen import applying, decide, recipe
from edgegen.errors import RuntimeFailed
from edgegen.types import Budget, Job, Model, Target

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = recipe.Step(name="prune_channels", options={"ratio": 0.5, "round_to": 1})
THIN = recipe.Step(name="prune_channels", options={"ratio": 0.25, "round_to": 1})
REFIT = recipe.Step(name="reconstruct", options={"samples": 2})
TRAIN = recipe.Step(name="distill", options={"steps": 2, "batch": 2})


class Timed:
    """A fake clock: the gains that builds come to, in the order in which networks are timed; and who was timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Model, *gains: float | None) -> None:
        monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
        self.gains, self.asked = list(gains), []
        told = SimpleNamespace(measures=True)
        self.run: Any = SimpleNamespace(model=model, budget=Budget(), bench=told, progress=lambda *told: None)
        monkeypatch.setattr(applying, "data_key", lambda run: "data")
        monkeypatch.setattr(applying, "job_of", lambda run, progress: Job(Target("t", "", ()), teacher=model))
        monkeypatch.setattr(applying, "export", lambda run, model, name: None)
        monkeypatch.setattr(applying, "unquantized", self.built)
        monkeypatch.setattr(decide, "cause", lambda run, build, beaten: "; why: nothing")

    def built(self, run: Any, of: str, graph: Any, baseline: Any, only: str) -> list[Any]:
        self.asked.append((of, only))
        gain = self.gains.pop(0)
        if gain is None:
            raise RuntimeFailed("no build runs: it is too wide")
        return [candidate(of, 1 / gain)]

    def applied(self, *group: recipe.Step) -> tuple[list[tuple[str, str]], list[dict[str, Any]], Model]:
        """(name and why it was undone, records, model) of the group's passes."""
        base = candidate("original", 1.0)
        done, model = applying.applied(self.run, 1, group, self.run.model, base, base)
        assert not self.gains
        told = [(one.step.name, one.undone) for one in done]
        return told, applying.records(done, "kept", "2.00x", "net"), model


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, conv_chain: Model) -> Any:
    """gains -> `Timed`."""
    return lambda *gains: Timed(monkeypatch, tmp_path, conv_chain, *gains)


def widths(model: Model) -> list[int]:
    return [part.out_channels for part in model.stage.module.modules() if hasattr(part, "out_channels")]


def test_each_pass_that_changes_the_structure_is_timed_before_the_training(timed: Any, conv_chain: Model) -> None:
    clock = timed(1.5, 1.8)
    told, records, model = clock.applied(THIN, THIN, REFIT, TRAIN)
    assert told == [("prune_channels", ""), ("prune_channels", ""), ("reconstruct", ""), ("distill", "")]
    timed_ones = [f"1.{place} prune_channels not trained" for place in (1, 2)]  # neither what refits nor what trains
    assert clock.asked == [(name, "fake") for name in timed_ones]
    figures = [(record["figures"].get("gain_before"), record["figures"].get("gain")) for record in records]
    assert figures == [(1.0, pytest.approx(1.5)), (pytest.approx(1.5), pytest.approx(1.8)), (None, None), (None, None)]
    assert widths(model) < widths(conv_chain)
    assert {(record["status"], record["network"]) for record in records} == {("kept", "net")}


def test_a_pass_that_does_not_pay_is_put_back_and_the_others_go_on(timed: Any) -> None:
    clock = timed(1.5, 1.51, 1.51)  # all runtimes are asked before it is said that none gains
    told, records, model = clock.applied(THIN, NARROW, TRAIN)
    assert [name for name, undone in told if undone] == ["prune_channels"]
    assert [only for _, only in clock.asked] == ["fake", "fake", ""]
    assert [record["status"] for record in records] == ["kept", "undone", "kept"]
    reason = records[1]["reason"]
    assert reason.startswith("no gain on this target: 1.51x") and "before this step 1.50x" in reason
    assert reason.endswith("; why: nothing")
    assert widths(model) == widths(timed(1.5).applied(THIN, TRAIN)[2])


def test_where_nothing_pays_nothing_is_trained(timed: Any, conv_chain: Model) -> None:
    told, records, model = timed(1.0, 1.0).applied(NARROW, REFIT, TRAIN)
    assert model is conv_chain
    assert [record["status"] for record in records] == 3 * ["undone"]
    assert [why for _, why in told][1:] == 2 * ["the passes before it are undone: there is nothing to recover"]


def test_what_no_runtime_takes_is_put_back_with_its_reason(timed: Any, conv_chain: Model) -> None:
    told, _, model = timed(None, None).applied(NARROW, TRAIN)
    assert told[0] == ("prune_channels", "no build runs: it is too wide") and model is conv_chain


def test_where_the_fastest_runtime_does_not_take_it_the_others_are_asked(timed: Any, conv_chain: Model) -> None:
    clock = timed(None, 1.5)
    told, _, model = clock.applied(NARROW, TRAIN)
    assert told == [("prune_channels", ""), ("distill", "")] and widths(model) < widths(conv_chain)
    assert [only for _, only in clock.asked] == ["fake", ""]


def test_a_pass_that_the_recipe_keeps_stays_and_so_does_what_makes_it_smaller(timed: Any, conv_chain: Model) -> None:
    kept = NARROW.model_copy(update={"keep": True})
    told, records, model = timed(1.0, 1.0).applied(kept, TRAIN)
    assert [undone for _, undone in told] == ["", ""] and widths(model) < widths(conv_chain)
    assert records[0]["figures"]["gain"] == pytest.approx(1.0)
    clock = timed(1.0, 1.0)
    clock.run.budget = Budget(max_size_bytes=10)
    assert widths(clock.applied(NARROW, TRAIN)[2]) < widths(conv_chain)


def test_a_pass_alone_is_judged_with_its_group(timed: Any, conv_chain: Model) -> None:
    clock = timed()
    assert widths(clock.applied(NARROW)[2]) < widths(conv_chain) and clock.asked == []
