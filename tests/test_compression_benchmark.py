"""The arithmetic of benchmarks/compression.py: shares of a gain, shortened recipes, goals that are missed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def compression(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("compression")
    for name in ("compression", "goals"):
        sys.modules.pop(name, None)


def candidate(label: str, ratio: float) -> dict[str, Any]:
    return {"label": label, "ratio": {"value": ratio}}


def step(name: str, status: str, before: float, after: float) -> dict[str, Any]:
    return {"name": name, "status": status, "reason": "no", "figures": {"macs_before": before, "macs_after": after}}


def report(gain: float = 8.0) -> dict[str, Any]:
    quality = [{"name": "top-1", "value": 0.9}]
    row = {"quality": quality, "ratio": None, "label": "original: openvino bf16", "macs": 1000, "size_bytes": 800}
    return {
        "candidates": [candidate("original: ort fp32", 1.0), candidate("original: ort int8 (u8s8)", 0.5),
                       candidate("slim: ort fp32", 0.25), candidate("slim: ort int8 (u8s8)", 1 / gain)],
        "baseline": row, "budget": {"quality drop": "0.5 points"},
        "result": {**row, "label": "slim: ort int8 (u8s8)", "ratio": {"value": 1 / gain}, "macs": 100,
                   "size_bytes": 100},
        "steps": [step("prune_blocks", "kept", 1600, 400), step("prune_channels", "kept", 400, 200),
                  step("prune_tokens", "undone", 200, 100)],
    }  # fmt: skip


def test_shares_of_a_gain_add_up_and_follow_its_logarithm(compression: Any) -> None:
    found = compression.ablation(report())
    assert (found["original, INT8"], found["structure, float"], found["all"]) == (2.0, 4.0, 8.0)
    shares = found["shares"]  # 4x of 8x is two thirds; of those 4x MACs and then 2x
    assert shares == pytest.approx({"1 prune_blocks": 4 / 9, "2 prune_channels": 2 / 9, "INT8": 1 / 3})
    assert sum(shares.values()) == pytest.approx(1.0)
    assert found["undone"] == {"prune_tokens": "no"}
    assert "shares" not in compression.ablation(report(gain=1.0))
    timed = report()
    for place, gains in enumerate(((1.0, 2.0), (2.0, 4.0))):  # as much each on the clock: so are the shares
        timed["steps"][place]["figures"] |= dict(zip(("gain_before", "gain"), gains, strict=True))
    shares = compression.ablation(timed)["shares"]
    assert shares == pytest.approx({"1 prune_blocks": 1 / 3, "2 prune_channels": 1 / 3, "INT8": 1 / 3})


def test_what_an_exact_rewrite_brought_is_not_counted_to_the_passes(compression: Any) -> None:
    told = report()
    ratios = {"original, rewritten: ort int8 (u8s8)": 1 / 3, "slim, rewritten: ort fp32": 1 / 5,
              "slim, rewritten: ort int8 (u8s8)": 1 / 10}  # fmt: skip
    told["candidates"] += [candidate(label, ratio) for label, ratio in ratios.items()]
    told["result"] |= {"label": "slim, rewritten: ort int8 (u8s8)"}
    found = compression.ablation(told)
    assert (found["original, INT8"], found["structure, float"]) == (3.0, 4.0)
    assert (found["structure rewritten, float"], found["all"]) == (5.0, 10.0)
    shares = found["shares"]  # 4x, then 5/4, then 2x
    assert shares["rewritten graph"] == pytest.approx(math.log10(5 / 4))
    assert shares["INT8"] == pytest.approx(math.log10(2))
    assert sum(shares.values()) == pytest.approx(1.0)


def test_goals_that_are_missed_are_seen(compression: Any) -> None:
    good = compression.Row("r", (), 8.0, macs=10.0, smaller=8.0)
    assert all(holds for _, holds in compression.checks(good, report()))
    hard = compression.Row("r", (), 8.1, macs=10.1, smaller=8.1)
    assert [holds for _, holds in compression.checks(hard, report())] == [False, False, False, True]
    told = compression.table({"r": {"date": "d", "seconds": 60, "checks": compression.checks(hard, report())}})
    assert "8.00x faster" in told and "**no**" in told


def test_the_perceptual_distance_is_held_against_int8_alone(
    compression: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "ROOT", tmp_path)
    asked: list[str] = []

    def told(value: float, label: str) -> dict[str, Any]:
        figures = {"PSNR to the teacher": 25.0, "perceptual distance to the teacher": value}
        return {"result": {"label": label, "quality": [{"name": n, "value": v} for n, v in figures.items()]}}

    def ran(command: list[str], seconds: float) -> tuple[int, str]:
        asked.extend(command)
        out = tmp_path / command[command.index("--out") + 1]
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(made))
        return 0, ""

    monkeypatch.setattr(compression, "_bounded", ran)
    row = compression.Row("r", ("--min-psnr", "22"), 6.0)
    for own, other, label, holds in ((0.04, 0.05, "o: openvino int8", True), (0.06, 0.05, "o: openvino int8", False),
                                     (0.04, 0.05, "o: openvino fp32", False)):  # fmt: skip
        made = told(other, label)
        assert compression.against_int8(row, told(own, "s: openvino int8"), 1.0)[1] == holds
    assert asked[asked.index("--min-psnr") + 1] == "1", "the budget of the row would reject what it is held against"
    assert {row.arguments[-2] for row in compression.ROWS if row.perceptual} == set(compression.ANY)


def test_training_is_cut_short_and_nothing_else(compression: Any) -> None:
    text = "{ steps = 6000, recover_steps = 300, samples = 64, joint_steps = 10 }"
    assert compression.scaled(text, 0.01) == "{ steps = 60, recover_steps = 3, samples = 64, joint_steps = 2 }"
    assert compression.scaled("steps = 0", 0.5) == "steps = 0"


def test_every_row_has_its_recipe(compression: Any) -> None:
    from edgegen import recipe

    for row in compression.ROWS:
        assert recipe.load(str(compression.ROOT / row.file)).steps
