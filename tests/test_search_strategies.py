"""How candidates are chosen: evolution, its two stages, and windows that move; against random draws on known tables."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is not installed (extra: search)")

from edgegen.search import evolution, front, shifting, spaces, store, strategies, working
from edgegen.search.spaces import Space
from edgegen.search.store import Figures


def gene(name: str, pass_name: str, option: str, count: int, **more: Any) -> dict[str, Any]:
    choices = [round(0.9 * i / count, 4) for i in range(count)]
    return {"name": name, "pass": pass_name, "option": option, "choices": choices, **more}


SPACE = spaces.parse({"schema": 1, "genes": [
    gene("blocks", "prune_blocks", "ratio", 12), gene("channels", "prune_channels", "ratio", 20),
    gene("rank", "factorize_svd", "ratio", 8),
]}, "synthetic")  # fmt: skip


def searched(folder: Path, name: str, space: Space, objective: Any, trials: int, seed: int = 0) -> list[store.Row]:
    """The rows of a search, in the order in which they were done."""
    sampler = strategies.make(name, space, trials, seed)
    kept, study, _ = store.open_study(str(folder / f"{name}-{seed}.db"), "s", {}, sampler, 2.0)
    rows: list[store.Row] = []
    try:
        working.work(kept, study, space, {}, objective, trials=trials, seed=seed, told=rows.append)
    finally:
        kept.close()
    return rows


def test_the_area_under_a_front_is_known() -> None:
    assert front.hypervolume([], (1.0, 1.0)) == 0.0
    assert front.hypervolume([(0.5, 0.5)], (1.0, 1.0)) == 0.25
    assert front.hypervolume([(0.5, 0.5), (0.6, 0.6), (0.25, 0.75), (2.0, 0.0)], (1.0, 1.0)) == pytest.approx(0.3125)
    assert front.hypervolume([(0.0, 2.0)], (1.0, 1.0)) == 0.0


# --- windows that move


def _windows(space: Space, objective: Any, rounds: int = 6) -> shifting.Windows:
    """Where the windows are after rounds of all their places."""
    now = shifting.start(space)
    for _ in range(rounds):
        chosen = [{**{name: low for name, (low, _) in now.items()}, name: place}
                  for name, (low, high) in now.items() for place in range(low, high + 1)]  # fmt: skip
        now = shifting.moved(space, now, chosen, [objective(one) for one in chosen])
    return now


def test_a_window_begins_in_the_middle() -> None:
    assert shifting.start(SPACE) == {"blocks": (3, 8), "channels": (5, 14), "rank": (2, 5)}


def test_windows_move_to_the_known_optimum_and_shrink_there() -> None:
    def error(one: Mapping[str, int]) -> float:
        return one["channels"] / 20 + (11 - one["blocks"]) / 12

    now = _windows(SPACE, error)
    assert now["channels"][0] == 0
    assert now["blocks"][1] == 11
    assert now["channels"][1] - now["channels"][0] < 5
    assert now["blocks"][1] - now["blocks"][0] < 3


def test_a_window_grows_where_no_place_is_worse() -> None:
    assert _windows(SPACE, lambda one: 0.3)["rank"] == (0, 7)


def test_a_gene_without_order_keeps_all_its_choices() -> None:
    free = spaces.parse({"schema": 1, "genes": [gene("rank", "factorize_svd", "ratio", 8, ordered=False)]}, "s")
    assert _windows(free, lambda one: float(one["rank"]))["rank"] == (0, 7)


def test_expected_and_top_tier_errors_count_alike() -> None:
    assert shifting.et_error([0.0, 0.5, 1.0]) == pytest.approx((0.5 + 0.0) / 2)
    assert shifting.et_error([0.4]) == pytest.approx(0.4)


def test_the_search_draws_inside_the_windows_and_ends_near_the_optimum(tmp_path: Path) -> None:
    def objective(one: Mapping[str, int]) -> Figures:
        far = abs(one["channels"] - 18) + abs(one["blocks"] - 1) + abs(one["rank"] - 6)
        return Figures(1.0 + far, 1.0, float(far), 100 + far)

    rows = searched(tmp_path, "shifting", SPACE, objective, 80)
    first = shifting.start(SPACE)
    assert all(low <= row.choices[name] <= high for row in rows[:20] for name, (low, high) in first.items())
    assert min(row.figures.drop for row in rows[60:]) < min(row.figures.drop for row in rows[:20])
    assert sum(row.choices["channels"] > 14 for row in rows[60:]) > 10, "out of the window that it began with"


# --- two stages


GAN = spaces.parse({"schema": 1, "genes": [
    gene("first", "prune_channels", "ratio", 10), gene("second", "prune_blocks", "ratio", 10),
    {"name": "game", "pass": "distill_gan", "option": "adversarial", "choices": [0.0, 0.1, 0.2, 0.3]},
    {"name": "steps", "pass": "distill_gan", "option": "steps", "choices": [10, 20, 40]},
]}, "gan")  # fmt: skip


def test_the_network_evolves_first_and_then_its_game(tmp_path: Path) -> None:
    def objective(one: Mapping[str, int]) -> Figures:
        small = one["first"] + one["second"]
        lost = abs(one["first"] - 3) + abs(one["second"] - 6) - 0.5 * one["game"] - one["steps"]
        return Figures(20.0 - small, 1.0, float(lost), 1000 - small)

    rows = searched(tmp_path, "two-stage", GAN, objective, 40)
    first, second = rows[:20], rows[20:]
    assert all((row.choices["game"], row.choices["steps"]) == (0, 0) for row in first), "the cheapest game"
    networks = {(row.choices["first"], row.choices["second"]) for row in second}
    best = {(row.choices["first"], row.choices["second"]) for row in first
            if not any(strategies.dominates(o.figures.values, row.figures.values) for o in first)}  # fmt: skip
    assert len(networks & best) >= 0.8 * len(networks), "drawn anew only where a proposal was tried before"
    assert sum(bool(row.choices["game"] or row.choices["steps"]) for row in second) >= 16


def test_without_a_game_it_is_aging_evolution(tmp_path: Path) -> None:
    def objective(one: Mapping[str, int]) -> Figures:
        return Figures(1.0 + sum(one.values()), 1.0, 0.0, 1)

    found = [[row.choices for row in searched(tmp_path, name, SPACE, objective, 30)] for name in ("two-stage",)]
    assert len(found[0]) == 30
    assert isinstance(strategies.make("two-stage", SPACE, 30, 0), evolution.Aging)


# --- against random draws


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of benchmarks/ import each other by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


TABLE_SPACE: dict[str, Any] = {"schema": 1, "genes": [
    gene("blocks", "prune_blocks", "ratio", 5), gene("channels", "prune_channels", "ratio", 12),
    {"name": "training", "pass": "distill", "option": "steps", "choices": [10, 50, 200]},
    {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
]}  # fmt: skip


def _table() -> dict[str, Any]:
    """Every candidate of a small space with figures that a formula gives: training and INT8 pay, blocks cost much."""
    space, rows = spaces.parse(TABLE_SPACE, "t"), {}
    for places in spaces.everything(space):
        one = dict(zip([g.name for g in space.genes], places))
        ratio = (1 - 0.06 * one["channels"]) * (1 - 0.1 * one["blocks"]) * (1 - 0.45 * one["int8"])
        drop = 0.03 * one["channels"] ** 2 * (1.5 - 0.6 * one["training"]) + 2.0 * one["blocks"] + 0.2 * one["int8"]
        key = spaces.candidate_key(spaces.to_recipe(space, one, {}))
        rows[key] = {"key": key, "choices": one, "latency_ms": 5 * ratio, "ratio": ratio, "drop": drop,
                     "size_bytes": int(1e6 * ratio), "build": "b", "failure": ""}  # fmt: skip
    return {"space": TABLE_SPACE, "rows": list(rows.values())}


@pytest.mark.slow
def test_searches_on_a_table_beat_random_draws() -> None:
    replay = importlib.import_module("search_replay")
    found = replay.replayed(_table(), ["tpe"], trials=40, seeds=3, drop=6.0)
    assert found["candidates"] == 360
    assert all(0 < share <= 1 for shares in found["shares"].values() for share in shares)
    assert found["wins"] == {"random": 0, "tpe": 3, "tpe, --max-quality-drop 6": 3}
    assert "| tpe | " in replay.markdown(found)


def test_a_candidate_that_the_table_has_not_fails_and_is_no_volume() -> None:
    replay = importlib.import_module("search_replay")
    table = _table()
    table["rows"] = [entry for entry in table["rows"] if entry["choices"]["channels"] < 3]
    found = replay.replayed(table, [], trials=20, seeds=1, drop=6.0)
    assert found["candidates"] == 90
    assert 0 < found["shares"]["random"][0] <= 1


def test_the_table_has_each_recipe_once_and_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    script = importlib.import_module("search_table")
    space = spaces.parse(script.SPACE, "table")
    wanted = script.candidates(space, {})
    assert (space.size, len(wanted)) == (336, 332), "without another pass there is nothing to train"
    assert wanted == script.candidates(space, {})
    key, choices = next(iter(wanted.items()))
    row = script.row(key, choices, Figures(2.0, 0.5, 1.5, 100, build="b"), 3.14159)
    assert row["seconds"] == 3.14
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    assert script.known(tmp_path / "rows.jsonl") == [row]
    assert importlib.import_module("search_replay").figures(row) == Figures(2.0, 0.5, 1.5, 100, build="b")


@pytest.fixture
def live() -> ModuleType:
    return importlib.import_module("search_live")


def test_a_level_is_won_where_the_front_is_better_at_no_more_latency(live: ModuleType) -> None:
    front, single = [(0.2, 0.5), (0.4, 0.1), (0.3, 0.7)], [(0.3, 0.6), (0.4, 0.05), (1.0, 0.0)]
    found = live.levels(front, single, 1.0)
    assert found == [
        {"ratio": 0.2, "front": 0.5, "single": None}, {"ratio": 0.3, "front": 0.5, "single": 0.6},
        {"ratio": 0.4, "front": 0.1, "single": 0.05},
    ]  # fmt: skip
    assert [live.won(one) for one in found] == [True, True, False]
    assert live.levels([*front, (0.1, 1.5)], single, 1.0) == found, "more is lost there than was asked for"
    assert live.levels([*front, (0.1, 1.5)], single, 2.0) == [{"ratio": 0.1, "front": 1.5, "single": None}, *found]


def test_recipes_of_one_pass_have_every_length_of_training_but_for_precision(live: ModuleType) -> None:
    for name in live.CASES:
        space = spaces.load(str(live.ROOT / "benchmarks" / "spaces" / f"{name}.toml"))
        found = live.alone(space)
        genes = {gene.name: len(gene.choices) - 1 for gene in space.genes if gene.pass_name != "distill"}
        (lengths,) = (len(gene.choices) for gene in space.genes if gene.pass_name == "distill")
        assert len(found) == lengths * sum(n for gene, n in genes.items() if gene != "int8") + genes["int8"]
        assert all(sum(one[gene] > 0 for gene in genes) == 1 for one in found)
